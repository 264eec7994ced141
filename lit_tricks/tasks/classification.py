"""The LightningModule of the command line: an image classifier with its loss, metrics and optimizer, and no trick."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lit_tricks.models import create_model, load_weights
from lit_tricks.tasks.base import Task
from lit_tricks.utils.arguments import text
from lit_tricks.utils.logit_scaling import LogitScaling, scale_as_saved

__all__ = ["Classifier"]


class Classifier(Task):
    """Train an image classifier with cross entropy; log loss, top-1, top-5 and calibration error.

    Batches are ``(images, labels)``: float images (N, C, H, W), normalized, and int64 labels (N,) in [0, num_classes).
    Metrics are named ``train/loss``, ``val/top1``, ``test/ece``, ...: top-1 and top-5 (from six classes on) are
    fractions in [0, 1], ``ece`` is the expected calibration error with 15 bins. ``forward`` returns logits (N,
    num_classes), and ``predict_step`` returns probabilities.

    Use SGD with momentum for the best final accuracy of a convolutional network. Use AdamW for transformers and good
    results with little tuning. RMSprop is for the recipes of Inception and MobileNet. ``timm.optim.Lars`` and
    ``timm.optim.Lamb`` are for batches of thousands of images.

    Args:
        model: ``resnet`` or ``small_vgg`` (see ``lit_tricks.models``), the name of any timm model, or a module that
            maps images to logits.
        num_classes: number of classes, at least 2. The command line takes it from the data.
        model_args: further arguments of a model given by name, such as ``{depth: 18, variant: D}``.
        weights: weights to start from: a file (timm's, or a checkpoint of a Classifier) or the name of pretrained
            weights of timm. They are not loaded again when a checkpoint of this module is loaded. Where the weights are
            for other classes, by number or by name, the classifier is initialized anew.
        class_names: one name per class, for predictions. The command line takes them from the data.
        input_size: channels, height and width of an image. The command line takes it from the data.
        optimizer: function from parameters to an optimizer; in YAML a class with its arguments.
        freeze: names of the network's parts that are not trained, such as ``[conv1, bn1, layer1]``, or "backbone" for
            all except its classifier. They stay in evaluation mode, including dropout and batch statistics.
        layer_decay: learning rate of a block divided by the rate of the next block towards the logits, above 0 and at
            most 1; the classifier has the full rate. 0.65 to 0.9 keeps early layers near their pretrained weights.

    Raises:
        ValueError: for an unknown model or model argument, or numbers that contradict each other.
    """

    score = "top1"

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
        freeze: list[str] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, layer_decay, input_size, freeze)
        weights, arguments = self._weights_in(weights, "model_args", model_args)
        if not isinstance(model, nn.Module):
            model = text(self, "model", model, 'Give "resnet", a name of timm, or a module.')
        if isinstance(model, nn.Module) and model_args:
            raise ValueError(f"model_args={model_args} are for a model given by name; {type(model).__name__} is built.")
        self.save_hyperparameters(ignore=["weights", *self._objects(model=model)])
        if isinstance(model, str):
            model = create_model(model, num_classes, in_chans=input_size[0], **arguments)
        if weights:
            load_weights(model, weights, class_names)
        self.model = model
        self.logit_scaling: LogitScaling = LogitScaling()  # for networks without a layer that scales the logits
        self.example_input_array = torch.zeros(2, *input_size)
        self.criterion: nn.CrossEntropyLoss = nn.CrossEntropyLoss()
        metrics = MetricCollection({"top1": MulticlassAccuracy(num_classes, average="micro")})
        self.train_metrics: MetricCollection = metrics.clone(prefix="train/")
        if num_classes > 5:
            metrics.add_metrics({"top5": MulticlassAccuracy(num_classes, top_k=5, average="micro")})
        metrics.add_metrics({"ece": MulticlassCalibrationError(num_classes, n_bins=15)})
        self.val_metrics: MetricCollection = metrics.clone(prefix="val/")
        self.test_metrics: MetricCollection = metrics.clone(prefix="test/")
        self._freeze(freeze)

    def _network(self) -> nn.Module:
        return self.model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, C, H, W)."""
        self._require_floats(images)
        logits: Tensor = self.model(images)
        if logits.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)}; with "
                f"num_classes={self.num_classes} they must be (N, {self.num_classes})."
            )
        scaled: Tensor = self.logit_scaling(logits)
        return scaled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also load the scaling of a calibrated checkpoint into sharded weights."""
        super().on_load_checkpoint(checkpoint)
        scale_as_saved(self, checkpoint)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.criterion(logits, labels)
        self.train_metrics.update(logits, labels)
        self._watch_loss(loss, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics(self.train_metrics)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return probabilities (N, num_classes) of a batch: images, or images with other items."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        probabilities: Tensor = self(images).softmax(dim=-1)
        return probabilities

    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = self.criterion(logits, labels)
        self.log(f"{name}/loss", loss, prog_bar=name == "val", batch_size=len(images), sync_dist=True)
