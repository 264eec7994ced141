"""Any folder of images, ImageNet above all, with the pipeline of the "Bag of Tricks" baseline."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lit_tricks.data.checked_arguments import (
    check_classes,
    check_eval_size,
    check_root,
    check_seed,
    check_side,
    check_statistics,
)
from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.crops import CentreCrop
from lit_tricks.data.datamodule import Split, resize_size_for
from lit_tricks.data.io.bad_images import OnBadImage
from lit_tricks.data.io.decoded import Cache, DecodedFiles
from lit_tricks.data.io.file_index import Paths, class_folders, list_images
from lit_tricks.data.io.formats import ENDINGS
from lit_tricks.data.io.jpeg import read_image
from lit_tricks.data.io.label_tables import is_table
from lit_tricks.data.photos import Augmentation, PhotoDataModule, random_crop
from lit_tricks.data.samples import Files, Reader, Source
from lit_tricks.data.splits import held_out, split_folder, split_name
from lit_tricks.data.transforms import Transform
from lit_tricks.utils.arguments import MAX_SIDE, choice, flag, integer, invalid, number
from lit_tricks.utils.class_names import composed, permutation
from lit_tricks.utils.files import printable

__all__ = ["ImageFolder", "check_same_classes"]

LAYOUT = "expected are ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg, and ROOT/test/CLASS/*.jpg if there is a test"
SHOWN = 5  # names in an error message
USUAL_BATCH = 256
LEAST_BATCHES = 4  # of an epoch
LEAST_BATCH = 4  # images: batch normalization needs several


class ImageFolder(PhotoDataModule):
    """Images in folders named by their class: ``root/train/CLASS/*.jpg``, ``root/val/CLASS/*.jpg``.

    The folder for validation may also be called ``valid``, ``validation``, ``eval`` or ``dev``.

    With the defaults it is the input pipeline of [He et al., 2019](https://arxiv.org/abs/1812.01187), section 2.1.
    Training crops 8 to 100 % of the area at an aspect ratio of 3/4 to 4/3 and resizes the crop to ``image_size``. Every
    second image is flipped horizontally. Coefficients of brightness, saturation and hue come from U[0.6, 1.4], and PCA
    noise has coefficients from N(0, 0.1). Evaluation resizes the short side to ``resize_size`` and crops the center.
    All resizing is antialiased bilinear.

    The workers read, decode, crop, resize and flip, and return uint8. All color transforms run on the training device
    in one pass over the batch (``on_after_batch_transfer``), in floating point and without clipping. The hue rotates by
    (coefficient - 1) * pi radians in YIQ, as in the authors' framework, MXNet. Pass the data module to the Trainer, not
    its loaders, which return uint8.

    The classes are the folders of ``root/train``, sorted, unless ``classes`` sets their order. Hidden folders and files
    are ignored: names that begin with a dot, and folders of operating systems, such as ``__MACOSX`` and ``@eaDir``.
    Without ``root/test`` there is no test. Files are found by their ending, at any depth: .jpg, .jpeg, .png, .ppm,
    .bmp, .pgm, .tif, .tiff, .webp, .gif (the first frame), .avif (Pillow 11.3 or newer) and .heic, .heif (with ``pip
    install "lit-tricks[heic]"``). Gray, CMYK, palette and transparent images become RGB (alpha is dropped). In
    validation, several processes share the images, and each image is counted once.

    Lists of 5000 files and more are stored in the cache folder of the user, and only folders that have changed are read
    again. ``LIT_TRICKS_CACHE`` sets another folder; if it is empty, nothing is stored.

    Args:
        root: folder with ``train``, ``val`` and perhaps ``test``.
        image_size: side of the model's input in pixels, at least 1.
        batch_size: images in a batch of one process, from 1 to the number of training images. "auto" is 256, and for
            fewer than 1024 training images the power of two that gives at least four batches. `lit-tricks fit` then
            adds LinearScaling, unless you set the optimizer. For validation in several processes the batch may be
            smaller, so that all have as many batches.
        num_workers: processes or threads that load, for each loader; "auto" shares the available cores among the
            processes of the machine, 16 at most; 0 loads in the main process.
        resize_size: short side before the center crop in pixels, at least ``image_size``; None is ``image_size``
            times 256/224, rounded.
        augmentation: "paper" is the above; "basic" only crops and flips; "none" trains on the resized center crop;
            "trivial" (TrivialAugment), "rand" (RandAugment), "augmix" (AugMix) are torchvision's, after "basic".
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        random_erasing: probability that a rectangle of a training image, 2 to 33 % of it, gets the mean color
            ([Zhong et al., 2017](https://arxiv.org/abs/1708.04896)), before the colors are changed; 0 to 1.
        repeats: number of times that an image is in an epoch, augmented differently each time; the epoch has the same
            number of samples, from fewer images ([Hoffer et al., 2020](https://arxiv.org/abs/1901.09335)). At least 1.
        decode: "auto" decodes a JPEG down to the bottom of the crop, which gives the same pixels. It finds truncated
            files, but no damage below the crop. "exact" decodes the whole file. If TurboJPEG 3 is installed (the extra
            ``turbojpeg``, or the system's library), both skip the columns to the sides of the crop.
        workers: "process", or "thread" for threads in one process per loader, which saves memory and prefetches fewer
            batches. Threads take turns in torchvision's augmentations.
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is ``image_size``.
        on_bad_image: "raise" stops at a file that cannot be read; "skip" continues. In training, another image replaces
            the bad one, chosen by the seed. In evaluation, the batch is smaller (a batch without other images gets a
            replacement). Skipped files are counted (``data/bad_images``, by the first process) and listed in
            ``bad_images.csv`` in the run folder.
        exif: rotate images by their EXIF orientation, in every split, in prediction and in ``input_transform``. Use
            true for photos of phones and cameras. The default is false, as in torchvision and timm: published figures
            and weights are for images that are not rotated. HEIC files are always turned. Exported models keep the
            rule.
        cache: decode the images once, and keep their pixels at the short side that evaluation needs: ``resize_size``,
            or more with ``eval_size``. "memory" keeps them in memory, "disk" in one file per split in the cache folder,
            which all processes share. Evaluation does not change. Random crops come from the smaller image, so small
            crops have less detail. None decodes each time.
        val_fraction: part of each class that is held out for validation, above 0 and below 1, where ``root`` has no
            folder for it. The classes may then be folders of ``root`` itself. The split is stored with the images in
            split_FRACTION_SEED.csv, so that images that are added later do not move others.
        split_seed: decides which images are held out.
        classes: names of the class folders in the order of the labels, for a model that was trained in another order;
            None sorts them.
        balance: how far training evens out the frequencies of the classes, from 0 to 1. Classes of n images are drawn
            in proportion to ``n ** (1 - balance)``: 0 draws each image once per epoch, 0.5 takes the square root of the
            frequencies, and 1 draws all classes equally often
            ([Kang et al., 2020](https://arxiv.org/abs/1910.09217)). The epoch has the same number of samples. The draws
            depend only on the seed and the epoch, and each draw of an image is augmented differently.

    Raises:
        ValueError: if an argument is out of range, the class folders of train, val and test differ, or the ``cache``
            does not fit; the message has the number of bytes.
        FileNotFoundError: if a folder is missing or holds no image.
        RuntimeError: while loading, for a file that cannot be read, which the message names; with "skip" for 20 in a
            row; and if a process that loads was killed.

    Example:
        ``data: {class_path: ImageFolder, init_args: {root: imagenet, batch_size: 256}}``
    """

    _fits_batch = False  # whether few training images get smaller batches
    _order: list[int] | None = None  # new label of each class folder; None leaves the labels as they are

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int | Literal["auto"] = "auto",
        num_workers: int | Literal["auto"] = "auto",
        resize_size: int | None = None,
        augmentation: Augmentation = "paper",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        random_erasing: float = 0.0,
        repeats: int = 1,
        decode: Literal["auto", "exact"] = "auto",
        workers: Literal["process", "thread"] = "process",
        eval_size: int | None = None,
        on_bad_image: OnBadImage = "raise",
        exif: bool = False,
        cache: Cache | None = None,
        val_fraction: float | None = None,
        split_seed: int = 0,
        classes: list[str] | None = None,
        balance: float = 0.0,
    ) -> None:
        root = check_root(self, root)
        super().__init__(USUAL_BATCH if batch_size == "auto" else batch_size, num_workers, predict_dir)
        self._fits_batch = batch_size == "auto"
        image_size = check_side(self, "image_size", image_size)
        repeats = integer(self, "repeats", repeats, 1, "1 is usual.")
        fix = "1 draws all classes equally often, 0.5 is the square root, and 0 changes nothing."
        balance = number(self, "balance", balance, "[0, 1]", fix)
        least = f"{image_size}, which is image_size, leaves the crop as large as the image."
        resize_size = integer(self, "resize_size", resize_size, 1, least, MAX_SIDE, "256/224 of image_size")
        random_erasing = number(self, "random_erasing", random_erasing, "[0, 1]", "It is a probability.")
        val_fraction = number(
            self, "val_fraction", val_fraction, "(0, 1)", "0.2 holds out a fifth.", "a folder of validation images"
        )
        split_seed = check_seed(self, split_seed)
        exif = flag(self, "exif", exif)
        eval_size = check_eval_size(self, eval_size)
        mean, std = check_statistics(self, mean, std)
        if len(mean) != 3:
            raise invalid(self, "the images have three channels. Give three numbers.", mean=mean, std=std)
        classes = check_classes(self, classes, "the names of the folders")
        self.save_hyperparameters()
        resize_size = round(image_size * 256 / 224) if resize_size is None else resize_size
        if resize_size < image_size:
            raise ValueError(f"resize_size={resize_size} is less than image_size={image_size}: the crop would not fit")
        choice(self, "augmentation", augmentation, get_args(Augmentation))
        choice(self, "decode", decode, ("auto", "exact"))
        choice(self, "workers", workers, ("process", "thread"))
        choice(self, "on_bad_image", on_bad_image, get_args(OnBadImage))
        choice(self, "cache", cache, (*get_args(Cache), None))
        if augmentation == "none" and random_erasing:
            raise ValueError(f'augmentation="none" erases nothing, and random_erasing={random_erasing}: use "basic"')
        self.root = root
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        found = self._read_classes()
        self.classes: list[str] = list(classes) if classes else found
        self._order = permutation(found, self.classes) if classes and found else None
        self.input_size: tuple[int, int, int] = (3, image_size, image_size)
        self.crop_ratio: float = image_size / resize_size
        self._short_side = resize_size  # of images in the cache
        self.mean, self.std = mean, std
        self.repeats = repeats
        self.balance = balance
        self.decode = decode
        self.thread_workers = workers == "thread"
        self.on_bad_image = on_bad_image
        self.exif = exif
        self.cache = cache
        self.eval_transform = CentreCrop(image_size, resize_size)
        self.train_transform = self.eval_transform
        if eval_size is not None:
            self.eval_transform = self.eval_transform_at(eval_size)
            self._short_side = max(resize_size, resize_size_for(eval_size, None, default=self.crop_ratio))
        if augmentation != "none":
            self.train_transform = random_crop(image_size, augmentation, mean, std, random_erasing)

    @property
    def has_test(self) -> bool:
        """Return whether there is a folder ``root/test``."""
        return os.path.isdir(os.path.join(self.root, "test"))

    def fits_small_batch(self) -> bool:
        """Return whether the batch size is "auto", and smaller than usual because there are few training images."""
        return self._fits_batch and self._images_of_process() < LEAST_BATCHES * USUAL_BATCH

    def eval_transform_at(self, image_size: int, crop_ratio: float | None = None) -> Transform:
        """Make the transform of evaluation for another size (see the base class)."""
        return CentreCrop(image_size, resize_size_for(image_size, crop_ratio, default=self.crop_ratio))

    def _check_enough(self) -> None:
        if self.batch_size == self._given_batch_size and self.fits_small_batch():
            images = self._images_of_process()
            fitting = 2 ** int(math.log2(max(1, images // LEAST_BATCHES)))
            self.batch_size = self._given_batch_size = max(fitting, min(LEAST_BATCH, images))
            rank_zero_info(
                f'batch_size="auto" is {self.batch_size} for {images} training images. Learning rates are usually for '
                f"{USUAL_BATCH}: the trick LinearScaling scales them."
            )
        super()._check_enough()

    def _file_reader(self) -> Reader:
        return partial(read_image, exact=self.decode == "exact", exif=self.exif)

    def _read_classes(self) -> list[str]:
        # Prediction needs no training folders, since the checkpoint has the classes.
        is_there = os.path.isdir(os.path.join(self.root, "train"))
        if self.predict_dir is not None and not is_there:
            return []
        return _find_classes(self.root, self._folder("train"), self.val_fraction)

    def _folder(self, split: Split) -> str:
        """Return the folder of a split, from which validation images may have to be held out."""
        folder = split_folder(self.root, split)
        if self.val_fraction is None or os.path.isdir(folder) or split == "test":
            return folder
        return self.root if split == "train" else self._folder("train")

    def _holds_out(self) -> bool:
        """Return whether validation images are taken from the training images."""
        return self.val_fraction is not None and self._folder("train") == self._folder("val")

    def _split_file(self) -> Path:
        """Return the file that keeps which images are held out."""
        return Path(self._folder("train"), split_name(self.val_fraction or 0, self.split_seed))

    def _load(self, split: Split) -> dict[Split, Source]:
        if split == "test" and not self.has_test:
            raise self._no_test(self.root, "Add ROOT/test/CLASS/*.jpg")
        paths, labels = self._listed(split)
        read = self._file_reader()
        if split == "test" or self.val_fraction is None or not self._holds_out():
            return {split: self._kept(Files(paths, read, labels))}
        chosen = held_out(paths.root, paths, labels.tolist(), self.val_fraction, self.split_seed, self._split_file())
        parts: dict[Split, Source] = {}
        for name, mask in (("train", ~chosen), ("val", chosen)):
            names = (os.fsencode(paths[index]) for index in np.flatnonzero(mask).tolist())
            parts[name] = self._kept(Files(Paths("", names), read, labels[torch.from_numpy(mask)]))  # type: ignore[index]
        return parts

    def _listed(self, split: Split) -> tuple[Paths, Tensor]:
        """Return the files of a split, and their labels; of both splits where validation images are held out."""
        folder = self._folder(split)
        paths, labels, folders = list_images(folder)
        classes = map(printable, folders)
        counts = dict(zip(classes, np.bincount(labels, minlength=len(folders)).tolist(), strict=True))
        empty = [name for name in self.classes if not counts.get(name)]
        if empty:
            raise FileNotFoundError(
                f"no image in {len(empty)} of the {self.num_classes} class folders of {folder!r}: {_some(empty)}; "
                f"files must end in {' '.join(ENDINGS)}"
            )
        return paths, labels if self._order is None else torch.tensor(self._order)[labels]

    def _kept(self, files: Files) -> Source:
        """Return the files, or their decoded pixels where they are kept."""
        if self.cache is None:
            return files
        return DecodedFiles(files, self._short_side, self.cache, type(self).__name__)


def _find_classes(root: str, train: str, val_fraction: float | None) -> list[str]:
    """List the class folders, which must be the same for all splits."""
    if not os.path.isdir(root):
        raise FileNotFoundError(f"root={root!r} is not a folder; {LAYOUT}")
    folders = {"train": train} | {split: split_folder(root, split) for split in ("val", "test")}
    needed = ("train", "val") if val_fraction is None else ("train",)
    for split in needed:
        if not os.path.isdir(folders[split]):
            raise FileNotFoundError(f"no folder {split!r} in root={root!r}{_remedy(root, split)}; {LAYOUT}")
    classes = {
        split: list(map(printable, class_folders(folder))) for split, folder in folders.items() if os.path.isdir(folder)
    }
    for split, names in classes.items():
        if not names:
            raise FileNotFoundError(f"no class folder in {folders[split]!r}; {LAYOUT}")
    [first, *others] = class_folders(train)
    inner = os.path.join(train, first)
    if not others and class_folders(inner):
        raise ValueError(
            f"{train!r} holds one folder, {first!r}, with folders in it: if these are the classes, give --data.root "
            f"{inner} --data.val_fraction 0.2, or move them up"
        )
    check_same_classes(classes, "the class folders", root)
    return classes["train"]


def _remedy(root: str, split: str) -> str:
    """Return the remedy for a missing folder, from the folders that exist."""
    names = class_folders(root)
    if is_table(root):
        return f", and its labels are in metadata: give --data ImageTable --data.table {root}"
    if split == "val":
        return ": give --data.val_fraction 0.2 to hold out a fifth of the training images"
    if len(names) == 1 and {"train", "val"} & {*class_folders(os.path.join(root, names[0]))}:
        return f", and {names[0]!r} in it has one: give --data.root {os.path.join(root, names[0])}"
    if len(names) > 1 and "val" not in names:
        return ": if its folders are the classes, give --data.val_fraction 0.2 to hold out a fifth"
    return ""


def check_same_classes(classes: Mapping[str, Sequence[str]], what: str, root: str) -> None:
    """Raise ValueError unless all splits have the classes of "train", in the same order."""
    train = list(classes["train"])
    for split, names in classes.items():
        if list(names) != train:
            only_train, only_here = sorted({*train} - {*names}), sorted({*names} - {*train})
            found = f"only in train: {_some(only_train)}; only in {split}: {_some(only_here)}"
            if not only_train and not only_here:
                found = "they are in another order"
            elif sorted(map(composed, names)) == sorted(map(composed, train)):
                found = f"names look alike, and differ in Unicode form ({_some(only_here)}). Rename one of the folders"
            raise ValueError(f"{what} of train and {split} in root={root!r} differ: {found}")


def _some(names: list[str]) -> str:
    """Return the first few names, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
