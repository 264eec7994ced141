"""Processes that are spawned: they get the data alone, and a pickled trick or module works as the original."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm
from helpers.datamodules import write_cifar, write_data
from helpers.fits import differences, make_trainer
from helpers.tricks import TRICKS
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Generator, Tensor

from lit_tricks import Classifier, Detector, Segmenter, callbacks, data

LOADERS = ("train", "val", "test", "predict")
IN_MEMORY = ("Digits", "DigitSegmentation", "DigitDetection", "CIFAR10", "CIFAR100")
MOST = 20_000  # bytes: of tens of paths and some settings


class Careful(pickle.Pickler):
    """Reject what must not go to a process that loads, or cannot: see torch's issues 31571 and 146828."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[int, int] = {}

    def reducer_override(self, it: Any) -> Any:
        assert not isinstance(it, Trainer | LightningModule | LightningDataModule | Generator), f"{type(it)} is pickled"
        if type(it) is Tensor and it.numel():
            assert not it.requires_grad
            owner = self.storages.setdefault(it.untyped_storage().data_ptr(), id(it))
            assert owner == id(it), "two tensors share one storage"
        return NotImplemented


class Sink:
    """Counts bytes."""

    size = 0

    def write(self, part: Any) -> int:
        self.size += len(part)
        return len(part)


def size_of_pickle(it: Any) -> int:
    sink = Sink()
    Careful(sink).dump(it)
    return sink.size


class Unpicklable(LightningModule):
    """A module that no process can receive."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.layer = torch.nn.Linear(1000, 1000)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
        root = tmp_path_factory.mktemp("data")
        yield write_data(root, write_cifar(root / "cifar"))


def attached(data_module: Any) -> Any:
    """A data module in a Trainer, as in a fit, with a module that does not pickle."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(Unpicklable())
    trainer.datamodule = data_module
    data_module.trainer = trainer
    return data_module


def loader_of(data_module: Any, split: str) -> Any:
    stage = {"train": "fit", "val": "validate"}.get(split, split)
    data_module.setup(stage)
    return getattr(data_module, f"{split}_dataloader")()


@pytest.mark.parametrize("split", LOADERS)
@pytest.mark.parametrize("name", data.__all__)
def test_workers_get_the_data_alone(name: str, split: str, written: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(Unpicklable())
    module = attached(getattr(data, name)(**written[name]))
    if split == "test" and not module.has_test:
        pytest.skip("no test split")
    loader = loader_of(module, split)
    next(iter(loader))  # what a worker gets must not depend on whether the main process has loaded
    sent = loader.dataset, loader.collate_fn, loader.worker_init_fn
    images = 1_000_000 if name in IN_MEMORY and split != "predict" else 0
    assert size_of_pickle(sent) < images + MOST
    assert len(pickle.loads(pickle.dumps(sent))[0]) == len(loader.dataset)


def batches(name: str, split: str, arguments: dict[str, Any], method: Any = None) -> list[Any]:
    """All batches of an epoch, loaded by a process that is started by this method, or by this one."""
    torch.manual_seed(5)
    module = attached(getattr(data, name)(**arguments | {"num_workers": 0 if method is None else 1}))
    loader = loader_of(module, split)
    if method is not None:
        loader.multiprocessing_context = method
    found = list(loader)
    if method is not None and (iterator := loader._iterator):
        iterator._shutdown_workers()  # the garbage collector would wait for the process, for 5 seconds
    return found


@pytest.mark.parametrize("split", ["train", "predict"])
@pytest.mark.parametrize("name", data.__all__)
def test_batches_of_a_forkserver(name: str, split: str, written: dict[str, dict[str, Any]]) -> None:
    if name.startswith("CIFAR") and split == "train":
        pytest.skip("another process compares the checksums of the files with the real ones")
    found, expected = (batches(name, split, written[name], method) for method in (warm.server(), None))
    assert not differences(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Tricks and modules


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_pickle_without_generators(name: str) -> None:
    trick = TRICKS[name].make()
    generators = {key: value.get_state() for key, value in vars(trick).items() if isinstance(value, Generator)}
    assert size_of_pickle(trick) < MOST
    copy = pickle.loads(pickle.dumps(trick))
    for key, state in generators.items():
        assert torch.equal(getattr(copy, key).get_state(), state)
        assert torch.equal(torch.rand(5, generator=getattr(copy, key)), torch.rand(5, generator=getattr(trick, key)))


def tiny(kind: type[LightningModule], **kwargs: Any) -> Any:
    net = {"depth": 18, "width": 0.0625, "small_input": True}
    where = {"backbone_args": net, "channels": 8, "head_width": 8} if kind is Detector else {"model_args": net}
    return kind(**({"num_classes": 3, "input_size": (3, 32, 32)} | where | kwargs))


class Own(Classifier):
    """With its own default, again a lambda, and one without."""

    def __init__(self, optimizer: Any = lambda p: torch.optim.Adam(p, lr=0.5), **kwargs: Any) -> None:
        super().__init__(optimizer=optimizer, **kwargs)


class Plain(Classifier):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("kind", "lr"), [(Classifier, 0.1), (Segmenter, 0.01), (Detector, 0.02), (Own, 0.5), (Plain, 0.1)]
)
def test_modules_pickle_with_their_default_optimizer(kind: type[LightningModule], lr: float) -> None:
    module = tiny(kind)
    copy = pickle.loads(pickle.dumps(module))
    for each in (module, copy):
        assert each.optimizer(each.parameters()).param_groups[0]["lr"] == lr
    given = tiny(kind, optimizer=partial(torch.optim.SGD, lr=0.3))
    assert pickle.loads(pickle.dumps(given)).optimizer(module.parameters()).param_groups[0]["lr"] == 0.3


@pytest.mark.full  # two processes that import torch and Lightning
@pytest.mark.filterwarnings("ignore")
def test_all_tricks_that_stack_in_ddp_spawn() -> None:
    torch.manual_seed(1)
    teacher = tiny(Classifier, num_classes=10, input_size=(1, 16, 16)).model
    tricks = [
        *(callbacks.ChannelsLast(), callbacks.Compile(backend="eager"), callbacks.CutMix(), callbacks.MixUp()),
        *(callbacks.LabelSmoothing(), callbacks.FocalLoss(), callbacks.KnowledgeDistillation(teacher, temperature=4)),
        *(callbacks.DropPath(), callbacks.EMA(0.5, validate="both"), callbacks.L1Penalty(), callbacks.LinearScaling()),
        *(callbacks.NoBiasDecay(), callbacks.PreciseBN(64), callbacks.ProgressiveResizing(multiple_of=4)),
        *(callbacks.TestTimeAugment(), callbacks.WarmupCosine(0), callbacks.XavierInit(), callbacks.ZeroGamma()),
    ]
    module = tiny(Classifier, num_classes=10, input_size=(1, 16, 16))
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    trainer = make_trainer(
        *tricks,
        strategy="ddp_spawn",
        devices=2,
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        logger=False,
        use_distributed_sampler=True,
    )
    trainer.fit(module, datamodule=data.Digits(image_size=16))
    assert {"val/top1", "raw/val/top1", "train/loss"} <= set(trainer.callback_metrics)
    after = dict(module.named_parameters())
    assert all(weight.isfinite().all() for weight in after.values())
    assert sum(not torch.equal(weight, before[name]) for name, weight in after.items()) > len(after) / 2
