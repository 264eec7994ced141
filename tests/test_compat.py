"""Internals of other libraries that lit_tricks uses: a test fails where one of them renames or moves a name."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning
import torch
from helpers.fits import make_trainer
from helpers.modules import NAMESPACES, eval_loader, lightning, module_class, train_loader
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import lit_tricks
from lit_tricks import _compat

PACKAGES = list(NAMESPACES)
PACKAGE = Path(lit_tricks.__file__).parent


def test_each_name_has_a_reason_and_a_link():
    public = {
        "is_overridden",
        "lightning_classes",
        "lightning_packages",
        "overrides",
    }  # of ours, or made of public names
    tree = ast.parse(inspect.getsource(_compat))
    documented = {node.name: ast.get_docstring(node) or "" for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node, doc in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.Assign) and isinstance(doc, ast.Expr) and isinstance(node.targets[0], ast.Name):
            documented[node.targets[0].id] = str(ast.literal_eval(doc.value))
    assert documented.keys() == set(_compat.__all__)
    assert {name for name, doc in documented.items() if "https://github.com/" not in doc} == public


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Private names that a file reads or names as a string, and does not define itself."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_tricks"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [node.value]
        yield from ((node.lineno, name) for name in names if name.startswith("_") and not name.startswith("__"))


def defined_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


# Names with an underscore that are public: of namedtuple, and of PIL for those who write a plugin.
# https://pillow.readthedocs.io/en/stable/handbook/writing-your-own-image-plugin.html
PUBLIC = {"_asdict", "_fields", "_replace", "_mode", "_size"}
# Ends of names of files and metrics, and a function of the shell.
STRINGS = {"_", "_dataloader", "_epoch", "_lit_tricks_config", "_masks", "_no_decay", "_recall", "_step", "_timm"}


def test_private_names_of_others_stand_in_compat_only():
    sources = {file: file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py") if file.name != "_compat.py"}
    ours = {name for source in sources.values() for name in defined_names(source)} | PUBLIC | STRINGS
    found = {
        f"{file.relative_to(PACKAGE)}:{line} {name}"
        for file, source in sources.items()
        for line, name in private_names(source)
        if name not in ours
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    ["x._hidden", "torch._foreach_abs_(x)", "getattr(x, '_hidden', None)", "from a._b import c", "from a import _b"],
)
def test_private_names_are_found_however_they_are_written(source):
    assert list(private_names(source))


def test_overrides_reject_a_method_that_upstream_does_not_have():
    class Upstream:
        def _there(self) -> None: ...

    class Ours(Upstream):
        @_compat.overrides(Upstream)
        def _there(self) -> str:
            return "ours"

    assert Ours()._there() == "ours"
    with pytest.raises(AttributeError, match="_renamed"):

        class Renamed(Upstream):
            @_compat.overrides(Upstream)
            def _renamed(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# Two packages of Lightning


def test_lightning_packages_are_both():
    assert _compat.lightning_packages() == [lightning_pytorch, pytorch_lightning]


@pytest.mark.parametrize(
    "path",
    [
        "Callback",
        "callbacks.BaseFinetuning",
        "callbacks.GradientAccumulationScheduler",
        "callbacks.StochasticWeightAveraging",
        "callbacks.WeightAveraging",
        "loggers.WandbLogger",
    ],
)
def test_lightning_classes_are_of_both_packages(path):
    classes = _compat.lightning_classes(path)
    assert [cls.__name__ for cls in classes] == [path.rpartition(".")[2]] * 2
    assert [cls.__module__.partition(".")[0] for cls in classes] == ["lightning", "pytorch_lightning"]


def test_lightning_classes_reject_an_unknown_name():
    with pytest.raises(AttributeError, match="WeightAverager"):
        _compat.lightning_classes("callbacks.WeightAverager")


@pytest.mark.parametrize("namespace", PACKAGES)
def test_is_overridden_in_a_class_or_an_object(namespace):
    pl = lightning(namespace)
    plain, own = pl.LightningModule(), type("Own", (pl.LightningModule,), {"forward": lambda self: None})()
    assert not _compat.is_overridden("forward", plain)
    assert _compat.is_overridden("forward", own)
    plain.forward = lambda: None
    assert _compat.is_overridden("forward", plain)


@pytest.mark.parametrize("namespace", PACKAGES)
def test_dummy_logger_is_of_the_package_of_the_trainer(namespace):
    logger = _compat.dummy_logger(make_trainer(namespace=namespace))
    assert isinstance(logger, lightning(namespace).loggers.Logger)
    assert type(logger).__name__ == "DummyLogger"


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


def in_fit(look, namespace: str = "lightning", module: nn.Module | None = None, **options: object) -> list[object]:
    """Return the values of ``look(trainer, module)`` in each training batch of a short fit."""
    found: list[object] = []

    class Look(lightning(namespace).Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(look(trainer, pl_module))

    trainer = make_trainer(Look(), namespace=namespace, max_epochs=1, **options)
    trainer.fit(module or module_class(namespace)(), train_loader(), eval_loader())
    return found


@pytest.mark.parametrize("namespace", PACKAGES)
def test_callbacks_of_a_trainer(namespace):
    callback = lightning(namespace).Callback()
    assert callback in _compat.callbacks_of(make_trainer(callback, namespace=namespace))


@pytest.mark.parametrize("namespace", PACKAGES)
def test_should_update_logs_in_every_second_batch(namespace):
    found = in_fit(lambda trainer, _: _compat.should_update_logs(trainer), namespace, log_every_n_steps=2)
    assert found == [False, True, False, True]


@pytest.mark.parametrize("namespace", PACKAGES)
def test_logging_step_counts_batches(namespace):
    assert in_fit(lambda trainer, _: _compat.logging_step(trainer), namespace) == [0, 1, 2, 3]


@pytest.mark.parametrize("namespace", PACKAGES)
def test_combined_loader_of_the_fit_loop(namespace):
    [loader, *_] = in_fit(lambda trainer, _: _compat.combined_loader(trainer.fit_loop).flattened, namespace)
    assert isinstance(loader[0], DataLoader)
    trainer = make_trainer(namespace=namespace)
    assert _compat.combined_loader(trainer.fit_loop) is None
    assert _compat.combined_loader(trainer.fit_loop.epoch_loop.val_loop) is None


@pytest.mark.parametrize("namespace", PACKAGES)
def test_training_source_is_the_loader_that_was_given(namespace):
    found = in_fit(lambda trainer, _: _compat.training_source(trainer), namespace)
    assert all(isinstance(source, DataLoader) for source in found)


@pytest.mark.parametrize("namespace", PACKAGES)
def test_dump_weights_has_the_weights_and_no_optimizers(namespace):
    [content, *_] = in_fit(lambda trainer, _: _compat.dump_weights(trainer), namespace)
    assert content["state_dict"]
    assert "optimizer_states" not in content


@pytest.mark.parametrize("namespace", PACKAGES)
def test_saves_in_shards_only_under_a_strategy_that_does(namespace):
    parallel = lightning(namespace).strategies.ModelParallelStrategy
    for strategy, expected in ((parallel(save_distributed_checkpoint=True), True), (object(), False)):
        assert _compat.saves_in_shards(SimpleNamespace(strategy=strategy)) is expected
    assert not _compat.saves_in_shards(SimpleNamespace(strategy=parallel(save_distributed_checkpoint=False)))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_wrap_again_by_ddp_registers_what_is_trained_now(namespace):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        package = lightning(namespace)
        environments = importlib.import_module(f"{package.__name__}.plugins.environments")
        strategy = package.strategies.DDPStrategy(
            parallel_devices=[torch.device("cpu")], cluster_environment=environments.LightningEnvironment()
        )
        strategy.model = module = module_class(namespace)()
        module.net[0].requires_grad_(False)
        strategy.configure_ddp()
        first = strategy.model
        module.net[0].requires_grad_(True)
        _compat.wrap_again_by_ddp(strategy, module)
        assert strategy.model is not first
        strategy.model(torch.zeros(2, 1, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("namespace", PACKAGES)
def test_apply_before_transfer_hook_calls_that_of_the_module(namespace):
    class Doubles(module_class(namespace)):  # type: ignore[misc]
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch if isinstance(batch, list | tuple) else 2 * batch

    assert in_fit(lambda _, module: _compat.apply_before_transfer_hook(module, 3), namespace, Doubles())[0] == 6


@pytest.mark.parametrize("namespace", PACKAGES)
def test_is_compiled_by_lightning_after_unwrapping(namespace):
    compile_utilities = pytest.importorskip(f"{NAMESPACES[namespace]}.utilities.compile")
    module = module_class(namespace)()
    assert not _compat.is_compiled_by_lightning(module)
    compiled = torch.compile(module, backend="eager")
    assert _compat.is_compiled_by_lightning(compile_utilities.from_compiled(compiled))


@pytest.mark.parametrize("namespace", PACKAGES)
def test_saved_hparams_are_not_created(namespace):
    class Saves(lightning(namespace).LightningModule):
        def __init__(self, width: int, save: bool) -> None:
            super().__init__()
            if save:
                self.save_hyperparameters()

    assert _compat.saved_hparams(Saves(3, save=True))["width"] == 3
    assert _compat.saved_hparams(Saves(3, save=False)) == {}


def test_command_line_saves_class_and_instantiator(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    built = []

    class Noted(lightning_pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            built.append(_compat.is_built_by_command_line())
            self.save_hyperparameters()

    monkeypatch.setattr(sys.modules[__name__], "Noted", Noted, raising=False)  # where the command line finds it
    monkeypatch.setattr(sys, "argv", ["lit-tricks"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what it has deprecated since
    args = [f"--model={__name__}.Noted", f"--trainer.default_root_dir={tmp_path}"]
    options = {
        "run": False,
        "save_config_callback": None,
        "seed_everything_default": False,
        "trainer_defaults": {"logger": False, "accelerator": "cpu"},
    }
    cli = LightningCLI(lightning_pytorch.LightningModule, subclass_mode_model=True, args=args, **options)
    assert built == [True]
    assert {_compat.CLASS_PATH_KEY, _compat.INSTANTIATOR_KEY} <= cli.model.hparams.keys()
    Noted()
    assert built == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# torch: modules


def test_base_classes_of_layers():
    assert isinstance(nn.SyncBatchNorm(2), _compat.BatchNorm)
    assert isinstance(nn.InstanceNorm2d(2), _compat.NormWithStatistics)
    assert issubclass(_compat.BatchNorm, _compat.NormWithStatistics)
    assert isinstance(nn.ConvTranspose3d(1, 1, 1), _compat.Convolution)
    assert isinstance(nn.AlphaDropout(), _compat.Dropout)
    for base in (_compat.BatchNorm, _compat.NormWithStatistics, _compat.Convolution, _compat.Dropout):
        assert not isinstance(nn.Linear(1, 1), base)


def test_module_registries_hold_parameters_and_submodules():
    module = nn.Sequential(nn.Linear(1, 1))
    assert vars(module)[_compat.MODULE_REGISTRIES[1]] == {"0": module[0]}
    assert vars(module[0])[_compat.MODULE_REGISTRIES[0]].keys() == {"weight", "bias"}


def test_compiled_call_is_what_compile_sets():
    module = nn.Linear(1, 1)
    assert _compat.compiled_call_of(module) is None
    module.compile(backend="eager")
    assert _compat.compiled_call_of(module) is getattr(module, _compat.COMPILED_CALL) is not None
    setattr(module, _compat.COMPILED_CALL, lambda x: "replaced")
    assert module(torch.zeros(1)) == "replaced"


def test_call_of_a_module_runs_its_hooks():
    module = nn.Identity()
    module.register_forward_hook(lambda *_: 7)
    assert _compat.call_of(module)(3) == 7


def test_is_optimized_module_is_what_compile_returns():
    module = nn.Linear(1, 1)
    assert not _compat.is_optimized_module(module)
    assert _compat.is_optimized_module(torch.compile(module, backend="eager"))


# ---------------------------------------------------------------------------------------------------------------------
# torch: tensors


def test_leaves_of_nested_containers():
    pair = namedtuple("pair", "x y")
    assert _compat.leaves({"a": [1, (2, None)], "b": pair(3, 4)}) == [1, 2, None, 3, 4]


def test_plain_torch_functions_do_not_dispatch():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("dispatched")

    tensor = torch.ones(2).as_subclass(Loud)
    with _compat.plain_torch_functions():
        assert type(tensor + 1) is torch.Tensor


def test_foreach_functions_act_on_each_tensor():
    def pair(*values: float) -> list[torch.Tensor]:
        return [torch.tensor([float(value)]) for value in values]

    there = pair(1.0, -2.0)
    assert torch.cat(_compat.foreach_sign(there)).tolist() == [1, -1]
    _compat.foreach_copy_(there, pair(3, 4))
    assert torch.cat(there).tolist() == [3, 4]
    _compat.foreach_lerp_(there, pair(5, 8), 0.5)
    assert torch.cat(there).tolist() == [4, 6]
    _compat.foreach_mul_(there, torch.tensor(2.0))
    assert torch.cat(there).tolist() == [8, 12]
    _compat.foreach_add_(there, pair(1, 1), alpha=3)
    assert torch.cat(there).tolist() == [11, 15]


def test_draw_dirichlet_draws_from_the_generator():
    concentration = torch.full((5, 3), 0.7, dtype=torch.float64)
    draws = [_compat.draw_dirichlet(concentration, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.testing.assert_close(draws[0].sum(1), torch.ones(5, dtype=torch.float64))


def test_new_shared_storage_is_shared():
    storage = _compat.new_shared_storage(12)
    assert storage.nbytes() == 12
    assert storage.is_shared()


def test_resize_antialiased_into_is_interpolate():
    images = torch.randint(0, 256, (1, 3, 16, 12), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    out = torch.empty(1, 3, 8, 6, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    _compat.resize_antialiased_into(out, images, 0.5, 0.5)
    expected = nn.functional.interpolate(images, (8, 6), mode="bilinear", antialias=True)
    assert torch.equal(out, expected)


# ---------------------------------------------------------------------------------------------------------------------
# torch: optimizers and gradient scalers


def optimizer(**options: object) -> torch.optim.Adam:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), torch.inf)
    return torch.optim.Adam([parameter], **options)  # type: ignore[arg-type]


def test_calls_step_hooks_unless_init_was_not_called():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None: ...

        def step(self) -> None: ...  # type: ignore[override]

    assert _compat.calls_step_hooks(optimizer())
    assert not _compat.calls_step_hooks(Wrapper())


def test_unscales_in_step_if_fused():
    assert _compat.unscales_in_step(optimizer(fused=True))
    assert not _compat.unscales_in_step(optimizer())


@pytest.mark.parametrize("fused", [True, False])
def test_keep_unscaling_of_a_fused_optimizer(fused):
    scaler, kept = torch.amp.GradScaler("cpu", init_scale=8.0), optimizer(fused=fused)
    before = _compat.unscales_in_step(kept)
    handle = _compat.keep_unscaling(kept)
    kept.param_groups[0]["params"][0].grad = torch.full((2,), 4.0)
    seen = []
    kept.register_step_pre_hook(lambda kept, *_: seen.append(kept.param_groups[0]["params"][0].grad.tolist()))
    scaler.scale(torch.ones(()))
    scaler.step(kept)
    assert seen == [[0.5, 0.5]]
    handle.remove()
    assert _compat.unscales_in_step(kept) == before


def test_keep_scheduler_mark_of_a_step_that_is_replaced(recwarn):
    kept = optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(kept, 1)
    step = kept.step
    kept.step = lambda *args: step(*args)
    _compat.keep_scheduler_mark(step, kept.step)
    kept.step()
    scheduler.step()
    assert not [each for each in recwarn if "overridden" in str(each.message)]


def test_was_skipped_by_scaler_in_the_step_of_a_fused_optimizer():
    fused, found = optimizer(fused=True), []
    fused.register_step_post_hook(lambda optimizer, *_: found.append(_compat.was_skipped_by_scaler(optimizer)))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # creates the scale
    scaler.step(fused)
    fused.param_groups[0]["params"][0].grad = torch.zeros(2)
    scaler.update()
    scaler.step(fused)
    assert found == [True, False]
    assert not _compat.was_skipped_by_scaler(fused)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Holds:
    """A loader that keeps its iterator, as torchdata's and litdata's do, and torch's with persistent workers."""

    def __init__(self, kind: str) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        data = TensorDataset(torch.arange(4))
        self.loader: DataLoader[object] = (
            DataLoader(data, num_workers=1, persistent_workers=True)
            if kind == "torch"
            else StatefulDataLoader(data, num_workers=1)
        )

    def __enter__(self) -> DataLoader[object]:
        iterator = iter(self.loader)
        next(iterator)
        return self.loader

    def __exit__(self, *_: object) -> None:
        if self.loader._iterator is not None:
            _compat.stop_workers(self.loader)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
