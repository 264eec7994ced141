"""Images and their masks in folders of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lit_tricks.data.checked_arguments import check_classes, check_root
from lit_tricks.data.datamodule import Split
from lit_tricks.data.samples import Source
from lit_tricks.data.segmentation.base import MaskFolders, image_files
from lit_tricks.data.segmentation.pairs import Pairs
from lit_tricks.utils.arguments import MAX_INTEGER, integer
from lit_tricks.utils.class_names import permutation
from lit_tricks.utils.files import read_text

__all__ = ["SegmentationFolder"]

LAYOUT = "expected are ROOT/train/images/NAME.jpg, ROOT/train/masks/NAME.png, and the same below ROOT/val"
LOOKED_AT = 32  # masks


class SegmentationFolder(MaskFolders):
    """Images and masks of one name: ``root/train/images/NAME.jpg``, ``root/train/masks/NAME.png``, ``root/val/...``.

    A mask has one channel, or a palette, whose values are labels: 0 for the first class. Without ``root/test`` there is
    no test. The defaults come from the FCN in [Bag of Tricks](https://arxiv.org/abs/1812.01187), section 6.2, as in
    GluonCV. In training, the short side is resized to 0.5 to 2 times 520 pixels, and a crop of 480 is flipped in every
    second image (without GluonCV's rotation by up to 10 degrees and blur). In evaluation, the short side is resized to
    480, followed by a center crop. Masks are transformed alike.

    Args:
        root: folder with ``train``, ``val`` and perhaps ``test``.
        classes: names of the classes, in the order of the labels; None reads ``root/classes.txt``, with one name per
            line. If the file has the same names in another order, the labels of the masks are mapped from that order to
            this one.
        ignore_index: label of pixels without a class, such as borders; must be the same as the model's. Padding of
            training images that are smaller than the crop gets this label.
        kwargs: ``crop_size``, ``base_size``, ``scale``, ``flip``, ``batch_size``, ``num_workers``, ``mean``, ``std``,
            ``predict_dir`` and ``eval_size``, which ``lit-tricks show SegmentationFolder`` explains.

    Raises:
        ValueError: if an argument is out of range, and while loading for a mask with another size than its image, or
            with labels out of range; the message names the file.
        FileNotFoundError: if a folder is missing or empty, or an image has no mask, or a mask no image.
        RuntimeError: while loading, for an image that cannot be read, which the message names.

    Example:
        ``data: {class_path: SegmentationFolder, init_args: {root: cells, classes: [ground, cell]}}``
    """

    def __init__(
        self,
        root: str,
        classes: list[str] | None = None,
        *,
        ignore_index: int = 255,
        **kwargs: Any,
    ) -> None:
        root = check_root(self, root)
        fix = "Give a label that no class has, such as 255."
        self.ignore_index = integer(self, "ignore_index", ignore_index, -MAX_INTEGER, fix)
        super().__init__(**kwargs)
        classes = check_classes(self, classes, "the names in classes.txt")
        self.root: Path = Path(root)
        self.classes: list[str] = list(classes) if classes else self._read_classes()
        self._order = self._order_of_labels() if classes else None
        if 0 <= self.ignore_index < len(self.classes):
            raise ValueError(f"ignore_index={ignore_index} is one of the {len(self.classes)} classes: take another one")

    @property
    def has_test(self) -> bool:
        """Return whether there is a folder ``root/test``."""
        return (self.root / "test").is_dir()

    def _read_classes(self) -> list[str]:
        if self.predict_dir is not None and not self.root.is_dir():
            return []  # a checkpoint has its classes, and the training folders may be missing
        if not self.root.is_dir():
            raise FileNotFoundError(f"root={str(self.root)!r} is not a folder; {LAYOUT}")
        file = self.root / "classes.txt"
        if not file.is_file():
            raise FileNotFoundError(
                f"no classes.txt in root={str(self.root)!r}: write one, with the name of a class per line, the name of "
                "label 0 first; or give classes=[...]"
            )
        names = [line.strip() for line in read_text(file).splitlines()]
        names = [name for name in names if name]
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"{str(file)!r} must have two names or more, each once, and has {names}")
        return names

    def _order_of_labels(self) -> list[int] | None:
        """Return the new label of each label in the masks, where ``classes.txt`` has the names in another order."""
        if not (self.root / "classes.txt").is_file():
            return None
        found = self._read_classes()
        same = sorted(found) == sorted(self.classes)
        return permutation(found, self.classes) if same and found != self.classes else None

    def _load(self, split: Split) -> dict[Split, Source]:
        folder = self.root / split
        if split == "test" and not self.has_test:
            raise self._no_test(self.root, "Add ROOT/test/images and ROOT/test/masks")
        images, masks = folder / "images", folder / "masks"
        names = image_files(images, LAYOUT).keys() | image_files(masks, LAYOUT).keys()
        pairs = self._pairs(images, masks, sorted(names), LAYOUT, order=self._order)
        if split == "train":
            self._require_classes(pairs)
        return {split: pairs}

    def _require_classes(self, pairs: Pairs) -> None:
        """Find masks of 0 and 255, black and white, of which the latter would be ignored."""
        looked = np.linspace(0, len(pairs) - 1, min(LOOKED_AT, len(pairs))).astype(int)
        seen = set().union(*(np.unique(pairs.labels(index)).tolist() for index in looked))
        if self.ignore_index in seen and len(seen) <= 2:
            raise ValueError(
                f"the masks in {pairs.masks.root!r} have the labels {sorted(seen)}, of which {self.ignore_index} is "
                "ignored, so that no two classes are left: number the classes 0, 1, ..., or set another "
                "ignore_index, as -1"
            )
