"""Names that are private to other libraries: one function or class a name, with why it is needed and where it is.

Nothing else in lit_tricks reads a private name of another library (ruff's SLF001). ``tests/test_compat.py`` has a test
for each of these, which fails when a new version renames the name. They exist in the lowest versions that
pyproject.toml allows, except where a docstring gives a version.

Lightning is distributed as two packages, ``lightning`` and ``pytorch_lightning``, whose classes are not the same
objects. What works with both of them is here, too.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    import lightning.pytorch
    import pytorch_lightning
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader

    Callback = lightning.pytorch.Callback | pytorch_lightning.Callback
    LightningModule = lightning.pytorch.LightningModule | pytorch_lightning.LightningModule
    Trainer = lightning.pytorch.Trainer | pytorch_lightning.Trainer

__all__ = [
    "CLASS_PATH_KEY",
    "COMPILED_CALL",
    "INSTANTIATOR_KEY",
    "MODULE_REGISTRIES",
    "PRUNED_WEIGHT",
    "SPECTRAL_HOOK",
    "SPECTRAL_VECTORS",
    "TORCHVISION_LABELS",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "NormWithStatistics",
    "allow_http_endpoints",
    "apply_before_transfer_hook",
    "call_of",
    "callbacks_of",
    "calls_step_hooks",
    "clear_outdated_shards",
    "combined_loader",
    "compiled_call_of",
    "draw_dirichlet",
    "drop_anonymous_setting",
    "dummy_logger",
    "dump_weights",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_sign",
    "forward_pre_hooks_of",
    "has_iterator",
    "is_built_by_command_line",
    "is_compiled_by_lightning",
    "is_optimized_module",
    "is_overridden",
    "keep_scheduler_mark",
    "keep_unscaling",
    "leaves",
    "lightning_classes",
    "lightning_packages",
    "logging_step",
    "merge_shards",
    "new_shared_storage",
    "option_action",
    "overrides",
    "plain_torch_functions",
    "reset_iterator",
    "resize_antialiased_into",
    "saved_hparams",
    "saves_in_shards",
    "share_among_workers",
    "should_update_logs",
    "spectral_matrix",
    "spectral_norm_class",
    "stop_workers",
    "streaming_environment",
    "training_source",
    "unscales_in_step",
    "unwrapped_sampler",
    "was_skipped_by_scaler",
    "workers_of",
    "wrap_again_by_ddp",
]

Method = TypeVar("Method", bound=Callable[..., Any])


def overrides(base: type) -> Callable[[Method], Method]:
    """Mark a method that replaces a private method of a foreign class, where upstream has no public way.

    If the method were renamed upstream, ours would silently never be called.

    Raises:
        AttributeError: at import, if the class has no method of this name.
    """

    def check(method: Method) -> Method:
        getattr(base, method.__name__)
        return method

    return check


# ---------------------------------------------------------------------------------------------------------------------
# Two packages of Lightning


def lightning_packages() -> list[ModuleType]:
    """Return ``lightning.pytorch`` and ``pytorch_lightning``, if they are installed.

    Raises:
        ModuleNotFoundError: if neither of them is.
    """
    packages = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            packages.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    if not packages:
        raise ModuleNotFoundError("lit_tricks needs PyTorch Lightning: pip install lightning", name="lightning")
    return packages


def lightning_classes(path: str) -> tuple[type[Any], ...]:
    """Return a public class in every installed Lightning package, for ``isinstance``.

    Args:
        path: where the class is in the package, such as ``"Callback"`` or ``"callbacks.WeightAveraging"``.

    Raises:
        AttributeError: if a package has no such class.
    """
    return tuple(attrgetter(path)(package) for package in lightning_packages())


def is_overridden(name: str, pl_module: nn.Module) -> bool:
    """Return whether a LightningModule overrides a method of Lightning's base class."""
    method = getattr(type(pl_module), name)
    return name in vars(pl_module) or all(
        method is not getattr(cls, name) for cls in lightning_classes("LightningModule")
    )


