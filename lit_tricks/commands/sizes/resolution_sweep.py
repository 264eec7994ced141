"""``lit-tricks resolution``: accuracy and cost of a network by image size.

One caveat: the best size is chosen on the evaluated images. Test it on other images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import lit_tricks.data  # noqa: F401  # the parser finds the short names of the classes that are imported
from lit_tricks.commands.progress import progress
from lit_tricks.commands.sizes.size_range import default_sizes, macs, parse_sizes
from lit_tricks.commands.sizes.subject import Subject, Views, subject_of
from lit_tricks.run.report.resolution_curve import report_resolution
from lit_tricks.utils.rng import isolated_random_state

__all__ = ["resolution"]


BYTES = 2**28  # of the images of a batch, in all sizes


def resolution(
    *,
    ckpt: str | None = None,
    sizes: list[str] | None = None,
    crop_ratio: list[float] | None = None,
    split: Literal["val", "test"] = "val",
    out: str = "resolution",
    wandb: bool = False,
    data: LightningDataModule | None = None,
    module: LightningModule | None = None,
    weights: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Evaluate a network at many sizes of the test images.

    With random crops in training, objects are larger in training than in a test at the same size. A larger test size is
    better, about the training size / 0.81 ([Touvron et al., 2019](https://arxiv.org/abs/1906.06423)). Each image is
    read once, and resized to all sizes. Existing results in the folder are replaced.

    Args:
        ckpt: a checkpoint, a run folder (its best checkpoint), or the name of a pretrained timm model.
        sizes: sides in pixels: 128:448:32 (including both ends), or single sizes. By default from 4/7 to twice the
            training size.
        crop_ratio: size divided by the short side before the center crop, in (0, 1], one or more: each is a line of the
            picture. By default the data's.
        split: the images: validation, or test after all choices are made.
        out: folder for ``resolution.csv`` and ``resolution.png``.
        wandb: also log table and picture to Weights & Biases, offline without a login.
        data: the images; by default the data of the checkpoint, with its own normalization.
        module: module that the weights belong to; by default from the checkpoint.
        weights: a file of weights for a timm model.
        model_args: arguments of the model in addition to the checkpoint's, such as {dynamic_img_size: true}.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: for invalid arguments or arguments that exclude each other, and for sizes that the network does not
            support.
    """
    wanted = parse_sizes(sizes) if sizes else None
    ratios: list[float | None] = [*crop_ratio] if crop_ratio else [None]
    for ratio in crop_ratio or []:
        if not 0 < ratio <= 1:
            raise ValueError(f"--crop_ratio {ratio:g} is not above 0 and at most 1: 0.875 is 224 of 256 pixels.")
    subject = subject_of(ckpt, data, module, weights, model_args)
    channels = (getattr(subject.data, "input_size", None) or (3,))[0]
    wanted = wanted or default_sizes(subject, channels)
    costs = {size: macs(subject, size, channels) for size in wanted}
    views = [(size, ratio) for ratio in ratios for size in wanted]
    found = _accuracies(subject, views, split)
    rows = [
        {"size": size, "crop_ratio": ratio, "gmac": costs[size] / 1e9, **accuracies}
        for (size, ratio), accuracies in zip(views, found, strict=True)
    ]
    name = ckpt or type(subject.module).__name__
    report_resolution(Path(out), rows, subject.train_size, f"{name}, {split}")
    if wandb:
        _log(rows, Path(out), name)
    return Path(out)


@torch.no_grad()
def _accuracies(subject: Subject, views: list[tuple[int, float | None]], split: Literal["val", "test"]) -> list[Any]:
    """Top-1, and from six classes on top-5, of each view, in one pass over the images."""
    transform = Views([subject.transform_at(size, ratio) for size, ratio in views])
    dataset, like = subject.dataset(split, transform)
    largest = BYTES // sum(12 * size**2 for size, _ in views)
    batch_size = max(1, min(largest, like.batch_size or largest))
    loader = subject.loader(dataset, like, batch_size, range(len(dataset)))
    metrics: list[MetricCollection] = []
    with isolated_random_state(subject.device, [loader]), progress("images", len(dataset)) as advance:
        for batch in loader:
            try:
                in_views, labels = batch
            except (TypeError, ValueError):
                name = type(subject.data).__name__
                raise ValueError(f"batches of {name} must be pairs of images and labels; got {type(batch)}.") from None
            for number, view in enumerate(in_views):
                images, target = subject.on_device(view, labels)
                logits = subject.logits(images)
                if not number < len(metrics):
                    metrics.append(_metrics(logits))
                metrics[number].update(logits, target)
            advance(len(labels))
    return [{key: float(value) for key, value in metric.compute().items()} for metric in metrics]


def _metrics(logits: Tensor) -> MetricCollection:
    num_classes = logits.shape[1]
    wanted = {"top1": 1} | ({"top5": 5} if num_classes > 5 else {})
    metrics: dict[str, Any] = {
        name: MulticlassAccuracy(num_classes, top_k=k, average="micro") for name, k in wanted.items()
    }
    return MetricCollection(metrics).to(logits.device)


def _log(rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Log the result to a separate W&B run."""
    import wandb  # takes a second to import

    from lit_tricks.run.wandb_run import tracking_mode

    best = max(rows, key=lambda row: row["top1"])
    with wandb.init(
        project="lit-tricks", job_type="resolution", name=f"resolution-{Path(name).stem}", dir=str(folder.resolve()),
        mode=tracking_mode(),
        config={"model": name, "best/size": best["size"], "best/top1": best["top1"]},
    ) as run:  # fmt: skip
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"resolution": table, "plot": wandb.Image(str(folder / "resolution.png"))})
