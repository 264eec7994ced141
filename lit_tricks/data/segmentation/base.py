"""Base of the data modules with masks, and of those whose images and masks are files of one name."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from lit_tricks.data.checked_arguments import check_eval_size, check_range, check_side, check_statistics
from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.datamodule import ImageDataModule, resize_size_for
from lit_tricks.data.io.file_index import Paths, find_images
from lit_tricks.data.io.formats import ENDINGS
from lit_tricks.data.io.worker_errors import EvalLoader
from lit_tricks.data.samples import JointSamples, Samples
from lit_tricks.data.segmentation.pairs import EvalPair, Pairs, RandomPair
from lit_tricks.data.transforms import Transform
from lit_tricks.utils.arguments import flag

__all__ = ["MaskDataModule", "MaskFolders", "image_files"]

SHOWN = 3  # files in an error message


class MaskDataModule(ImageDataModule, ABC):
    """Base: batches are (images, masks): float32 (N, C, H, W), normalized, and int64 (N, H, W).

    A label of a mask is a class or ``ignore_index``. Training images have their short side resized to a random length
    and are cropped at random. Validation and test images are resized and center-cropped. Images for prediction are
    resized, not cropped, and each is its own batch, since sizes differ.
    """

    sample_type: type[Samples] = JointSamples
    ignore_index = 255

    def _set_transforms(
        self,
        size: int,
        base_size: int,
        scale: tuple[float, float],
        flip: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        eval_size: int | None,
    ) -> None:
        """Make the transforms (see ``SegmentationFolder`` for the arguments)."""
        size, base_size = check_side(self, "crop_size", size), check_side(self, "base_size", base_size)
        scale, flip = check_range(self, "scale", scale), flag(self, "flip", flip)
        mean, std = check_statistics(self, mean, std)
        eval_size = check_eval_size(self, eval_size)
        self.input_size: tuple[int, int, int] = (len(mean), size, size)
        self.mean, self.std = mean, std
        self.eval_transform = self.eval_transform_at(size if eval_size is None else eval_size)
        least, most = (max(1, int(base_size * factor)) for factor in scale)
        self.train_transform = RandomPair(size, (least, most), flip, mean, std, self.ignore_index)  # type: ignore[assignment]

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class); it takes images with their masks."""
        return EvalPair(image_size, resize_size_for(image_size, crop_ratio), self.mean, self.std)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Give (image, path) of the files below ``predict_dir``, sorted by path, one at a time."""
        loader = super().predict_dataloader()
        samples: Any = loader.dataset
        return EvalLoader(samples, **self._loader_args(samples) | {"batch_size": 1})


class MaskFolders(MaskDataModule, ABC):
    """Base of the data modules whose images and masks are files.

    Args:
        crop_size: side of the model's input in pixels, at least 1.
        base_size: length of the short side that ``scale`` multiplies, in pixels, at least 1.
        scale: least and greatest factor on the short side in training, above 0; [1, 1] scales nothing.
        flip: whether every second training image is flipped horizontally; not where left and right matter.
        batch_size: images in a batch of one process, from 1 to the number of training images.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (image, path).
        eval_size: side of the images in validation and test, and short side in prediction, in pixels; None is
            ``crop_size``.
    """

    def __init__(
        self,
        crop_size: int = 480,
        base_size: int = 520,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        eval_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        self._set_transforms(crop_size, base_size, scale, flip, mean, std, eval_size)

    def _pairs(
        self,
        images: Path,
        masks: Path,
        names: Iterable[str],
        layout: str,
        offset: int = 0,
        order: list[int] | None = None,
    ) -> Pairs:
        """Pair images and masks by their names without ending."""
        found = {"image": image_files(images, layout), "mask": image_files(masks, layout)}
        names = list(names)
        for kind, folder in (("image", images), ("mask", masks)):
            missing = [name for name in names if name not in found[kind]]
            if missing:
                more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
                raise FileNotFoundError(
                    f"no {kind} in {str(folder)!r} for {', '.join(map(repr, missing[:SHOWN]))}{more}: each image needs "
                    "a mask of the same name (the ending may differ)"
                )
        paths = {
            kind: Paths(str(folder), [os.fsencode(found[kind][name]) for name in names])
            for kind, folder in (("image", images), ("mask", masks))
        }
        return Pairs(paths["image"], paths["mask"], self.num_classes, self.ignore_index, offset, order)


def image_files(folder: Path, layout: str) -> dict[str, str]:
    """Return the image files in a folder, at any depth, by their path in it without the ending.

    Raises:
        FileNotFoundError: if it is missing or empty.
        ValueError: if two have the same name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; {layout}")
    found: dict[str, str] = {}
    for path in find_images(str(folder)):
        stem = os.path.splitext(path)[0]
        if stem in found:
            raise ValueError(f"{str(folder)!r} has both {found[stem]!r} and {path!r}: remove one of them")
        found[stem] = path
    if not found:
        raise FileNotFoundError(f"no image in {str(folder)!r}: files must end in {' '.join(ENDINGS)}; {layout}")
    return found
