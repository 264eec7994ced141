"""Base of the LightningModules of the command line: optimizer, frozen parts, and resuming."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from lit_tricks._compat import is_built_by_command_line
from lit_tricks.callbacks.finetuning.held import HeldPart
from lit_tricks.callbacks.layer_decay import layer_factors
from lit_tricks.models import freeze, layer_scales
from lit_tricks.tasks.input_transform import InputTransform, input_transform
from lit_tricks.utils.arguments import MAX_SIDE, integer, integers, invalid, mapping, number, path, texts
from lit_tricks.utils.checkpoint_files import read_checkpoint
from lit_tricks.utils.class_names import apart, names_of, require_same_classes
from lit_tricks.utils.layers import layer_distances
from lit_tricks.utils.parts import Part

__all__ = ["Task", "is_of_module"]

log: logging.Logger = logging.getLogger("lit_tricks")

TOO_HIGH = 10  # ratio to the loss of guessing, to warn about


class Task(LightningModule):
    """Base of the modules that train a network for a task. A subclass adds its network, steps and metrics.

    Metrics are collections named ``train_metrics``, ``val_metrics`` and ``test_metrics``, with their prefix; the last
    line of ``__init__`` of a subclass is ``self._freeze(freeze)``.

    Attributes:
        score: name of the metric that selects the best epoch; higher is better.
        least_classes: smallest valid number of classes.
        lr: learning rate instead of the optimizer's. Lightning's learning rate finders set it. None, by default, keeps
            the optimizer's.

    Args:
        num_classes: number of classes, at least ``least_classes``.
        class_names: one name per class; None numbers the classes.
        optimizer: function from parameters to an optimizer.
        layer_decay: learning rate of a block divided by the rate of the next block, above 0 and at most 1.
        input_size: channels, height and width of an image.
        freeze: names of the parts that are not trained.

    Raises:
        ValueError: for numbers out of range, or that contradict each other.
    """

    score: str
    default_optimizer: Callable[[Iterable[Any]], Optimizer]
    least_classes = 2
    train_metrics: MetricCollection
    val_metrics: MetricCollection
    test_metrics: MetricCollection

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the default of ``optimizer``, a lambda, so that it pickles. The command line reads its source."""
        super().__init_subclass__(**kwargs)
        parameter = signature(cls.__init__).parameters.get("optimizer")
        if parameter is not None and parameter.default.__qualname__.endswith("<lambda>"):
            cls.default_optimizer = staticmethod(parameter.default)
            parameter.default.__qualname__ = f"{cls.__qualname__}.default_optimizer"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        layer_decay: float,
        input_size: tuple[int, int, int],
        freeze: list[str] | None,
    ) -> None:
        super().__init__()
        num_classes = integer(self, "num_classes", num_classes, self.least_classes, "Give the number of classes.")
        class_names = texts(self, "class_names", class_names, "Give one name per class.", "numbers as names")
        if class_names is not None and len(class_names) != num_classes:
            raise invalid(
                self, f"class_names has {len(class_names)} names. Give one per class.",
                class_names=class_names, num_classes=num_classes,
            )  # fmt: skip
        given: Any = optimizer
        if not callable(given):
            fix = "Give a function from parameters to an optimizer, such as partial(torch.optim.SGD, lr=0.1)."
            raise invalid(self, f"optimizer must be callable. {fix}", optimizer=given)
        fix = "Give channels, height and width, such as [3, 224, 224]."
        integers(self, "input_size", input_size, 1, fix, MAX_SIDE, 3)
        texts(self, "freeze", freeze, 'Give names of parts, such as "layer1".', "no part")
        layer_decay = number(self, "layer_decay", layer_decay, "(0, 1]", "1 is one learning rate for all layers.")
        self.num_classes = num_classes
        self.class_names: list[str] = class_names or [str(i) for i in range(num_classes)]
        self.optimizer = optimizer
        self.layer_decay = layer_decay
        self.lr: float | None = None
        self._settings: list[dict[str, Any]] | None = None
        self._frozen: HeldPart | None = None
        self._resumed_optimizers: list[str] | None = None
        self._data_settings: dict[str, Any] = {}
        self._has_warned = False
        self._resumed_states = 0

    @abstractmethod
    def _network(self) -> nn.Module:
        """Return the network that has the names in ``freeze``, and the blocks of ``layer_decay``."""

    @abstractmethod
    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        """Update the metrics by a batch of the split ``name``, and log the loss, where there is one."""

    def setup(self, stage: str) -> None:
        """Compare the classes of model and data, before training or evaluation.

        Raises:
            ValueError: if the names or the number differ; predictions only have a warning.
        """
        self._settings = None
        data = getattr(self.trainer, "datamodule", None)
        if stage == "predict":
            ours, theirs = names_of(self), names_of(data)
            if ours and theirs and (other := apart(ours, theirs, "the model", "the data")):
                log.warning("predictions use the class names of the model, which differ from the data's: %s", other)
            return
        remedy = "Use data of the same classes, or start a new run from the weights."
        require_same_classes(self, data, "the model", "the data", remedy)
        found = getattr(data, "num_classes", self.num_classes)
        if found != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} of the model disagrees with the {found} classes of the data: "
                f"set num_classes={found}, or start from its weights instead of resuming it."
            )

    def transform(self) -> InputTransform:
        """Return the evaluation transform: from a PIL image, or the path of a file, to an input (C, H, W).

        It is the data module's that the module was trained with, at the size and normalization of its checkpoint. Make
        a batch with ``torch.stack``, or ``transform(image)[None]``; a Detector takes a list.

        Raises:
            ValueError: if neither a checkpoint nor a Trainer has the data module of the training.
        """
        return input_transform(self, self._data_settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizers, and the classes of the data where the module has no names."""
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]
        names = names_of(getattr(self.trainer, "datamodule", None))
        settings = checkpoint.get("hyper_parameters", {})
        if names_of(self) is None and names is not None and "class_names" in settings:
            settings["class_names"] = names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the names of the optimizers, and compare the classes.

        Raises:
            ValueError: if the checkpoint has other classes.
        """
        trainer = self._trainer
        data = None if trainer is None or trainer.predicting else getattr(trainer, "datamodule", None)
        other = "the data" if names_of(data) == names_of(self) else "the model"
        remedy = "Use data of the same classes, or start a new run from the weights, with --model.weights."
        require_same_classes(checkpoint, self, "the checkpoint", other, remedy)
        require_same_classes(checkpoint, data, "the checkpoint", "the data", remedy)
        self._resumed_optimizers = checkpoint.get("optimizers")
        self._data_settings = checkpoint.get("datamodule_hyper_parameters", {})
        self._resumed_states = len(checkpoint.get("optimizer_states", []))

    def on_fit_start(self) -> None:
        """Take the optimizer's settings, before a resumed checkpoint replaces them by its own.

        Raises:
            ValueError: if the checkpoint holds the state of another optimizer, or of none.
        """
        names = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]
        if self.trainer.ckpt_path and self._resumed_optimizers not in (None, names):
            raise ValueError(
                f"the checkpoint holds the state of {', '.join(self._resumed_optimizers)}, which "
                f"{', '.join(names)} cannot resume: keep the optimizer, or load only the weights, with --model.weights."
            )
        if self.trainer.ckpt_path and self._resumed_states != len(names):
            raise ValueError(
                f"the checkpoint holds the state of {self._resumed_states} optimizers, and the run has {len(names)}: "
                "momentum would be lost. Load only the weights, with --model.weights."
            )
        if self.lr is not None and self.layer_decay < 1:
            scales = layer_scales(self._network(), self.layer_decay)
            for group in self._groups():
                if group["lr"] == self.lr:  # a learning rate finder has set all groups to the same
                    group["lr"] *= scales.get(group["params"][0], 1.0)
        self._settings = [settings for optimizer in self.trainer.optimizers for settings in _settings(optimizer)]

    def on_train_start(self) -> None:
        """Override settings of the resumed checkpoint by this run's settings, and freeze parts again."""
        self._hold_frozen()  # now, as Lightning warns of layers that are in evaluation mode before
        if self._settings is None:  # a tuner trains before the fit starts, at its own learning rate
            return
        for group, settings in zip(self._groups(), self._settings, strict=True):
            changed = {name: value for name, value in settings.items() if group.get(name) != value}
            if self.trainer.lr_scheduler_configs:
                changed.pop("lr", None)  # the scheduler has moved it
            # a learning rate that only a schedule has moved is not a change
            news = {k: v for k, v in changed.items() if k != "lr" or group.get("initial_lr") != v}
            if self.trainer.ckpt_path and news:
                rank_zero_info(f"resumed with {', '.join(f'{k}={v} (was {group[k]})' for k, v in news.items())}")
            group.update(changed)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a batch, under ``val/``."""
        self._evaluate(batch, "val", self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation set."""
        self._log_metrics(self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate a batch, under ``test/``."""
        self._evaluate(batch, "test", self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics(self.test_metrics)

    def epoch_metrics(self) -> list[str]:
        """Return the names of the metrics per epoch, also for the trained weights in addition to an average."""
        train, val, test = (
            [str(name) for name in metrics.keys()]  # noqa: SIM118  # which, unlike iteration, has the prefix
            for metrics in (self.train_metrics, self.val_metrics, self.test_metrics)
        )
        val = ["val/loss", *val]
        return ["train/loss_epoch", *train, *val, *(f"raw/{name}" for name in val), "test/loss", *test]

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer with the trained parameters, at the learning rates of their layers."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        own = {} if self.lr is None else {"lr": self.lr}
        groups = [{"params": trained, **own}] if own else trained
        if self.layer_decay == 1:
            return self.optimizer(groups)
        name, distances = type(self).__name__, layer_distances(self._network())
        if not any(distances.values()):
            raise ValueError(
                f"{name}(layer_decay={self.layer_decay}): {type(self._network()).__name__} has one layer only, so "
                "there is no learning rate to lower. Set layer_decay=1."
            )
        factors = layer_factors(f"layer_decay={self.layer_decay}", distances, self.layer_decay)
        with factors.applied():
            optimizer = self.optimizer(groups)
        factors.finish(optimizer, name)
        return optimizer

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]

    def _objects(self, **networks: Any) -> list[str]:
        """Return the arguments that no checkpoint saves.

        Arguments of the command line are plain text and numbers, so a checkpoint can rebuild the module from them.
        Objects from Python are not saved, because they would have to be pickled.
        """
        if is_built_by_command_line():
            return []
        return ["optimizer", *(name for name, value in networks.items() if isinstance(value, nn.Module))]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep frozen parts in evaluation mode."""
        self._hold_frozen()

    def on_train_end(self) -> None:
        """Restore the modes of frozen parts."""
        if self._frozen:
            self._frozen.restore_modes()

    def _hold_frozen(self) -> None:
        if self._frozen:
            self._frozen.hold()

    def _weights_in(
        self, weights: str | None, name: str, arguments: dict[str, Any] | None
    ) -> tuple[str | None, dict[str, Any]]:
        """Return the weights to start from, and the other arguments of a network."""
        weights = path(self, "weights", weights, "Give a file, or a name of timm.", "a random start")
        others = mapping(self, name, arguments, "Give arguments of the network.", "no further arguments") or {}
        inner = others.pop("weights", None)
        if weights and inner:
            raise invalid(self, "weights are given twice. Keep weights only.", **{"weights": weights, name: arguments})
        return weights or inner, others

    def _freeze(self, names: list[str] | None) -> None:
        """Stop the training of parts of the network."""
        if not names:
            return
        modules = freeze(self._network(), names)
        self._frozen = HeldPart(self._network(), Part(modules, [], modules))
        self._frozen.freeze()
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"freeze={names} leaves nothing to train: give the names of some parts of the network.")

    def _require_floats(self, images: Any) -> None:
        """Raise ValueError for images that are not the floats of a transform."""
        parts = images if isinstance(images, list | tuple) else [images]
        wrong = next((part for part in parts if not isinstance(part, Tensor) or not part.is_floating_point()), None)
        if wrong is not None:
            found = str(wrong.dtype) if isinstance(wrong, Tensor) else type(wrong).__name__
            raise ValueError(
                f"{type(self).__name__} takes normalized float images, and got {found}. Make them with "
                f"model.transform(), or use lit_tricks.predict(checkpoint, images)."
            )

    def _watch_loss(self, loss: Tensor, batch_idx: int) -> None:
        """Warn once if the loss is far above the loss of guessing. Check every 50 batches: reading waits for a GPU."""
        guess = math.log(self.num_classes)
        if self._has_warned or batch_idx % 50 or not float(loss.detach()) > TOO_HIGH * guess:
            return
        self._has_warned = True
        log.warning(
            "the training loss is %.3g, and guessing has %.3g: the learning rate is too large for this batch. Divide "
            "--model.optimizer.lr by 10, or add --trainer.callbacks+=LinearScaling or WarmupCosine.",
            float(loss.detach()), guess,
        )  # fmt: skip

    def _log_metrics(self, metrics: MetricCollection) -> None:
        for name, value in metrics.compute().items():  # over all ranks
            self.log(name, value, prog_bar=name == f"val/{self.score}", sync_dist=True)
        metrics.reset()


def is_of_module(weights: str | None, argument: str) -> bool:
    """Return whether weights are a checkpoint of a module that has this argument."""
    path = Path(weights or "").expanduser()
    if path.suffix != ".ckpt" or not path.is_file():
        return False
    try:
        return argument in read_checkpoint(path).get("hyper_parameters", {})
    except (OSError, ValueError):  # what is wrong with the file is reported where its weights are loaded
        return False


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, without the state that the optimizer stores there.

    Schedule-free optimizers count steps there, by names that their constructor does not take.
    """
    state = optimizer.defaults.keys() - signature(type(optimizer)).parameters.keys()
    left_out = {"params", "name", *state}
    return [{name: value for name, value in group.items() if name not in left_out} for group in optimizer.param_groups]