def dummy_logger(trainer: Trainer) -> Any:
    """Return the logger that Lightning uses in a ``fast_dev_run``, of the Trainer's own package.

    The class is public, and in no public module.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loggers/logger.py#L51
    """
    packages = [package for package in lightning_packages() if isinstance(trainer, package.Trainer)]
    return packages[0].loggers.logger.DummyLogger()


# ---------------------------------------------------------------------------------------------------------------------
# Lightning: the Trainer


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks. The callback connector sets this attribute, so type checkers do not see it.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/connectors/callback_connector.py#L68
    """
    return trainer.callbacks  # type: ignore[union-attr, no-any-return]


def should_update_logs(trainer: Trainer) -> bool:
    """Return whether the loggers get what is logged in this batch, so that other batches need not compute it.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/connectors/logger_connector/logger_connector.py#L51
    """
    return trainer._logger_connector.should_update_logs


def logging_step(trainer: Trainer) -> int:
    """Return the step under which Lightning logs its own metrics: ``global_step`` counts all optimizers.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/training_epoch_loop.py#L94
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def combined_loader(loop: Any) -> Any:
    """Return the CombinedLoader of a fit or evaluation loop, None before the loop has set up its data.

    The public properties return the loaders without what combines them, and they may still have to be built.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/fit_loop.py#L107
    """
    return loop._combined_loader


def unwrapped_sampler(sampler: Any) -> Any:
    """Return the sampler that Lightning has wrapped for several processes, or the sampler itself.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/fabric/utilities/distributed.py#L343
    """
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def training_source(trainer: Trainer) -> Any:
    """Return the object that has the training loader: the loader itself, or the module or data module that builds it.

    Building the loader early would lose its state when the run resumes, so the public properties do not serve.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loops/fit_loop.py#L106
    """
    return trainer.fit_loop._data_source.instance


def dump_weights(trainer: Trainer) -> dict[str, Any]:
    """Return the content of a checkpoint without what only a run that continues needs.

    ``Trainer.save_checkpoint`` writes a file, and its content is to be changed before.
    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/trainer/connectors/checkpoint_connector.py#L415
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)


def wrap_again_by_ddp(strategy: Any, pl_module: LightningModule) -> None:
    """Wrap the module by DDP anew, which then averages the gradients of all parameters that need one now.

    DDP registers its hooks on parameters when it wraps a module. The hooks of the old wrapper would wait for gradients
    of a backward pass that does not run under it.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/parallel/distributed.py#L2620

    Args:
        strategy: a DDPStrategy that has wrapped the module.
        pl_module: the module itself.
    """
    strategy.model._remove_autograd_hooks()
    strategy.model = pl_module
    strategy.configure_ddp()


def saves_in_shards(trainer: Trainer) -> bool:
    """Return whether checkpoints are folders to which each process writes its own part of the weights.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/strategies/model_parallel.py#L94
    """
    strategy: Any = trainer.strategy
    is_parallel = isinstance(strategy, lightning_classes("strategies.ModelParallelStrategy"))
    return is_parallel and bool(strategy._save_distributed_checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning: modules


def apply_before_transfer_hook(pl_module: LightningModule, batch: Any) -> Any:
    """Call ``on_before_batch_transfer`` as Lightning does: from the module or the data module that defines it.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/module.py#L355
    """
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def is_compiled_by_lightning(pl_module: LightningModule) -> bool:
    """Return whether the module was given to the Trainer as ``torch.compile(module)``. Lightning unwraps it.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/module.py#L148
    """
    return pl_module._compiler_ctx is not None


def saved_hparams(owner: Any) -> dict[str, Any]:
    """Return what ``save_hyperparameters`` has saved. The property ``hparams`` would create an empty one.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/mixins/hparams_mixin.py#L175
    """
    return getattr(owner, "__dict__", {}).get("_hparams") or {}


CLASS_PATH_KEY = "_class_path"
"""Key under which LightningCLI saves the class of a module or data module among its hyperparameters.

https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/cli.py#L873
"""

INSTANTIATOR_KEY = "_instantiator"
"""Key under which Lightning saves how to build such an object again.