def test_has_iterator_once_an_epoch_has_begun():
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(TensorDataset(torch.arange(4)))
    assert not _compat.has_iterator(loader)
    next(iter(loader))
    assert _compat.has_iterator(loader)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
@pytest.mark.parametrize("kind", ["torch", "torchdata"])
def test_workers_of_a_loader_end_when_stopped(kind):
    with Holds(kind) as loader:
        [worker] = _compat.workers_of(loader)
        assert worker.is_alive()
        _compat.stop_workers(loader)
        assert not worker.is_alive()
        _compat.reset_iterator(loader)
        assert _compat.workers_of(loader) == []


def test_workers_of_a_loader_without_any():
    loader = DataLoader(TensorDataset(torch.arange(4)))
    next(iter(loader))
    assert _compat.workers_of(loader) == []


@pytest.mark.parametrize("namespace", PACKAGES)
def test_reset_iterator_of_a_combined_loader(namespace):
    loader = lightning(namespace).utilities.CombinedLoader([[1, 2, 3]], "max_size_cycle")
    iterator = iter(loader)
    next(iterator)
    assert len(loader) == 3
    _compat.reset_iterator(loader)
    with pytest.raises(RuntimeError, match="iter"):
        len(loader)


# ---------------------------------------------------------------------------------------------------------------------
# litdata


