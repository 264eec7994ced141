"""ADE20K, with a mask of each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_tricks.data.checked_arguments import check_root
from lit_tricks.data.datamodule import Split
from lit_tricks.data.samples import Source
from lit_tricks.data.segmentation.base import MaskFolders, image_files
from lit_tricks.utils.files import read_text

__all__ = ["ADE20KSegmentation"]

LAYOUT = "expected are images/training, images/validation, and the same below annotations, as in ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}


class ADE20KSegmentation(MaskFolders):
    """ADE20K as in the Scene Parsing Challenge ([Zhou et al., 2017](https://arxiv.org/abs/1608.05442)): 150 classes.

    Label 0 of the files, "other", is ignored, and 1 to 150 become 0 to 149. Names are read from ``objectInfo150.txt``
    where it is there. The masks of the test images are not public, so there is no test. All
    else is as in ``SegmentationFolder``.

    Args:
        root: folder with ``images`` and ``annotations``, each with ``training`` and ``validation``.
        kwargs: ``crop_size``, ``base_size``, ``scale``, ``flip``, ``batch_size``, ``num_workers``, ``mean``, ``std``,
            ``predict_dir`` and ``eval_size``, which ``lit-tricks show ADE20KSegmentation`` explains.

    Raises:
        ValueError: as ``SegmentationFolder``.
        FileNotFoundError: as ``SegmentationFolder``.

    Example:
        ``data: {class_path: ADE20KSegmentation, init_args: {root: ADEChallengeData2016}}``
    """

    def __init__(
        self,
        root: str,
        **kwargs: Any,
    ) -> None:
        root = check_root(self, root)
        super().__init__(**kwargs)
        self.root: Path = Path(root)
        self.classes: list[str] = _read_classes(self.root / "objectInfo150.txt")

    @property
    def has_test(self) -> bool:
        """False: the masks of the test images are not public."""
        return False

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test":
            raise self._no_test(self.root)
        images, masks = (self.root / kind / FOLDERS[split] for kind in ("images", "annotations"))
        names = image_files(images, LAYOUT).keys() | image_files(masks, LAYOUT).keys()
        return {split: self._pairs(images, masks, sorted(names), LAYOUT, offset=1)}


def _read_classes(file: Path) -> list[str]:
    """Return the names of the 150 classes: the last column of the file, or their numbers in it."""
    if not file.is_file():
        return [str(number) for number in range(1, 151)]
    _, *rows = read_text(file).splitlines()
    names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
    if len(names) != 150:
        raise ValueError(f"{str(file)!r} must have a head and 150 classes, and has {len(names)}")
    return names