https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/mixins/hparams_mixin.py#L36
"""


def is_built_by_command_line() -> bool:
    """Return whether LightningCLI is building an object: its arguments are then plain text and numbers.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/core/mixins/hparams_mixin.py#L30
    """
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

    return bool(_given_hyperparameters.get())


# ---------------------------------------------------------------------------------------------------------------------
# torch: modules

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of all BatchNorm layers, including SyncBatchNorm and layers of other libraries.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/batchnorm.py#L152
"""

NormWithStatistics = nn.modules.batchnorm._NormBase
"""Base class of BatchNorm and InstanceNorm.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/batchnorm.py#L25
"""

Convolution = nn.modules.conv._ConvNd
"""Base class of all convolutions.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/conv.py#L55
"""

Dropout = nn.modules.dropout._DropoutNd
"""Base class of all dropout layers.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/dropout.py#L17
"""

MODULE_REGISTRIES = ("_parameters", "_modules")
"""Attributes in which a module keeps its parameters and submodules, to be left out of a copy of its other attributes.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/module.py#L506
"""

COMPILED_CALL = "_compiled_call_impl"
"""Attribute of a module that replaces its call. ``nn.Module.compile`` sets it, and nothing public resets it.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/module.py#L3062
"""


def compiled_call_of(module: nn.Module) -> Callable[..., Any] | None:
    """Return the compiled call of a module, if ``nn.Module.compile`` was called.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/module.py#L480
    """
    return module._compiled_call_impl


def call_of(module: nn.Module) -> Callable[..., Any]:
    """Return what calling a module runs, hooks included: what ``nn.Module.compile`` compiles.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/modules/module.py#L1787
    """
    call: Callable[..., Any] = module._call_impl
    return call


def forward_pre_hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks before ``forward``. The older ``spectral_norm`` of torch is one, with the name of its weight.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/spectral_norm.py#L179
    """
    return list(module._forward_pre_hooks.values())


def spectral_norm_class() -> type[nn.Module]:
    """Return the class that ``torch.nn.utils.parametrizations.spectral_norm`` registers: its vectors are buffers.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/parametrizations.py#L403
    """
    return torch.nn.utils.parametrizations._SpectralNorm


PRUNED_WEIGHT = ("_orig", "_mask")
"""Suffixes that ``torch.nn.utils.prune`` adds to the name of a weight: the parameter before the mask, and the mask.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/prune.py#L204
"""

SPECTRAL_HOOK = ("_orig", "_u", "_v")
"""Suffixes that the older ``spectral_norm`` of torch adds to the name of a weight: the parameter, and the two vectors.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/spectral_norm.py#L84
"""

SPECTRAL_VECTORS = ("_u", "_v")
"""Buffers of a ``spectral_norm_class``: the left and the right vector. One of a vector has none.

https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/parametrizations.py#L434
"""


TORCHVISION_LABELS = ("_labels", "_samples")
"""Labels, or pairs of a file and its label, of torchvision's data sets that have no ``targets``.

https://github.com/pytorch/vision/blob/v0.29.1/torchvision/datasets/flowers102.py#L65
"""


def spectral_matrix(parametrization: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight as the matrix whose norm a ``spectral_norm_class`` takes.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/utils/parametrizations.py#L441
    """
    matrix: Tensor = parametrization._reshape_weight_to_matrix(weight)  # type: ignore[operator]
    return matrix


