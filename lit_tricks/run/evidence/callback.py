"""Store predictions of validation and test images in one small file of the run folder, for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_tricks.run.evidence.mask_split import MaskSplit, joined_masks
from lit_tricks.run.evidence.seen import Seen, pixels_of, smaller
from lit_tricks.utils.batch import find
from lit_tricks.utils.class_counts import listed_counts
from lit_tricks.utils.files import written_whole
from lit_tricks.utils.transient import Transient

__all__ = ["Evidence"]

TOP = 5  # classes of an image that are kept
WRONG = 16  # images that are kept
SIDE = 96  # of an image that is kept, at most, in pixels

Arrays = dict[str, npt.NDArray[Any]]


class Evidence(Transient, Callback):
    """Stores labels, most probable classes and probabilities per image, and the images with the largest loss.

    It uses the output of the module's ``forward`` in a validation or test step, which must be logits, log-probabilities
    or probabilities (N, classes) for N integer labels in the batch. The data stays on the device until the end, so the
    host does not wait, and the run does not change. For 50,000 images of 1000 classes the file has about one megabyte:
    22 bytes per image, and 16 thumbnails of up to 96 pixels.

    For a segmentation, logits (N, classes, H, W) for masks (N, H, W), it stores the number of pixels per pair of
    classes, and the 8 images with the lowest IoU, up to 160 pixels large: about half a megabyte for 150 classes.
    Counting pixels waits for the GPU.
    """

    transient: ClassVar[dict[str, Any]] = {
        "_hook": None,
        "_last": [],
        "_splits": {},
        "_best": (),
        "_train_counts": None,
    }

    def __init__(self) -> None:
        self._splits: dict[str, tuple[_Split | MaskSplit, ...]] = {}  # before the layout of the batches is known
        self._best: tuple[_Split | MaskSplit, ...] = ()  # the validation of the best checkpoint
        self._score: float | None = None  # of the best checkpoint
        self._last: list[Tensor] = []  # what `forward` gave in this step
        self._hook: Any = None
        self._train_counts: list[int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the training images of each class, if the data set lists its labels."""
        if trainer.is_global_zero:
            self._train_counts = listed_counts(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch ``forward``."""
        if not trainer.sanity_checking:
            self._note_best(trainer)
            self._watch(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch ``forward``."""
        self._watch(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the predictions of a batch."""
        self._keep("val", batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the predictions of a batch."""
        self._keep("test", batch, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no more."""
        self._unhook()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no more."""
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no more."""
        self._unhook()

    def save(self, path: Path | None, trainer: Trainer, classes: list[str] | None, weights: str = "") -> None:
        """Write the predictions for the test images, or without a test for the validation images. Call it on all ranks.

        After a fit, predictions for the validation images are from the best checkpoint, or from the last epoch where
        there is none.

        Args:
            path: the file, on rank zero. None is written where there is nothing to write.
            trainer: whose ranks have a part each.
            classes: their names, by label.
            weights: which weights were evaluated: "given" for a given checkpoint; "" finds out after a fit.
        """
        self._note_best(trainer)
        name = "test" if "test" in self._splits else "val"
        splits = self._splits.get(name, ())
        weights = weights or ("best" if name == "test" or self._best else "last")
        found = {type(each): part for each in (name == "val" and self._best) or splits if (part := each.part())}
        parts: list[Any] = [found]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            parts = [parts[0]] * trainer.world_size
            torch.distributed.all_gather_object(parts, parts[0])  # it fills the list in place
        kinds: dict[Any, Any] = {_Split: _joined, MaskSplit: joined_masks}
        kind = next((kind for kind in kinds if all(kind in part for part in parts)), None)
        if path is None or not trainer.is_global_zero or kind is None:
            return
        arrays: dict[str, Any] = {"split": np.array(name), "classes": np.array(classes or [])}
        arrays["weights"] = np.array(weights)
        if self._train_counts is not None and kind is _Split:
            arrays["train_counts"] = np.array(self._train_counts)
        arrays |= kinds[kind]([part[kind] for part in parts])
        with written_whole(path) as unfinished, unfinished.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    def _note_best(self, trainer: Trainer) -> None:
        """Keep the last validation if the best checkpoint was saved after it."""
        score = getattr(trainer.checkpoint_callback, "best_model_score", None)
        if score is not None and float(score) != self._score:
            self._best, self._score = self._splits.get("val", ()), float(score)

    def _keep(self, name: str, batch: Any, dataloader_idx: int) -> None:
        """Store the predictions of a batch of the first loader."""
        last, self._last = self._last, []
        if self._hook and dataloader_idx == 0:
            for split in self._splits[name]:
                split.add(batch, last)

    def _watch(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        self._unhook()
        loaders = trainer.test_dataloaders if name == "test" else trainer.val_dataloaders
        loader = (
            next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
            if isinstance(loaders, list | tuple | dict)
            else loaders
        )
        where = (getattr(loader, "dataset", None), trainer.global_rank, trainer.world_size)
        self._splits[name] = (_Split(*where), MaskSplit(*where))
        self._last = []
        self._hook = pl_module.register_forward_hook(lambda module, args, output: self._note(output))

    def _note(self, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() in (2, 4) and output.is_floating_point() and output.size(1) > 1:
            self._last.append(output)

    def _unhook(self) -> None:
        if self._hook:
            self._hook.remove()
        self._hook, self._last = None, []


class _Split(Seen):
    """The predictions of one process for a split of images with labels."""

    def __init__(self, dataset: Any, rank: int, replicas: int) -> None:
        super().__init__(dataset, rank, replicas)
        self.batches: list[dict[str, Tensor]] = []
        self.wrong: tuple[Tensor, ...] | None = None  # loss, place and image of the most wrong
        self.are_probabilities: bool | None = None

    def add(self, batch: Any, outputs: list[Tensor]) -> None:
        try:
            inputs, _, labels = find(batch, "the report")
        except RuntimeError:
            return
        output = next((o for o in outputs if o.dim() == 2 and labels.shape == o.shape[:1]), None)
        if output is None:
            return
        output = output.detach().float()
        if self.are_probabilities is None:
            sums = output.sum(1)
            self.are_probabilities = bool(((output >= 0).all() & ((sums - 1).abs() < 1e-3).all()).item())
        logs = output.clamp_min(1e-38).log() if self.are_probabilities else output.log_softmax(1)
        top, classes = logs.topk(min(TOP, logs.size(1)), 1)
        log = logs.gather(1, labels.clamp(0, logs.size(1) - 1).long()[:, None])[:, 0]
        places = torch.arange(self.places, self.places + len(labels), device=logs.device, dtype=torch.int32)
        self.batches.append(
            {
                "label": labels.int(),
                "top": classes.int(),
                "confidence": top[:, 0].exp(),
                "probability": log.exp(),
                "index": places * self.replicas + self.rank,
            }
        )
        images = next((x for x in inputs.values() if x.dim() == 4), None)
        if images is not None:
            losses = torch.where(classes[:, 0] != labels, -log, torch.full_like(log, -1.0))
            self._keep_wrong(images, losses, self.batches[-1]["index"])
        self.places += len(labels)

    def _keep_wrong(self, images: Tensor, losses: Tensor, places: Tensor) -> None:
        self.note_range(images)
        most, chosen = losses.topk(min(WRONG, len(losses)))
        found = (most, places[chosen], smaller(images[chosen].float(), SIDE))
        if self.wrong:
            found = tuple(torch.cat(pair) for pair in zip(self.wrong, found, strict=True))  # type: ignore[assignment]
        best = found[0].topk(min(WRONG, len(found[0]))).indices
        self.wrong = tuple(part[best] for part in found)

    def part(self) -> Arrays | None:
        """Return all of it, in memory of the CPU; None if there were no labels."""
        if not self.batches:
            return None
        arrays = {k: torch.cat([b[k] for b in self.batches]).cpu().numpy() for k in self.batches[0]}
        if (size := self.size()) is not None:
            arrays = {k: v[arrays["index"] < size] for k, v in arrays.items()}
        if self.wrong and self.low is not None and self.high is not None:
            wrong = self.wrong[0] >= 0
            loss, place, images = (part[wrong].cpu().numpy() for part in self.wrong)
            files = [self.file_of(int(i)) for i in place]
            arrays |= {"wrong_loss": loss, "wrong_index": place, "wrong_image": images, "wrong_file": np.array(files)}
            arrays |= {"low": self.low.float().cpu().numpy(), "high": self.high.float().cpu().numpy()}
        return arrays


def _joined(parts: list[Arrays]) -> Arrays:
    """Return the predictions of all processes, in the order of the images."""
    each = ("label", "top", "confidence", "probability", "index")
    arrays = {k: np.concatenate([part[k] for part in parts]) for k in each}
    order = np.argsort(arrays["index"], kind="stable")
    classes = int(arrays["label"].max(initial=0)) + 1
    order = order[arrays["label"][order] >= 0]  # an ignored label is no class
    small = np.int16 if max(classes, int(arrays["top"].max(initial=0))) < 2**15 else np.int32
    arrays = {k: v[order] for k, v in arrays.items()}
    arrays |= {k: arrays[k].astype(small) for k in ("label", "top")}
    if all("wrong_loss" in part for part in parts):
        wrong = {k: np.concatenate([part[k] for part in parts]) for k in parts[0] if k.startswith("wrong_")}
        most = [
            i for i in np.argsort(-wrong["wrong_loss"], kind="stable") if wrong["wrong_index"][i] in arrays["index"]
        ]
        most = list({wrong["wrong_index"][i]: i for i in reversed(most[:WRONG])}.values())[::-1]
        low, high = np.min([part["low"] for part in parts], 0), np.max([part["high"] for part in parts], 0)
        arrays |= {k: v[most] for k, v in wrong.items()}
        arrays["wrong_image"] = pixels_of(arrays["wrong_image"], low, high)
    return arrays
