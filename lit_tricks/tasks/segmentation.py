"""A LightningModule for segmentation: a network with its loss, metrics and optimizer, and no trick."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lit_tricks.callbacks.focal_loss import focal_target
from lit_tricks.models import Backbone, load_weights
from lit_tricks.models.decoders import DecoderName, levels_of
from lit_tricks.models.segmentation import SegmentationNet
from lit_tricks.tasks.base import Task, is_of_module
from lit_tricks.utils.arguments import MAX_INTEGER, integer, number, text

__all__ = ["Segmenter"]


class Segmenter(Task):
    """Train a segmentation network; log loss, mean intersection over union and pixel accuracy.

    Batches are ``(images, masks)``: float images (N, C, H, W), normalized, and int64 masks (N, H, W) with labels in [0,
    num_classes), or ``ignore_index``. Metrics are named ``train/loss``, ``val/miou``, ``test/pixel_accuracy``, ...:
    fractions in [0, 1] over the pixels of all images that are not ignored. The mean of ``miou`` is over the classes in
    the masks or the predictions. Losses are means over pixels. ``forward`` returns logits (N, num_classes, H, W) for
    images of any size, and ``predict_step`` returns labels (N, H, W), uint8 for up to 256 classes.

    The segmentation network of [Bag of Tricks](https://arxiv.org/abs/1812.01187), section 6.2, is ``decoder: fcn`` with
    ``model_args: {depth: 50, output_stride: 8}`` and ``aux_weight: 0.5``, from a classifier's ``weights``.

    Args:
        model: ``resnet`` (see ``lit_tricks.models.resnet``), or the name of a timm model with feature maps.
        num_classes: number of classes, at least 2. The command line takes it from the data.
        model_args: further arguments of the model, such as ``{depth: 50, variant: D, output_stride: 8}``.
        weights: weights to start from. For the encoder: a file (timm's, or a checkpoint of a Classifier) or the name of
            pretrained weights of timm. For the whole network: a checkpoint of a Segmenter. They are not loaded again
            when a checkpoint of this module is loaded.
        decoder: "fcn", "aspp", "ppm", "fpn" or "pan", see ``lit_tricks.models.decoders``. ``fpn`` is for an encoder
            with ``output_stride: 32``, the others are better with 8 or 16.
        aux_weight: weight of the loss of an auxiliary head on the second last feature map, 0 or more; 0 builds no head.
            GluonCV uses 0.5 for the FCN, and the paper of PSPNet 0.4.
        loss: "cross_entropy", or "focal", the loss of the trick ``FocalLoss``, also in validation.
        gamma: exponent of the focal loss, 0 or more.
        ignore_index: label of pixels without a class; must be the same as the data's.
        class_names: one name per class, for predictions. The command line takes them from the data.
        input_size: channels, height and width of an image. The command line takes it from the data.
        optimizer: function from parameters to an optimizer; in YAML a class with its arguments.
        freeze: names of the encoder's parts that are not trained, such as ``[conv1, bn1, layer1]``, or "backbone" for
            all of it. They stay in evaluation mode.
        layer_decay: learning rate of a block of the encoder divided by the rate of the next block, above 0 and at most
            1; the decoder has the full rate.

    Raises:
        ValueError: for an unknown model, decoder or argument, or numbers that contradict each other.
        ImportError: for the decoders ppm, fpn and pan without segmentation_models_pytorch.
    """

    score = "miou"

    def __init__(
        self,
        model: str = "resnet",
        num_classes: int = 21,
        model_args: dict[str, Any] | None = None,
        weights: str | None = None,
        decoder: DecoderName = "fcn",
        aux_weight: float = 0.0,
        loss: Literal["cross_entropy", "focal"] = "cross_entropy",
        gamma: float = 2.0,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        input_size: tuple[int, int, int] = (3, 480, 480),
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
        freeze: list[str] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, layer_decay, input_size, freeze)
        weights, arguments = self._weights_in(weights, "model_args", model_args)
        model = text(self, "model", model, 'Give "resnet", or a name of timm.')
        fix = "0 builds no auxiliary head, and 0.5 is usual."
        aux_weight = number(self, "aux_weight", aux_weight, "[0, 1000]", fix)
        if loss not in ("cross_entropy", "focal"):
            raise ValueError(f"loss={loss!r} is unknown: write 'cross_entropy' or 'focal'.")
        gamma = number(self, "gamma", gamma, "[0, 100]", "2 is usual.")
        ignore_index = integer(
            self, "ignore_index", ignore_index, -MAX_INTEGER, "Give a label that no class has, such as 255."
        )
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index={ignore_index} is one of the {num_classes} classes: give a label that none has, as -1."
            )
        self.save_hyperparameters(ignore=["weights", *self._objects()])
        whole = is_of_module(weights, "decoder")
        levels = max(levels_of(decoder), 2 if aux_weight else 1)
        backbone = Backbone(model, levels, input_size[0], None if whole else weights, **arguments)
        self.model: SegmentationNet = SegmentationNet(backbone, decoder, num_classes, aux_weight > 0)
        if weights is not None and whole:
            load_weights(self.model, weights, class_names, self.model.classifiers)
        self.aux_weight = aux_weight
        self.gamma: float = gamma if loss == "focal" else 0.0
        self.ignore_index = ignore_index
        self.example_input_array = torch.zeros(2, *input_size)
        self.criterion: nn.CrossEntropyLoss = nn.CrossEntropyLoss(ignore_index=ignore_index)
        # arguments are not validated, because this would check all labels of each batch
        known: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
        metrics = MetricCollection(
            {
                "miou": MulticlassJaccardIndex(num_classes, average="macro", **known),
                "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", **known),
            }
        )
        self.train_metrics: MetricCollection = metrics.clone(prefix="train/")
        self.val_metrics: MetricCollection = metrics.clone(prefix="val/")
        self.test_metrics: MetricCollection = metrics.clone(prefix="test/")
        self._freeze(freeze)

    def _network(self) -> nn.Module:
        return self.model.backbone.net

    def setup(self, stage: str) -> None:
        """Compare the classes and the ignored label of model and data, before training."""
        super().setup(stage)
        found = getattr(getattr(self.trainer, "datamodule", None), "ignore_index", self.ignore_index)
        if stage != "predict" and found != self.ignore_index:
            raise ValueError(
                f"ignore_index={self.ignore_index} of the model disagrees with the data's, {found}: set the two "
                "to the same."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes, H, W) of images (N, C, H, W)."""
        self._require_floats(images)
        logits: Tensor = self.model(images)[0]
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, masks = batch
        logits, aux = self.model(images)
        target = focal_target(masks, self.gamma) if self.gamma else masks
        loss = self._loss(logits, target)
        if aux is not None:
            loss = loss + self.aux_weight * self._loss(aux, target)
        self.train_metrics.update(logits.argmax(1), masks)
        self._watch_loss(loss, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics(self.train_metrics)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return labels (N, H, W) of a batch: images, or images with other items."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        labels: Tensor = self(images).argmax(1)
        return labels.to(torch.uint8 if self.num_classes <= 256 else torch.int32)

    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        images, masks = batch
        logits = self(images)
        metrics.update(logits.argmax(1), masks)
        loss = self._loss(logits, focal_target(masks, self.gamma) if self.gamma else masks)
        pixels = int((masks != self.ignore_index).sum())  # so that the mean over batches is the mean over pixels
        self.log(f"{name}/loss", loss, prog_bar=name == "val", batch_size=pixels, sync_dist=True)

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        loss: Tensor = self.criterion(logits, masks)
        some = (masks != self.ignore_index).any()
        return torch.where(some, loss, torch.zeros_like(loss))  # the mean over no pixel is no number