def is_optimized_module(module: nn.Module) -> bool:
    """Return whether a module is what ``torch.compile(module)`` returns. The class is in no public module.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/_dynamo/eval_frame.py#L469
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and no module is compiled without it
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


# ---------------------------------------------------------------------------------------------------------------------
# torch: tensors


def leaves(tree: Any) -> list[Any]:
    """Return what is in nested lists, tuples, dicts and other containers. torch has no public module for trees.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/utils/_pytree.py#L1527
    """
    return torch.utils._pytree.tree_leaves(tree)


def plain_torch_functions() -> AbstractContextManager[None]:
    """Run torch functions on tensors of a subclass without calling its ``__torch_function__``.

    The public ``torch.overrides`` has no such context. ``Tensor.__torch_function__`` uses this one.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/_tensor.py#L1539
    """
    return torch._C.DisableTorchFunctionSubclass()


def foreach_copy_(tensors: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
    """Copy tensors, with one kernel for many of them. torch's own optimizers use the ``_foreach`` functions.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/asgd.py#L399
    """
    torch._foreach_copy_(list(tensors), list(sources), non_blocking)


def foreach_lerp_(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Interpolate tensors in place, with one kernel for many of them.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/adam.py#L704
    """
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def foreach_sign(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the signs of tensors, computed with one kernel for many of them.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/rprop.py#L373
    """
    return list(torch._foreach_sign(list(tensors)))


def foreach_mul_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar tensor, with one kernel for many of them.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/adam.py#L708
    """
    torch._foreach_mul_(list(tensors), factor)


def foreach_add_(tensors: Sequence[Tensor], terms: Sequence[Tensor], alpha: float = 1) -> None:
    """Add ``alpha`` times a term to each tensor in place, with one kernel for many of them.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/sgd.py#L427
    """
    torch._foreach_add_(list(tensors), list(terms), alpha=alpha)


def draw_dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from Dirichlet distributions. ``torch.distributions`` takes no generator.

    https://github.com/pytorch/pytorch/issues/45115
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/distributions/dirichlet.py#L26
    """
    return torch._sample_dirichlet(concentration, generator=generator)


def new_shared_storage(size: int) -> torch.UntypedStorage:
    """Return memory that processes share, as ``default_collate`` does. ``share_memory_`` would copy.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/utils/data/_utils/collate.py#L273
    """
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    return storage


def resize_antialiased_into(out: Tensor, images: Tensor, y_scale: float, x_scale: float) -> None:
    """Resize bilinearly into a tensor. ``F.interpolate`` takes a size or scales, not both, and allocates.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/nn/functional.py#L5257
    """
    torch.ops.aten._upsample_bilinear2d_aa.out(images, list(out.shape[-2:]), False, y_scale, x_scale, out=out)


# ---------------------------------------------------------------------------------------------------------------------
# torch: optimizers and gradient scalers


def calls_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether ``step`` calls the hooks of ``register_step_post_hook``. Some wrappers do not.

    ``torch.optim.Optimizer.__init__`` marks ``step`` when it makes it call hooks.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/optimizer.py#L584
    """
    return getattr(type(optimizer).step, "hooked", False)


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Return whether a gradient scaler leaves it to the optimizer to unscale gradients. Fused ones do it in ``step``.

    Other optimizers do not have the attribute.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/amp/grad_scaler.py#L418
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def keep_scheduler_mark(step: Any, replacement: Any) -> None:
    """Mark what replaces the step of an optimizer as wrapped by schedulers, if the step was. They warn otherwise.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/optim/lr_scheduler.py#L171
    """
    if hasattr(step, "_wrapped_by_lr_sched"):
        replacement._wrapped_by_lr_sched = True


class _Unscaling:
    """Keeps a gradient scaler from leaving it to an optimizer to unscale gradients, until it is removed."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._attributes = vars(optimizer)
        self._before = self._attributes.get("_step_supports_amp_scaling")
        self._attributes["_step_supports_amp_scaling"] = False

    def remove(self) -> None:
        """Restore what the optimizer had."""
        if self._before is None:
            self._attributes.pop("_step_supports_amp_scaling", None)
        else:
            self._attributes["_step_supports_amp_scaling"] = self._before


def keep_unscaling(optimizer: Optimizer) -> Any:
    """Let a gradient scaler unscale the gradients of an optimizer before its step, also of a fused one.

    Returns a handle whose ``remove`` restores the optimizer. The scaler reads the attribute of ``unscales_in_step``.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/amp/grad_scaler.py#L418
    """
    return _Unscaling(optimizer)


def was_skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether the step in progress changes nothing, as a gradient scaler has found an overflow.

    A gradient scaler does not call other optimizers at all then. It sets the attribute on fused ones, for their step.
    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/amp/grad_scaler.py#L464
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


# ---------------------------------------------------------------------------------------------------------------------
# Loaders of torch, torchdata and Lightning


def has_iterator(loader: Any) -> bool:
    """Return whether a loader of torchdata has begun an epoch. Its ``state_dict`` would start the workers.

    https://github.com/meta-pytorch/data/blob/v0.11.0/torchdata/stateful_dataloader/stateful_dataloader.py#L367
    """
    return loader._iterator is not None


def reset_iterator(loader: Any) -> None:
    """Let a DataLoader or CombinedLoader start anew. Persistent workers keep the data set that they were given.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/utils/data/dataloader.py#L429
    """
    if loader._iterator is not None:
        loader._iterator = None


def workers_of(loader: DataLoader[Any]) -> list[BaseProcess]:
    """Return the processes of the iterator that a loader keeps, to find out if one was killed.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/utils/data/dataloader.py#L1140
    """
    iterator: Any = loader._iterator
    return [] if iterator is None or not loader.num_workers else list(iterator._workers)


def stop_workers(loader: DataLoader[Any]) -> None:
    """Stop the processes of ``workers_of``, and let torch's signal handler forget them: it would raise once more.

    https://github.com/pytorch/pytorch/blob/v2.14.1/torch/utils/data/dataloader.py#L1608
    """
    iterator: Any = loader._iterator
    if iterator._worker_pids_set:
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False
    iterator._shutdown_workers()


# ---------------------------------------------------------------------------------------------------------------------
# litdata, which is optional


def streaming_environment(world_size: int, rank: int) -> Any:
    """Return litdata's description of the processes, as one node. It would otherwise split shards among nodes.

    https://github.com/Lightning-AI/litData/blob/v0.2.76/src/litdata/utilities/env.py#L21
    """
    from litdata.utilities.env import _DistributedEnv

    return _DistributedEnv(world_size, rank, 1)


def share_among_workers(numbers: Any, intervals: Any, num_workers: int, batch_size: int) -> Any:
    """Return the share the shards of a process among its workers, as litdata does.

    https://github.com/Lightning-AI/litData/blob/v0.2.76/src/litdata/utilities/shuffle.py#L257
    """
    from litdata.utilities.shuffle import _associate_chunks_and_intervals_to_workers

    process = streaming_environment(1, 0)
    return _associate_chunks_and_intervals_to_workers(process, numbers, intervals, False, num_workers, batch_size)


def allow_http_endpoints() -> None:
    """Let litdata read from endpoints of S3 without TLS, such as a local MinIO. boto3 does so by default.

    https://github.com/Lightning-AI/litData/blob/v0.2.76/src/litdata/streaming/downloader.py#L206
    """
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"


def clear_outdated_shards(folder: str, stamp: str) -> None:
    """Remove a folder in which litdata keeps shards of a bucket, unless the shards have this time stamp.

    https://github.com/Lightning-AI/litData/blob/v0.2.76/src/litdata/utilities/dataset_utilities.py#L281
    """
    from litdata.utilities.dataset_utilities import _clear_cache_dir_if_updated

    _clear_cache_dir_if_updated(folder, stamp)


def merge_shards(writer: Any) -> None:
    """Write the index of shards. ``merge`` would wait for ``WORLD_SIZE`` writers.

    https://github.com/Lightning-AI/litData/blob/v0.2.76/src/litdata/streaming/writer.py#L814
    """
    writer._merge_no_wait()


# ---------------------------------------------------------------------------------------------------------------------
# Lightning: loggers


def drop_anonymous_setting(logger: Any) -> None:
    """Leave an unset ``anonymous`` out of what a WandbLogger gives to W&B, which warns of the setting in any case.

    https://github.com/Lightning-AI/pytorch-lightning/blob/2.6.6/src/lightning/pytorch/loggers/wandb.py#L345
    """
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)


# ---------------------------------------------------------------------------------------------------------------------
# argparse, of which jsonargparse is an extension


def option_action(parser: Any, flag: str) -> Any:
    """Return what a parser does for a flag, or None. LightningCLI does not pass on what ``add_argument`` returns.

    https://github.com/python/cpython/blob/v3.13.0/Lib/argparse.py#L1403
    """
    return parser._option_string_actions.get(flag)
