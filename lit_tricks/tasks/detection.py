"""The LightningModule of object detection: torchvision's Faster R-CNN or RetinaNet on our backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.detection import MeanAveragePrecision

from lit_tricks._compat import overrides
from lit_tricks.models import Backbone, load_weights
from lit_tricks.models.detectors import faster_rcnn, retinanet
from lit_tricks.tasks.base import Task, is_of_module
from lit_tricks.utils.arguments import MAX_SIDE, integer, integers, mapping, number, numbers, text
from lit_tricks.utils.rng import seeded

__all__ = ["Detector"]

CLASSIFIERS = (
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
    "head.classification_head.cls_logits",
)  # the layers with outputs per class, of Faster R-CNN and RetinaNet


class Detector(Task):
    """Train an object detector on a classification network; log its losses and the mean average precision.

    The detectors are torchvision's, with a feature pyramid: Faster R-CNN (two stages; cross entropy and smooth L1), or
    RetinaNet (one stage; focal loss and L1). Batches are ``(images, targets)``: a list of float images (C, H, W) of any
    sizes, and a list of dicts with ``boxes``, float (n, 4): (x0, y0, x1, y1) in pixels, and ``labels``, int64 (n,) from
    1 to num_classes; objects with ``iscrowd`` 1 are ignored in the evaluation. The data module normalizes the images,
    as for a Classifier, and torchvision's own normalization is off. ``forward`` and ``predict_step`` return one dict
    per image with ``boxes``, ``labels`` and ``scores``, the best first, in pixels of the original image.

    Metrics are ``train/loss`` and its parts by torchvision's names (``train/loss_classifier``, ...); ``val/map``, the
    mean over thresholds of overlap from 0.5 to 0.95, ``val/map50`` and ``val/map75``, and the same for ``test``, all in
    [0, 1], by COCO's own code over the images of all processes. There is no validation loss: torchvision's detectors
    have none in evaluation mode. It needs ``pip install "lit-tricks[detection]"``.

    Random draws in training, such as the regions for the loss, depend only on the seed, the epoch and the batch. A
    checkpoint stores the seed, so a resumed run draws the same numbers.

    Args:
        model: "faster_rcnn" or "retinanet".
        num_classes: number of classes of objects, without the background, at least 1. The command line takes it from
            the data.
        backbone: ``resnet`` (see ``lit_tricks.models.resnet``), or the name of a timm model with feature maps.
        backbone_args: further arguments of the backbone, such as ``{depth: 50, variant: D, norm: frozen_batch}``.
        weights: to start from: of the backbone, a file (timm's, or a checkpoint of a Classifier) or the name of
            pretrained weights of timm; or of the whole network, a checkpoint of a Detector. They are not loaded again
            when a checkpoint of this module is loaded.
        levels: number of feature maps of the backbone, from the coarsest; None is 4 for Faster R-CNN and 3 for
            RetinaNet. The pyramid adds one or two coarser maps.
        channels: channels of the feature pyramid, and of RetinaNet's heads.
        head_width: width of the two layers of Faster R-CNN that process a region.
        min_size: length of the shorter side of an image after resizing, in pixels; of several lengths one is drawn per
            training step, and evaluation uses the last.
        max_size: largest length of the longer side after resizing, in pixels.
        anchor_scale: side of the anchors divided by the stride of their feature map. None is 8 for Faster R-CNN and 4
            for RetinaNet, for images of 800 pixels; use less for small images. Objects should have the size of an
            anchor.
        aspect_ratios: aspect ratios of the anchors, height divided by width.
        beta: error at which the smooth L1 of boxes changes from quadratic to linear, at least 0, which is L1. None is
            torchvision's value: 1/9, and 0 for RetinaNet.
        model_args: further arguments of ``FasterRCNN`` or ``RetinaNet`` of torchvision, as ``{box_score_thresh: 0.1}``.
        class_names: one name per class, for predictions. The command line takes them from the data.
        input_size: channels, height and width of an image; only the channels are used. The command line takes it from
            the data.
        optimizer: function from parameters to an optimizer; in YAML a class with its arguments.
        freeze: names of parts of the backbone that are not trained, such as ``[conv1, bn1, layer1]``. They stay in
            evaluation mode.
        layer_decay: learning rate of a block of the backbone divided by the rate of the next block, above 0 and at most
            1; pyramid and heads have the full rate.

    Raises:
        ValueError: for an unknown model, backbone or argument, or numbers out of range.
        ModuleNotFoundError: when it is trained or evaluated, if pycocotools is not installed.
        RuntimeError: if the precision of the run would round boxes.

    Example:
        ``Detector("faster_rcnn", num_classes=20, backbone_args={"depth": 50}, weights="classifier.ckpt")``
    """

    score = "map"
    least_classes = 1

    def __init__(
        self,
        model: Literal["faster_rcnn", "retinanet"] = "faster_rcnn",
        num_classes: int = 20,
        backbone: str = "resnet",
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        levels: int | None = None,
        channels: int = 256,
        head_width: int = 1024,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        anchor_scale: float | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        beta: float | None = None,
        model_args: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        input_size: tuple[int, int, int] = (3, 224, 224),
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4),
        freeze: list[str] | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__(num_classes, class_names, optimizer, layer_decay, input_size, freeze)
        weights, arguments = self._weights_in(weights, "backbone_args", backbone_args)
        model_args = mapping(self, "model_args", model_args, "Give arguments of torchvision's.", "no further arguments")
        backbone = text(self, "backbone", backbone, 'Give "resnet", or a name of timm.')
        levels = integer(self, "levels", levels, 1, "4 is usual.", 8, "the levels of the paper")
        channels = integer(self, "channels", channels, 1, "256 is usual.", 2**16)
        head_width = integer(self, "head_width", head_width, 1, "1024 is usual.", 2**16)
        max_size = integer(self, "max_size", max_size, 1, "1333 is usual.", MAX_SIDE)
        sizes = [min_size] if isinstance(min_size, int) else min_size
        sizes = integers(self, "min_size", sizes, 1, "Give a number of pixels up to max_size, or several.", max_size)
        anchor_scale = number(
            self, "anchor_scale", anchor_scale, "(0, 1000]", "8 makes anchors of 32 pixels at stride 4.", "the usual"
        )
        aspect_ratios = numbers(self, "aspect_ratios", aspect_ratios, "(0, 1000]", "[0.5, 1, 2] is usual.")
        beta = number(self, "beta", beta, "[0, 1000]", "0 is L1.", "torchvision's value")
        self.save_hyperparameters(ignore=["weights", *self._objects()])
        if model not in ("faster_rcnn", "retinanet"):
            raise ValueError(f"model={model!r} is unknown: write 'faster_rcnn' or 'retinanet'.")
        two_stages = model == "faster_rcnn"
        # a label of RetinaNet's is the number of an output, and none of these is the background's
        self.label_offset = 0 if two_stages else 1  # from torchvision's labels to the labels of the data
        args: dict[str, Any] = {"channels": channels, "aspect_ratios": aspect_ratios, "beta": beta}
        args |= {"in_chans": input_size[0], "min_size": tuple(sizes), "max_size": max_size, **(model_args or {})}
        if anchor_scale is not None:
            args["anchor_scale"] = anchor_scale
        chosen = (4 if two_stages else 3) if levels is None else levels
        whole = is_of_module(weights, "backbone")
        body = Backbone(backbone, chosen, input_size[0], None if whole else weights, **arguments)
        self.model: nn.Module = (
            faster_rcnn(body, num_classes, head_width=head_width, **args)
            if two_stages
            else retinanet(body, num_classes, **args)
        )
        if weights is not None and whole:
            load_weights(self.model, weights, class_names, CLASSIFIERS)
        self._seed: int | None = None  # of what torchvision draws in training
        self._resumed_seed: int | None = None
        self._freeze(freeze)

    def _network(self) -> nn.Module:
        body: nn.Module = self.model.get_submodule("backbone.body.net")
        return body

    def setup(self, stage: str) -> None:
        """Check data, precision and the package for the metrics, before anything is trained."""
        super().setup(stage)
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            mixed = str(self.trainer.precision).replace("true", "mixed")
            raise RuntimeError(
                f"precision {self.trainer.precision} would round the corners of boxes to several pixels: use {mixed}."
            )
        if stage != "predict":
            self.val_metrics: MetricCollection = MetricCollection({"map": _AveragePrecision()}, prefix="val/")
            self.test_metrics: MetricCollection = MetricCollection({"map": _AveragePrecision()}, prefix="test/")

    def on_fit_start(self) -> None:
        """Set the seed of the process, or of the resumed run."""
        super().on_fit_start()
        resumed = self._resumed_seed if self.trainer.ckpt_path else None
        # one for all processes, as a checkpoint has but one
        seed: int = self.trainer.strategy.broadcast(torch.initial_seed())
        self._seed = seed if resumed is None else resumed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the optimizers, and keep the seed."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the names of the optimizers, and the seed."""
        super().on_load_checkpoint(checkpoint)
        self._resumed_seed = checkpoint.get("seed")

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Return the objects in images, each (C, H, W), or all (N, C, H, W).

        Returns:
            Per image the ``boxes`` (n, 4), ``labels`` (n,) from 1, and ``scores`` (n,) in [0, 1].

        Raises:
            RuntimeError: in training mode, where detectors compute losses and need targets.
        """
        self._require_floats(images)
        if self.model.training:
            raise RuntimeError("Detector finds objects in evaluation mode: call eval() before.")
        found: list[dict[str, Tensor]] = self.model(list(images))
        return [each | {"labels": each["labels"] + self.label_offset} for each in found]

    def losses(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parts of the loss of a batch, by torchvision's names; in training mode."""
        wanted = [{"boxes": each["boxes"], "labels": each["labels"] - self.label_offset} for each in targets]
        found: dict[str, Tensor] = self.model(list(images), wanted)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of the losses of a batch.

        Raises:
            ValueError: for labels that are no class, in the first batch of an epoch.
        """
        images, targets = batch
        if batch_idx == 0:  # not in each step, since reading labels waits for the GPU
            self._check_labels(targets)
        seed = torch.initial_seed() if self._seed is None else self._seed
        key = (seed, self.current_epoch, batch_idx, self.global_rank)
        with seeded(hash(key) % 2**63, self.device):  # a hash of numbers is the same in every process
            losses = self.losses(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(images))
        parts = {f"train/{name if name.startswith('loss') else f'loss_{name}'}": loss for name, loss in losses.items()}
        self.log_dict(parts, on_step=False, on_epoch=True, batch_size=len(images))
        return total

    def predict_step(self, batch: Any, batch_idx: int = 0) -> list[dict[str, Tensor]]:
        """Return the objects in a batch: images, or images with other items."""
        is_pair = isinstance(batch, list | tuple) and len(batch) == 2 and not isinstance(batch[0], Tensor)
        found: list[dict[str, Tensor]] = self(batch[0] if is_pair else batch)
        return found

    def epoch_metrics(self) -> list[str]:
        """Return the names of the metrics per epoch, also for the trained weights in addition to an average."""
        parts = {
            "faster_rcnn": ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"),
            "retinanet": ("loss_classification", "loss_bbox_regression"),
        }[self.hparams["model"]]
        train = ["train/loss_epoch", *(f"train/{part}" for part in parts)]
        val, test = ([f"{split}/{name}" for name in _PRECISIONS] for split in ("val", "test"))
        return [*train, *val, *(f"raw/{name}" for name in val), *test]

    def _check_labels(self, targets: Sequence[dict[str, Tensor]]) -> None:
        """Raise for labels without a class, since torchvision's losses would use another class."""
        labels = {label for target in targets for label in target["labels"].tolist()}
        if not labels <= set(range(1, self.num_classes + 1)):
            raise ValueError(
                f"the labels of a batch are {sorted(labels)}: with num_classes={self.num_classes} they must be from 1 "
                f"to {self.num_classes}, as 0 is the background."
            )

    def _evaluate(self, batch: Any, name: str, metrics: MetricCollection) -> None:
        images, targets = batch
        metrics.update(self(images), targets)


_PRECISIONS = {"map": "map", "map50": "map_50", "map75": "map_75"}  # by their names in torchmetrics


class _AveragePrecision(MeanAveragePrecision):
    """Three of the numbers of COCO, over all processes, which may have different numbers of images.

    Raises:
        ModuleNotFoundError: if pycocotools is not installed.
    """

    def __init__(self) -> None:
        if find_spec("pycocotools") is None:
            raise ModuleNotFoundError(
                'average precision is computed by pycocotools: pip install "lit-tricks[detection]"', name="pycocotools"
            )
        super().__init__(backend="pycocotools")
        self.warn_on_many_detections = False  # COCO evaluates the best 100 objects of an image

    def compute(self) -> dict[str, Tensor]:
        found = super().compute()
        # -1 means that there are no objects
        return {name: found[theirs].clamp(min=0) for name, theirs in _PRECISIONS.items()}

    @overrides(MeanAveragePrecision)
    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gather lists of any lengths. torchmetrics gathers one tensor after another, and would never finish."""
        names = list(self.metric_state)
        mine = {name: [each.cpu() for each in getattr(self, name)] for name in names}
        everyone: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(everyone, mine, group=process_group)
        for name in names:
            setattr(self, name, [each.to(self.device) for part in everyone for each in part[name]])
