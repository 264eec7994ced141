"""FixRes: fine-tune the last layers of a trained network at the test size (Touvron et al., 2019).

One caveat: all other layers keep their weights, so the fit has to start from a trained network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim.lr_scheduler import CyclicLR

from lit_tricks._compat import leaves
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.finetuning.eval_transform import EvalTransforms
from lit_tricks.callbacks.finetuning.freezing import Frozen, reject_conflicts
from lit_tricks.callbacks.optim.initializer import sign_of_training
from lit_tricks.callbacks.optim.lr_factors import is_one_cycle, set_base_lr
from lit_tricks.callbacks.optim.param_groups import Group, groups_of, on_each_group, optimizers_in
from lit_tricks.utils.arguments import MAX_SIDE, choice, flag, integer, invalid, number, text
from lit_tricks.utils.batch import reject_boxes
from lit_tricks.utils.image_size import require_fit, require_size
from lit_tricks.utils.modes import changed_in_evaluation
from lit_tricks.utils.modules import find_heads, find_norms, is_norm, require_initialized

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["FixRes"]


class FixRes(Trick):
    """Fine-tune the classifier and the last BatchNorm at the test size ([Touvron et al., 2019](https://arxiv.org/abs/1906.06423)).

    Objects look larger in random training crops than in the center crop of a test image. A larger test size compensates
    for this, but changes the statistics of the features before the classifier. This trick trains only the classifier
    and the last BatchNorm, at the test size. All other layers are frozen in evaluation mode. Training, validation, test
    and prediction images get the evaluation transform at ``test_size``. The transform is the data module's
    ``eval_transform_at(test_size)`` if there is one. Otherwise it is the validation data set's ``transform``, with its
    resize and center crop scaled to the size. With the data modules of lit_tricks, checkpoints store the size, and
    ``lit-tricks test`` uses it.

    Cost: per step, a forward pass at the new size and a backward pass through the trained layers. Use it on a trained
    network for a few epochs, at 1.15 to 1.3 times the training size. Leave it out if the training used no random crops,
    if the test size is already larger than the training size, and for transformers whose position embeddings fit only
    one size. FixRes starts from the weights of the first training: ``--model.weights best.ckpt``.

    Args:
        test_size: side of the images in pixels. None uses the images as they come, and switches no transform.
        lr: learning rate of all parameter groups, above 0. The paper's 0.008 is for SGD with 512 images per step. None
            keeps the module's own learning rate.
        train_bn: BatchNorm layers that update their running statistics at the test size: "last", "all", or "none".
        train_affine: whether the scales and shifts of these layers are also trained, as in the text of the paper. False
            updates only their running statistics, as in the paper's published code.
        transform: "test", or "test+flip", which flips half of the training images. In Python also a function, which
            replaces the ``transform`` of all data sets.
        classifier: name of the module that returns the logits, if it is not the last linear layer.
        batch_norm: name of the trunk's last BatchNorm, if it is not the one that is defined last.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if these layers or the transform are missing, the network cannot take the
            size, or a OneCycleLR or CyclicLR of the module ignores ``lr``; in the first batch, if its images have
            another size, or the layers do not take part in the loss.

    Example:
        ``- {class_path: FixRes, init_args: {test_size: 288}}``
    """

    fine_tunes = True
    transient: ClassVar[tuple[str, ...]] = ("_run",)
    _run: _Run | None = None

    def __init__(
        self,
        test_size: int | None,
        lr: float | None = 0.008,
        train_bn: Literal["last", "none", "all"] = "last",
        train_affine: bool = True,
        transform: Literal["test", "test+flip"] | Callable[[Any], Any] = "test",
        classifier: str | None = None,
        batch_norm: str | None = None,
    ) -> None:
        self.test_size: int | None = integer(
            self, "test_size", test_size, 1, "Give a number of pixels.", most=MAX_SIDE, or_none="the loaders' size"
        )
        fix = "0.008 is the paper's."
        self.lr: float | None = number(self, "lr", lr, "(0, 1e6]", fix, or_none="the module's own learning rate")
        self.train_bn: str = choice(self, "train_bn", train_bn, ("last", "none", "all"))
        self.train_affine: bool = flag(self, "train_affine", train_affine)
        fix = "A function of an image is legal too."
        self.transform: Callable[[Any], Any] | str = (
            transform if callable(transform) else choice(self, "transform", transform, ("test", "test+flip"), fix)
        )
        fix = "Name a module, such as 'model.fc'."
        self.classifier: str | None = text(self, "classifier", classifier, fix, or_none="the last layer with a weight")
        fix = "Name a module, such as 'model.bn2'."
        self.batch_norm: str | None = text(
            self, "batch_norm", batch_norm, fix, or_none="the last one before the classifier"
        )
        if test_size is None and transform != "test":
            raise invalid(
                self,
                "without a test size the loaders keep their transforms. Give test_size, or leave transform out.",
                test_size=test_size,
                transform=transform,
            )
        if batch_norm is not None and train_bn != "last":
            raise invalid(
                self,
                "batch_norm names the last one, and train_bn is not 'last'. Leave one of them out.",
                batch_norm=batch_norm,
                train_bn=train_bn,
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of loaders, and the strategy's setup of the module.

        Raises:
            RuntimeError: if another callback freezes layers, drops branches, or changes sizes.
        """
        self._run = _Run()
        if self.test_size is not None:
            self._run.data = EvalTransforms(trainer, self.test_size, self.transform)
            # No hook runs between a loader's creation and the start of its workers.
            self.wrap(trainer.strategy, "process_dataloader", self._run.data.around)
        if stage == "fit":
            reject_conflicts(trainer, self)
            # No hook runs between configure_model and the strategy, which wraps the module.
            self.wrap(trainer.strategy, "setup", partial(self._freeze, pl_module))
            # LinearScaling scales the groups as they are added, in any order of the list.
            self.wrap(pl_module, "configure_optimizers", self._with_rate)
            # Weights-only checkpoints skip the hooks of callbacks.
            self.wrap(pl_module, "on_save_checkpoint", partial(self._with_size, trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise if the fit resumes a run without FixRes.

        Raises:
            RuntimeError: if the checkpoint is from the run that trained the weights.
        """
        if trainer.state.fn == "fit" and self.state_key not in checkpoint["callbacks"]:
            raise RuntimeError(
                "FixRes fine-tunes in a separate run, and the checkpoint to resume is from a run without FixRes. Load "
                "only the weights, with --model.weights instead of --ckpt_path."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the trained layers, and warn if the weights look random.

        Raises:
            RuntimeError: if the network does not support images of this size.
        """
        run = self._now
        if self.test_size is not None:
            require_fit(pl_module, (self.test_size, self.test_size), None, f"FixRes(test_size={self.test_size})")
        names = [f"{name} ({kind})" for kind, layers in run.trained.items() for name in layers]
        shown = ", ".join(names if len(names) < 5 else [*names[:3], f"... ({len(names)} layers)", names[-1]])
        rates = {float(group["lr"]) for group in groups_of(trainer.optimizers) if "lr" in group}
        at = f" at {self.test_size} pixels" if self.test_size else ""
        self.announce(f"trains {shown}{at}, lr {', '.join(f'{lr:g}' for lr in sorted(rates))}; all else is frozen")
        has_norms = any(map(is_norm, pl_module.modules()))
        if has_norms and not sign_of_training(pl_module, set(pl_module.parameters())):
            rank_zero_only(warnings.warn)(
                f"FixRes fine-tunes a trained network, and {type(pl_module).__name__} looks as if it had random "
                "weights: its norm layers are as they start. Load weights, as with --model.weights best.ckpt.",
                stacklevel=2,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the BatchNorm layers, after the last replacement of layers."""
        run = self._now
        run.norms = [pl_module.get_submodule(name) for name in run.trained[_NORM]]
        run.steps = [int(norm.num_batches_tracked) for norm in run.norms]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set all except the trained layers to evaluation mode again, after any call of ``train()``."""
        run = self._now
        run.frozen.hold()
        if not run.seen:
            self._require_size(batch)
        if self.should_log(trainer):
            pl_module.log("fixres/parameters", float(run.parameters))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Raise if the loss does not depend on the trained parameters.

        Raises:
            RuntimeError: if not.
        """
        if not loss.requires_grad:
            names = [name for layers in self._now.trained.values() for name in layers]
            raise RuntimeError(
                f"FixRes trains {', '.join(names)}, and the loss of {type(pl_module).__name__} depends on none of it: "
                'name the layers that end the network, as FixRes(classifier="model.fc", batch_norm="model.bn2").'
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise if the trained layers are unused, or other layers left evaluation mode.

        Raises:
            RuntimeError: if not.
        """
        run, name = self._now, type(pl_module).__name__
        if loose := run.frozen.loose():
            raise RuntimeError(
                f"FixRes holds a {type(loose).__name__} in evaluation mode, and training_step of {name} puts it into "
                "training mode: call train() before the step, if at all."
            )
        if run.seen or not (outputs or not pl_module.automatic_optimization):  # a batch that the module skipped
            return
        run.seen = True
        for norm, steps, layer in zip(run.norms, run.steps, run.trained[_NORM], strict=True):
            if int(norm.num_batches_tracked) == steps:
                raise RuntimeError(
                    f"FixRes took {layer} for the last BatchNorm of {name}, and the first training step did not run "
                    'it: name the one that is, as FixRes(batch_norm="model.bn2"), or give train_bn="none".'
                )
        heads = [pl_module.get_submodule(layer) for layer in run.trained[_HEAD]]
        gradients = [param.grad for head in heads for param in head.parameters() if param.requires_grad]
        if pl_module.automatic_optimization and all(gradient is None for gradient in gradients):
            raise RuntimeError(
                f"FixRes took {', '.join(run.trained[_HEAD])} for the classifier of {name}, and the first training "
                'step gave it no gradient: name the one that is, as FixRes(classifier="model.fc").'
            )

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Raise if images do not have the test size."""
        if batch_idx == 0:
            self._require_size(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """Return the size."""
        return {"test_size": self.test_size}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the evaluation size in the settings of the data, also in checkpoints after the fit."""
        settings = checkpoint.get("datamodule_hyper_parameters", {})
        if self.test_size is not None and "eval_size" in settings:
            settings["eval_size"] = self.test_size

    # The wrappers: each is called instead of a method

    def _freeze(self, pl_module: LightningModule, setup: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Freeze the module before the strategy wraps it and optimizers are built."""
        run = self._now
        require_initialized(pl_module, "FixRes")
        if (name := changed_in_evaluation(pl_module)) is not None:
            raise RuntimeError(
                f"FixRes holds the trunk in evaluation mode, in which {type(pl_module).__name__} changes {name!r}, as "
                "adapters do: merge them for good, and load the result."
            )
        heads = find_heads(pl_module, self.classifier)
        norms = find_norms(pl_module, self.train_bn, self.batch_norm)
        run.trained = {_HEAD: list(heads), _NORM: list(norms)}
        affine = {param for norm in norms.values() for param in norm.parameters()}
        trained = {param for head in heads.values() for param in head.parameters()} - affine
        trained |= affine if self.train_affine else set()
        run.parameters = sum(param.numel() for param in trained)
        run.frozen = Frozen(pl_module, [*heads, *norms], trained)
        return setup(*args, **kwargs)

    def _with_rate(self, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def set_rate(optimizer: Optimizer, group: Group, add_param_group: Callable[[Group], None]) -> None:
            # before the group is added, since LinearScaling scales added groups, in any order of the two callbacks
            old = group.get("lr", optimizer.defaults.get("lr"))
            if self.lr is not None and old is not None:
                set_base_lr(group, torch.full_like(old, self.lr) if isinstance(old, Tensor) else self.lr)
            add_param_group(group)

        with on_each_group(set_rate):
            configured = configure_optimizers(*args, **kwargs)
        parts = leaves(configured)
        cyclic = any(isinstance(part, CyclicLR) for part in parts)
        if self.lr is not None and (cyclic or any(map(is_one_cycle, groups_of(optimizers_in(configured))))):
            raise RuntimeError(
                f"FixRes(lr={self.lr:g}): a scheduler in configure_optimizers ignores the optimizer's learning rate. "
                "Return only the optimizer, or give FixRes(lr=None) and set the learning rates of the scheduler."
            )
        return configured

    def _with_size(self, trainer: Trainer, on_save_checkpoint: Callable[..., Any], checkpoint: dict[str, Any]) -> Any:
        """Save the state also in weights-only checkpoints, which skip the hooks of callbacks."""
        self.on_save_checkpoint(trainer, trainer.lightning_module, checkpoint)
        return on_save_checkpoint(checkpoint)

    # Helpers

    def _require_size(self, batch: Any) -> None:
        reject_boxes(batch, "FixRes", "the classifier of whole images")
        if self.test_size is not None:
            remedy = (
                "the transform of its data set is none that FixRes can resize. Give FixRes(transform=...), a function "
                "that resizes; or let the loaders give the size, with FixRes(test_size=None)."
            )
            require_size(batch, self.test_size, "FixRes", remedy)

    @property
    def _now(self) -> _Run:
        assert self._run is not None
        return self._run

    def unwrap(self) -> None:
        """Also restore data sets, modes and what is trained."""
        super().unwrap()
        run, self._run = self._run, None
        for changed in (run.data, run.frozen) if run else ():
            if changed:
                changed.restore()


_HEAD, _NORM = "classifier", "BatchNorm"


@dataclass
class _Run:
    """The state of one run of the Trainer."""

    data: Any = None
    frozen: Any = None
    trained: dict[str, list[str]] = field(default_factory=dict)  # names of the layers, by their kind
    parameters: int = 0
    norms: list[Any] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # that the layers had counted before
    seen: bool = False  # whether a whole step is done
