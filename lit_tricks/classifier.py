"""The LightningModule of the command line: an image classifier with its loss, metrics and optimizer, and no trick."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lit_tricks.models import create_model, load_weights

__all__ = ["Classifier"]


class Classifier(LightningModule):
    """Train an image classifier with cross entropy; log loss, top-1, top-5 and calibration error.

    Batches are ``(images, labels)``: float images (N, C, H, W), normalised, and int64 labels (N,) in
    [0, num_classes). Metrics are named ``train/loss``, ``val/top1``, ``test/ece``, ...: top-1 and top-5 (from six
    classes on) are fractions in [0, 1], ``ece`` is the expected calibration error with 15 bins. ``forward`` gives
    logits (N, num_classes), ``predict_step`` probabilities.

    Which optimizer: SGD with momentum for the best final accuracy of a convolutional network; AdamW for transformers
    and a good result with little tuning; RMSprop for the recipes of Inception and MobileNet; ``timm.optim.Lars`` and
    ``timm.optim.Lamb`` for batches of thousands of images.

    Args:
        model: ``resnet`` (see ``lit_tricks.models.resnet``), the name of any timm model, or a module that maps images
            to logits.
        num_classes: number of classes, at least 2. The command line takes it from the data.
        model_args: further arguments of a model given by name, such as ``{depth: 18, variant: D}``.
        weights: weights to start from: a file (timm's, or a checkpoint of a Classifier) or the name of pretrained
            weights of timm. They are not looked for again when a checkpoint of this module is loaded.
        class_names: one name a class, for predictions. The command line takes them from the data.
        input_size: channels, height and width of an image. The command line takes it from the data.
        optimizer: from parameters to optimizer; in YAML a class with its arguments.

    Raises:
        ValueError: for an unknown model or model argument, or numbers that contradict each other.
    """

    def __init__(
        self,
        model: str | nn.Module = "resnet",
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        class_names: list[str] | None = None,
        input_size: tuple[int, int, int] = (3, 224, 224),
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: SGD(
            p, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
        ),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} is below 2: there is nothing to tell apart.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"class_names has {len(class_names)} names for num_classes={num_classes}: give one a class."
            )
        if isinstance(model, nn.Module) and model_args:
            raise ValueError(f"model_args={model_args} are for a model given by name; {type(model).__name__} is built.")
        # What the command line was given is plain text and numbers, and rebuilds all of this from the checkpoint alone.
        # Objects given in Python are none of a checkpoint's business: they would have to be pickled.
        objects = [] if _given_hyperparameters.get() else ["optimizer"] + ["model"] * isinstance(model, nn.Module)
        self.save_hyperparameters(ignore=["weights", *objects])
        if isinstance(model, str):
            model = create_model(model, num_classes, in_chans=input_size[0], **(model_args or {}))
        if weights:
            load_weights(model, weights)
        self.model = model
        self.num_classes = num_classes
        self.class_names = class_names or [str(i) for i in range(num_classes)]
        self.example_input_array = torch.zeros(2, *input_size)
        self.optimizer = optimizer
        self.criterion = nn.CrossEntropyLoss()
        metrics = MetricCollection({"top1": MulticlassAccuracy(num_classes, average="micro")})
        self.train_metrics = metrics.clone(prefix="train/")
        if num_classes > 5:
            metrics.add_metrics({"top5": MulticlassAccuracy(num_classes, top_k=5, average="micro")})
        metrics.add_metrics({"ece": MulticlassCalibrationError(num_classes, n_bins=15)})
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self._resumed_optimizers: list[str] | None = None

    def setup(self, stage: str) -> None:
        """Compare the number of classes with that of the data, before anything is trained."""
        found = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if stage != "predict" and found != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} of the model disagrees with the {found} classes of the data: "
                f"set num_classes={found}, or start from its weights instead of resuming it."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizers."""
        checkpoint["optimizers"] = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the names of the optimizers."""
        self._resumed_optimizers = checkpoint.get("optimizers")

    def on_fit_start(self) -> None:
        """Take the optimizer's settings, before a resumed checkpoint replaces them by its own.

        Raises:
            ValueError: if the checkpoint holds the state of another optimizer.
        """
        names = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]
        if self.trainer.ckpt_path and self._resumed_optimizers not in (None, names):
            raise ValueError(
                f"the checkpoint holds the state of {', '.join(self._resumed_optimizers)}, which is no use to "
                f"{', '.join(names)}: keep the optimizer, or start from the weights alone, with --model.weights."
            )
        self._settings = [_settings(group) for opt in self.trainer.optimizers for group in opt.param_groups]

    def on_train_start(self) -> None:
        """Let the settings of this run win over those of the checkpoint that it resumes."""
        groups = [group for opt in self.trainer.optimizers for group in opt.param_groups]
        for group, settings in zip(groups, self._settings, strict=True):
            changed = {name: value for name, value in settings.items() if group.get(name) != value}
            if self.trainer.lr_scheduler_configs:
                changed.pop("lr", None)  # it is where the scheduler had come to
            # a rate that only a schedule had moved is no news
            news = {k: v for k, v in changed.items() if k != "lr" or group.get("initial_lr") != v}
            if self.trainer.ckpt_path and news:
                rank_zero_info(f"resumed with {', '.join(f'{k}={v} (was {group[k]})' for k, v in news.items())}")
            group.update(changed)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        logits: Tensor = self.model(images)
        if logits.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)}; with "
                f"num_classes={self.num_classes} they must be (N, {self.num_classes})."
            )
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy of a batch."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.criterion(logits, labels)
        self.train_metrics.update(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics(self.train_metrics)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a batch, under ``val/``."""
        self._evaluate(batch, "val", self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation set."""
        self._log_metrics(self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a batch, under ``test/``."""
        self._evaluate(batch, "test", self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics(self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Probabilities (N, num_classes) of a batch: images alone, or images and anything."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities: Tensor = self(images).softmax(dim=-1)
        return probabilities

    def epoch_metrics(self) -> list[str]:
        """Names of what is logged once an epoch, also of the trained weights beside an average."""
        train, val, test = (
            [str(name) for name in metrics.keys()]  # noqa: SIM118  # which, unlike iteration, has the prefix
            for metrics in (self.train_metrics, self.val_metrics, self.test_metrics)
        )
        val = ["val/loss", *val]
        return ["train/loss_epoch", *train, *val, *(f"raw/{name}" for name in val), "test/loss", *test]

    def configure_optimizers(self) -> Optimizer:
        """Give the optimizer all parameters."""
        return self.optimizer(self.parameters())

    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = self.criterion(logits, labels)
        self.log(f"{name}/loss", loss, prog_bar=name == "val", batch_size=len(images), sync_dist=True)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        for name, value in metrics.compute().items():  # over all ranks
            self.log(name, value, prog_bar=name == "val/top1", sync_dist=True)
        metrics.reset()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
