"""Objects and their boxes: COCO's format, Pascal VOC's layout, and digits on canvases, which need no download."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from lit_tricks.data._base import ImageDataModule, Split, check_at_least_one
from lit_tricks.data._boxes import BoxFiles, OnBadBox, Picture, read_coco, read_voc, target_of
from lit_tricks.data._samples import JointSamples, Source
from lit_tricks.data._scenes import DigitScenes
from lit_tricks.data.transforms import to_rgb

__all__ = ["VOC_CLASSES", "CocoDetection", "DetectionDataModule", "DigitDetection", "VOCDetection"]

VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)  # the paper's, as for classification
SCENE_MEAN, SCENE_STD = 31.97, 53.16  # of the training scenes of split_seed=0
VISIBLE = 0.25  # part of a box that must be left for its object to count

Triple = tuple[float, float, float]
Target = dict[str, Tensor]


class DetectionDataModule(ImageDataModule):
    """Base: batches are (images, targets), two lists of the same length, since images differ in size.

    An image is float32 (C, H, W), normalised by ``mean`` and ``std``; the model is not to do so again. A target is a
    dict with ``boxes``, float32 (n, 4): (x0, y0, x1, y1) in pixels; ``labels``, int64 (n,), from 1 to ``num_classes``,
    as 0 is the background; and ``iscrowd``, int64 (n,), 1 where an object is neither to be found nor missed (a crowd,
    or difficult), which training images are without. An image without objects has n = 0, and is kept.

    Images are not resized here: the model does so, and gives its boxes in the pixels of the image.
    """

    sample_type = JointSamples
    eval_transform: Any
    train_transform: Any

    @staticmethod
    def collate(samples: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """Two lists: images, and their targets or paths."""
        images, others = zip(*samples, strict=True)
        return list(images), list(others)

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> NoReturn:
        """Refuse: a crop would lose objects, and the size at which they are looked for is the model's.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} gives whole images, and the model resizes them: set its min_size for another size"
        )


