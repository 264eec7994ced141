"""Base of the tricks that freeze parts of a network for a share of the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_tricks._compat import callbacks_of, lightning_classes, wrap_again_by_ddp
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.finetuning.held import HeldPart, thawed
from lit_tricks.utils.checkpoint_files import checkpoint_without_weights
from lit_tricks.utils.modes import changed_in_evaluation
from lit_tricks.utils.modules import find_heads, is_flattened, require_initialized, some_of
from lit_tricks.utils.parts import Part, find_part, parts_of
from lit_tricks.utils.training_length import TrainingLength, steps_done

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Freezing", "Stage"]


@dataclass
class Stage:
    """A part of the network that is frozen until a scheduled time.

    Args:
        patterns: names or patterns of modules and parameters.
        until: time of unfreezing, in epochs or as a share of the run. None is the end of the run.
        name: name of its parameter group.
        lr_factor: factor on the learning rate of its parameters.
    """

    patterns: list[str]
    until: float | None
    name: str = ""
    lr_factor: float = 1.0


class Freezing(Trick):
    """Freezes parts of the network, each until its scheduled time.

    Only the number of the step determines whether a part is frozen, so nothing is saved and nothing can drift. The
    optimizers are built as without the trick, with all parameters. Frozen parameters have no gradient, so optimizers
    change neither the parameters nor their momentum.
    """

    conflict_with_frozen = "freezes layers, as FixRes does"
    fine_tunes = True
    transient = ("_fit",)
    _fit: _Fit | None = None

    _trained: tuple[bool, ...] = ()  # whether optimizers have a state of the parts

    unit: Literal["epochs", "run"]
    train_bn: bool

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the frozen parts with their times."""

    @abstractmethod
    def shown(self) -> str:
        """Return the call of the trick with the argument that names the parts, for messages."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare to freeze, once the module is built and before the strategy wraps it.

        Raises:
            RuntimeError: if another callback freezes layers in its own way.
        """
        if stage != "fit":
            return
        self._fit, self._trained = _Fit(), ()
        for other in callbacks_of(trainer):
            if isinstance(other, lightning_classes("callbacks.BaseFinetuning")):
                name = type(other).__name__
                raise RuntimeError(f"{type(self).__name__} and {name} both freeze layers. Remove one of the two.")
        # No hook runs between configure_model and the strategy, which wraps the module.
        self.wrap(trainer.strategy, "setup", partial(self._freeze, trainer, pl_module))
        if isinstance(trainer.strategy, lightning_classes("strategies.ModelParallelStrategy")):
            # torch restores the state only of parameters that need a gradient.
            self.wrap(trainer.strategy, "load_checkpoint", self._load)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the strategy supports freezing, and that the optimizers have the parameters.

        Raises:
            RuntimeError: if one of these conditions fails.
        """
        name, strategy = type(self).__name__, type(trainer.strategy).__name__
        deepspeed = isinstance(trainer.strategy, lightning_classes("strategies.DeepSpeedStrategy"))
        if deepspeed or is_flattened(trainer.strategy.model or pl_module):
            raise RuntimeError(
                f"{name}: {strategy} keeps the weights in other tensors than their parameters. Use DDP, or FSDP2 "
                "(ModelParallelStrategy)."
            )
        given = {p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for frozen, held in self._now.parts:
            missing = [each for each in held.parameters if pl_module.get_parameter(each) not in given]
            if frozen.until is not None and missing:
                raise RuntimeError(
                    f"{self.shown()} is to train {some_of(missing)} later, and no optimizer of "
                    f"{type(pl_module).__name__} has them. Build the optimizer with all parameters."
                )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            for optimizer in trainer.optimizers:
                if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
                    raise RuntimeError(
                        f"{self.shown()} leaves nothing to train to an optimizer ({type(optimizer).__name__}), which "
                        "a gradient scaler does not allow. Use precision bf16-mixed, or freeze less."
                    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert times to steps, freeze the parts of this step, and log the result."""
        fit = self._now
        stages = [stage for stage, _ in fit.parts]
        clock = TrainingLength(
            type(self).__name__, "Trainer(max_epochs=..., limit_train_batches=...)", "Trainer(max_epochs=...)"
        )
        clock.measure(trainer, pl_module)
        fit.length = clock.run if clock.knows_run else None
        fit.steps = [None if stage.until is None else self._step(stage.until, clock) for stage in stages]
        if not fit.begun:  # a tuner trains within the fit
            fit.begun, fit.optimizers = True, trainer.optimizers
            for _, held in fit.parts:
                for part in held.modules():
                    # No hook follows all calls of train(), such as calls in a training step.
                    self.wrap(part, "train", partial(held.train, part))
        self._follow(trainer, pl_module)
        self.announce(self._effect(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Unfreeze parts whose time has come, keep the other parts in evaluation mode, and log the trained share."""
        self._follow(trainer, pl_module)
        if self.should_log(trainer):
            pl_module.log(f"{type(self).__name__.lower()}/trained", self._trained_share(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check that the loss depends on trained parameters.

        Raises:
            RuntimeError: if the loss depends on frozen parameters only.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                f"{self.shown()}: the loss of {type(pl_module).__name__} depends on frozen parameters only. Freeze "
                "less."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that frozen modules stayed in evaluation mode.

        Raises:
            RuntimeError: if a frozen module is in training mode.
        """
        for _, held in self._now.parts:
            if (loose := held.loose()) is not None:
                raise RuntimeError(
                    f"{type(self).__name__} holds a {type(loose).__name__} in evaluation mode, and the training step "
                    f"of {type(pl_module).__name__} sets its `training`. Call train() instead."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return which parts have been trained. Only sharded checkpoints need it."""
        if self._fit and self._fit.begun:
            states = {
                parameter for optimizer in self._fit.optimizers for parameter, state in optimizer.state.items() if state
            }
            self._trained = tuple(
                any(parameter in states for parameter in held.find_parameters()) for held in self.held_parts()
            )
        return {"trained": list(self._trained)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore which parts have been trained."""
        self._trained = tuple(state_dict["trained"])

    def unwrap(self) -> None:
        """Also restore modes, and which parameters need a gradient."""
        super().unwrap()
        self.state_dict()
        fit, self._fit = self._fit, None
        for _, held in fit.parts if fit else ():
            held.release()

    # Called instead of methods

    def _freeze(
        self, trainer: Trainer, pl_module: LightningModule, setup: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Freeze all parts before the strategy wraps the module."""
        require_initialized(pl_module, type(self).__name__)
        fit = self._now
        others = [other for other in callbacks_of(trainer) if isinstance(other, Freezing) and other is not self]
        frozen_by = {name: other for other in others for held in other.held_parts() for name in held.parameters}
        with thawed(held for other in others for held in other.held_parts()):  # the order of the tricks does not matter
            found = self._find(pl_module)
        for stage, part in found:
            if shared := [name for name in part.parameters if name in frozen_by]:
                other = frozen_by[shared[0]].shown()
                raise RuntimeError(f"{self.shown()} and {other} both freeze {shared[0]}. Name it in one of them.")
            fit.parts.append((stage, HeldPart(pl_module, part)))
        held_parts = [held for _, held in fit.parts]
        if not any(held.parameters for held in held_parts):
            raise RuntimeError(
                f"{self.shown()} has no effect: {type(pl_module).__name__} has frozen these parts itself. Remove "
                f"{type(self).__name__}."
            )
        frozen = {name for held in held_parts for name in held.parameters}
        if (changed := changed_in_evaluation(pl_module)) in frozen:
            raise RuntimeError(
                f"{self.shown()} holds layers in evaluation mode, in which {type(pl_module).__name__} changes "
                f"{changed!r}, as adapters do. Merge them for good, and load the result."
            )
        for held in held_parts:
            held.freeze()
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise RuntimeError(f"{self.shown()} leaves nothing to train. Name fewer parts.")
        # The optimizers are built with all parameters, also by modules that leave out what needs no gradient. This
        # wrapper is outside of the wrappers of all other tricks, which search for the classifier among what is trained.
        self.wrap(pl_module, "configure_optimizers", partial(self._configure, pl_module))
        return setup(*args, **kwargs)

    def _configure(
        self, pl_module: LightningModule, configure_optimizers: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        for held in self.held_parts():
            held.find_parameters()
        with thawed(self.held_parts()):
            return configure_optimizers(*args, **kwargs)

    def _load(self, load_checkpoint: Callable[..., Any], checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint while the parts without optimizer state in the checkpoint are frozen."""
        state = checkpoint_without_weights(checkpoint_path).get("callbacks", {}).get(self.state_key, {})
        with thawed(
            held for held, trained in zip(self.held_parts(), state.get("trained", []), strict=False) if trained
        ):
            return load_checkpoint(checkpoint_path, *args, **kwargs)

    # Helpers

    def _find(self, pl_module: LightningModule) -> list[tuple[Stage, Part]]:
        """Find the parts of each stage. A layer in two parts belongs to the part with fewer parameters."""
        name = type(pl_module).__name__
        found: list[tuple[Stage, list[Part]]] = []
        for stage in self.stages():
            parts = []
            for pattern in stage.patterns:
                try:
                    part = find_part(pl_module, pattern, partial(_classifier, pl_module))
                except LookupError:
                    raise RuntimeError(
                        f"{self.shown()}: {name} has no part {pattern!r}. Its parts are {parts_of(pl_module)}. "
                        "Patterns such as 'model.layer[12]' and 'backbone' are legal, too."
                    ) from None
                parts.append(part.without_batchnorms(pl_module) if self.train_bn else part)
            found.append((stage, parts))
        result: list[tuple[Stage, Part]] = []
        parameters: set[str] = set()
        modules: set[str] = set()
        for stage, parts in sorted(found, key=lambda pair: sum(len(part.parameters) for part in pair[1])):
            whole = Part(
                list(dict.fromkeys(name for part in parts for name in part.found)),
                list(dict.fromkeys(name for part in parts for name in part.parameters)),
                list(dict.fromkeys(name for part in parts for name in part.modules)),
            ).without(parameters, modules)
            if not whole.parameters:
                raise RuntimeError(
                    f"{self.shown()}: {', '.join(stage.patterns)} has no own parameters to freeze. Name another part."
                )
            parameters.update(whole.parameters)
            modules.update(whole.modules)
            result.append((stage, whole))
        return sorted(result, key=lambda pair: -1 if pair[0].until is None else pair[0].until)

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze and unfreeze the parts for the number of the step."""
        fit, done = self._now, steps_done(trainer, pl_module)
        changed = False
        for step, (_, held) in zip(fit.steps, fit.parts, strict=True):
            is_frozen = step is None or done < step
            if held.is_frozen and not is_frozen:
                held.release()
                changed = True
            elif is_frozen and not held.is_frozen:  # a tuner has trained further
                held.freeze()
                changed = True
            held.hold()
        if changed and isinstance(trainer.strategy.model, DistributedDataParallel):
            # DDP averages the gradients of the parameters that were trained when it wrapped the module.
            wrap_again_by_ddp(trainer.strategy, pl_module)

    def _step(self, moment: float, clock: TrainingLength) -> int:
        return max(1, round(moment * (clock.run if self.unit == "run" else clock.epoch)))

    def _effect(self, pl_module: LightningModule) -> str:
        fit = self._now
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        texts = []
        for step, (stage, held) in zip(fit.steps, fit.parts, strict=True):
            size = sum(pl_module.get_parameter(name).numel() for name in held.parameters)
            until = "to the end" if step is None else f"until step {step}"
            factor = f", learning rate x {stage.lr_factor:g}" if stage.lr_factor != 1 else ""
            texts.append(f"{some_of(held.found)} ({size:,} parameters, {100 * size // total}%) frozen {until}{factor}")
        return "; ".join(texts)

    @staticmethod
    def _trained_share(pl_module: LightningModule) -> float:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)

    def held_parts(self) -> list[HeldPart]:
        """Return the parts of the fit."""
        return [held for _, held in self._fit.parts] if self._fit else []

    @property
    def _now(self) -> _Fit:
        assert self._fit is not None
        return self._fit


def _classifier(pl_module: LightningModule) -> Collection[nn.Module]:
    """Return the modules that compute the logits."""
    try:
        return find_heads(pl_module).values()
    except RuntimeError:
        return []


@dataclass
class _Fit:
    """The state of a fit."""

    parts: list[tuple[Stage, HeldPart]] = field(default_factory=list)
    steps: list[int | None] = field(default_factory=list)  # until which the parts are frozen
    length: int | None = None  # of the run in steps
    begun: bool = False
    optimizers: list[Optimizer] = field(default_factory=list)