def test_streaming_environment_is_one_node():
    pytest.importorskip("litdata")
    env = _compat.streaming_environment(4, 3)
    assert (env.world_size, env.global_rank, env.num_nodes) == (4, 3, 1)


def test_share_among_workers_gives_each_a_part():
    pytest.importorskip("litdata")
    from litdata.streaming.item_loader import Interval

    intervals = [Interval(0, 0, 4, 4), Interval(4, 4, 8, 8)]
    numbers, parts = _compat.share_among_workers([0, 1], intervals, num_workers=2, batch_size=1)
    assert numbers == [[0], [1]]
    assert [[tuple(part) for part in worker] for worker in parts] == [[(0, 0, 4, 4)], [(4, 4, 8, 8)]]


def test_allow_http_endpoints_is_among_the_options_of_clients(monkeypatch):
    downloader = pytest.importorskip("litdata.streaming.downloader")
    monkeypatch.setattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})
    _compat.allow_http_endpoints()
    assert downloader._OBSTORE_CLIENT_OPTIONS == {"allow_http": "true"}


def test_merge_shards_writes_the_index_without_other_writers(tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    from litdata.streaming.writer import BinaryWriter

    monkeypatch.setenv("WORLD_SIZE", "2")
    writer = BinaryWriter(str(tmp_path), chunk_bytes=1 << 20)
    writer.add_item(0, (b"bytes", 0, "name"))
    writer.done()
    merging = threading.Thread(target=_compat.merge_shards, args=(writer,), daemon=True)
    merging.start()
    merging.join(30)
    assert (tmp_path / "index.json").is_file()


def test_pruned_weight_has_the_suffixes():
    layer = prune.identity(nn.Linear(2, 2), "weight")
    assert set(layer.state_dict()) == {"bias", *(f"weight{suffix}" for suffix in _compat.PRUNED_WEIGHT)}