class BoxTransform:
    """From a PIL image, and its target if there is one, to a normalised tensor and the target that goes with it.

    Args:
        mean: of the channels on the 0-255 scale; one is grey, three are R, G, B.
        std: their standard deviation.
        flip: probability of a horizontal flip.
        scale: factor on the picture, drawn uniformly from this range. It keeps its size: what sticks out is cut at a
            random place, and what is missing is black.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], flip: float = 0.0, scale: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        self.mean, self.std, self.flip, self.scale = list(mean), list(std), flip, scale

    def __call__(self, image: Image.Image, target: Target | None = None) -> Any:
        """Transform an image, or an image and its target."""
        image = to_rgb(image) if image.mode not in ("RGB", "L") else image
        pixels = F.pil_to_tensor(image.convert("L" if len(self.mean) == 1 else "RGB"))
        if target is not None:
            target = dict(target)
            if self.flip and torch.rand(()) < self.flip:
                pixels, target["boxes"] = F.horizontal_flip(pixels), F.horizontal_flip(target["boxes"])
            if self.scale != (1.0, 1.0):
                factor = float(torch.empty(()).uniform_(*self.scale))
                pixels, target = zoom(pixels, target, factor, torch.rand(2).tolist())
            target["boxes"] = target["boxes"].as_subclass(Tensor)
        normal = F.normalize(pixels.float(), self.mean, self.std)
        return normal if target is None else (normal, target)


def zoom(pixels: Tensor, target: Target, factor: float, place: Sequence[float]) -> tuple[Tensor, Target]:
    """Make a picture larger or smaller, in a frame of the same size. Objects of which little is left are left out.

    Args:
        pixels: (C, H, W), uint8.
        target: with boxes as tv_tensors.
        factor: on the sides.
        place: where the frame lies in the picture or, of a smaller picture, where that lies in the frame: from the
            upper end (0) to the lower one (1), and from the left to the right.
    """
    height, width = pixels.shape[-2:]
    size = [max(1, round(side * factor)) for side in (height, width)]
    top, left = (round((new - old) * at) for new, old, at in zip(size, (height, width), place, strict=True))
    boxes = F.resize(target["boxes"], size)
    whole = _area(boxes)
    pixels = F.crop(F.resize(pixels, size, antialias=True), top, left, height, width)
    x0, y0, x1, y1 = (boxes.as_subclass(Tensor) - torch.tensor([left, top, left, top])).unbind(1)
    cut = torch.stack([x0.clamp(0, width), y0.clamp(0, height), x1.clamp(0, width), y1.clamp(0, height)], 1)
    kept = _area(cut) >= VISIBLE * whole
    canvas = BoundingBoxes(cut[kept], format="XYXY", canvas_size=(height, width))
    return pixels, {name: each[kept] for name, each in target.items() if name != "boxes"} | {"boxes": canvas}


class CocoDetection(DetectionDataModule):
    """Images in a folder, and their objects in one JSON file for each split, in the format of COCO.

    As COCO 2017 lies on disk: ``root/train2017/*.jpg``, ``root/annotations/instances_train2017.json``, and the same
    with ``val2017``. The classes are the file's categories in the order of their ids, numbered from 1; train and val
    must have the same. Without annotations of a test, the test is on the validation images. Crowds are not trained on.
    Training images are flipped with probability 1/2. See the base class for what a batch is.

    Args:
        root: folder that the next two are in.
        images: folder of the images of a split; ``{split}`` stands for train, val or test.
        annotations: file of the annotations of a split.
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        flip: probability that a training image is flipped from left to right, 0 to 1.
        scale: range of the factor by which a training picture grows or shrinks in its frame, as (0.5, 2.0).
        on_bad_box: "raise" stops at a box outside of its image, or without an area; "skip" leaves such out, and tells
            how many. COCO has some.
        mean: of the channels R, G, B on the 0-255 scale: those that the backbone's weights were trained with.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation can not be right.
        FileNotFoundError: if a folder, a file or an image is missing.

    Example:
        ``data: {class_path: CocoDetection, init_args: {root: coco, on_bad_box: skip}}``
    """

    def __init__(
        self,
        root: str,
        images: str = "{split}2017",
        annotations: str = "annotations/instances_{split}2017.json",
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        on_bad_box: OnBadBox = "raise",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        _set_transforms(self, mean, std, flip, scale, on_bad_box)
        self.root, self.images, self.annotations, self.on_bad_box = root, images, annotations, on_bad_box
        self.classes: list[str] = []
        if predict_dir is None or os.path.isdir(root):  # to predict, the data need not be there
            # the smaller file of the two that must agree
            self.classes = self._read("val")

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and not os.path.isfile(self._path(self.annotations, "test")):
            return {"test": self._source("val")}
        classes = self._read(split)
        if classes != self.classes:
            raise ValueError(
                f"{self._path(self.annotations, split)!r} has {len(classes)} categories and "
                f"{self._path(self.annotations, 'val')!r} {len(self.classes)}, or others; only one of them has "
                f"{', '.join(sorted({*classes} ^ {*self.classes})[:5]) or 'them in this order'}: they must be the same"
            )
        return {split: self._sources[split]}

    def _read(self, split: Split) -> list[str]:
        """Keep the images of a split, and give its classes."""
        if split in self._sources:
            return self.classes
        file, folder = self._path(self.annotations, split), self._path(self.images, split)
        classes, pictures = read_coco(file, folder, self.on_bad_box)
        self._sources[split] = BoxFiles(pictures, self._read_image, split == "train", self.on_bad_box)
        return classes

    def _path(self, pattern: str, split: Split) -> str:
        return os.path.join(self.root, pattern.format(split=split))


class VOCDetection(DetectionDataModule):
    """Images and objects in the layout of [Pascal VOC](http://host.robots.ox.ac.uk/pascal/VOC/).

    That is ``FOLDER/JPEGImages/*.jpg``, ``FOLDER/Annotations/*.xml`` and lists of images in
    ``FOLDER/ImageSets/Main/SET.txt``. Its pixels are counted from 1, so that a box (1, 1, w, h) becomes (0, 0, w, h).
    Difficult objects are not trained on, and not counted in the evaluation. Training images are flipped with
    probability 1/2. See the base class for what a batch is.

    Args:
        root: folder that the folders below are in; of VOC it is ``VOCdevkit``.
        train: lists of the training images, as FOLDER/SET: the defaults are the paper's, both years' ``trainval``.
        val: lists of the validation images. There is none beside the test of 2007, so that this is it, as in published
            figures.
        test: lists of the test images; None is ``val``.
        classes: names of the classes in the order of their labels, which start at 1; None are the 20 of VOC.
        batch_size: images in a batch of one process, at least 1.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of the
            machine, 16 at most; 0 loads in the main process.
        flip: probability that a training image is flipped from left to right, 0 to 1.
        scale: range of the factor by which a training picture grows or shrinks in its frame, as (0.5, 2.0).
        on_bad_box: "raise" stops at a box outside of its image, or without an area; "skip" leaves such out, and tells
            how many.
        mean: of the channels R, G, B on the 0-255 scale: those that the backbone's weights were trained with.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).

    Raises:
        ValueError: if an argument is out of range, a file is damaged, or an annotation can not be right.
        FileNotFoundError: if a folder, a file or an image is missing.

    Example:
        ``data: {class_path: VOCDetection, init_args: {root: VOCdevkit}}``
    """

    def __init__(
        self,
        root: str,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] = ("VOC2007/test",),
        test: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        flip: float = 0.5,
        scale: tuple[float, float] = (1.0, 1.0),
        on_bad_box: OnBadBox = "raise",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
    ) -> None:
        root = os.fspath(root)
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        _set_transforms(self, mean, std, flip, scale, on_bad_box)
        self.root, self.on_bad_box = root, on_bad_box
        self.lists: dict[Split, list[str]] = {"train": list(train), "val": list(val), "test": list(test or val)}
        for split, lists in self.lists.items():
            if not lists or not all(isinstance(each, str) for each in lists):
                raise ValueError(f"{split}={lists!r} must be lists of images, as ['VOC2007/trainval']")
        self.classes = list(VOC_CLASSES if classes is None else classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes={self.classes!r} must be names, each once")
        if predict_dir is None and not os.path.isdir(root):
            raise FileNotFoundError(f"root={root!r} is not a folder: give that of VOC2007 and VOC2012, or of your own")

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and self.lists["test"] == self.lists["val"]:
            return {"test": self._source("val")}
        pictures: list[Picture] = []
        for each in self.lists[split]:
            folder, name = os.path.split(each)
            pictures += read_voc(os.path.join(self.root, folder), name, self.classes, self.on_bad_box)
        return {split: BoxFiles(pictures, self._read_image, split == "train", self.on_bad_box)}


class DigitDetection(DetectionDataModule):
    """Handwritten digits on grey canvases: one to four of ten classes, at random places and sizes.

    Scenes are drawn from scikit-learn's digits (see ``Digits``), those of each split from digits of its own: 1000 to
    train, 200 for validation, 200 for the test, the same every time. Labels are the digit plus 1. They are not flipped.
    See the base class for what a batch is.

    Args:
        batch_size: images in a batch of one process, 1 to 1000.
        num_workers: loading processes; "auto" is 0 here, as the scenes are tiny.
        size: side of a canvas in pixels, at least 32.
        split_seed: decides which digits are for training, validation and test; any integer from 0 to 2**32 - 1.
        scale: range of the factor by which a training scene grows or shrinks in its frame.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths), grey.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if ``predict_dir`` is not a folder, or holds no image.

    Example:
        ``data: {class_path: DigitDetection, init_args: {batch_size: 16}}``
    """

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int | Literal["auto"] = "auto",
        size: int = 64,
        split_seed: int = 0,
        scale: tuple[float, float] = (0.8, 1.25),
        predict_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, predict_dir)
        self.save_hyperparameters()
        check_at_least_one("size", size)
        if size < 32:
            raise ValueError(f"size={size} leaves no room for digits: give at least 32 pixels")
        _set_transforms(self, (SCENE_MEAN,), (SCENE_STD,), 0.0, scale, "raise")
        self.classes = [str(digit) for digit in range(10)]
        self.size, self.split_seed = size, split_seed
        self.input_size = (1, size, size)

    def _auto_workers(self) -> int:
        return 0

    def _load(self, split: Split) -> dict[Split, Source]:
        return {split: _Scenes(split, self.split_seed, self.size)}


class _Scenes:
    """Scenes with their boxes."""

    def __init__(self, split: Split, split_seed: int, size: int) -> None:
        self.scenes = DigitScenes(split, split_seed, size)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, Target]:
        image, placed = self.scenes[index]
        boxes = torch.tensor([each.box for each in placed], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([each.label + 1 for each in placed], dtype=torch.int64)
        return image, target_of(boxes, labels, torch.zeros_like(labels), image.size)


def _set_transforms(
    data: DetectionDataModule,
    mean: Sequence[float],
    std: Sequence[float],
    flip: float,
    scale: tuple[float, float],
    on_bad_box: str,
) -> None:
    """Check what the data modules have in common, and set the transforms."""
    if len(mean) != len(std) or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, those of std above 0, got {mean} and {std}")
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, from 0 to 1, got {flip!r}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be two rising factors above 0, as (0.5, 2.0), got {scale!r}")
    if on_bad_box not in ("raise", "skip"):
        raise ValueError(f'on_bad_box must be "raise" or "skip", got {on_bad_box!r}')
    data.mean, data.std = tuple(mean), tuple(std)
    data.input_size = (len(mean), 224, 224)  # any; the model resizes
    data.eval_transform = BoxTransform(mean, std)
    data.train_transform = BoxTransform(mean, std, flip, (float(scale[0]), float(scale[1])))


def _area(boxes: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.as_subclass(Tensor).unbind(1)
    return (x1 - x0) * (y1 - y0)
