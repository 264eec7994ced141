"""Images in litdata's shards, in a folder or a bucket, with the pipeline of ``ImageFolder``."""

from __future__ import annotations

import inspect
import os
import warnings
from functools import partial
from typing import Any, Literal

from torch.utils.data import DataLoader

from lit_tricks.data.checked_arguments import check_root
from lit_tricks.data.color import MEAN, STD, Triple
from lit_tricks.data.datamodule import Split
from lit_tricks.data.image_folder import ImageFolder, check_same_classes
from lit_tricks.data.io.bad_images import OnBadImage
from lit_tricks.data.io.jpeg import decode_image
from lit_tricks.data.loader import eval_batch_size
from lit_tricks.data.photos import Augmentation
from lit_tricks.data.samples import Source
from lit_tricks.data.shards.index import SPLITS, import_litdata, read_shards
from lit_tricks.data.shards.index_format import SCHEMES
from lit_tricks.data.transforms import Transform
from lit_tricks.utils.arguments import path

__all__ = ["Streaming"]


class Streaming(ImageFolder):
    """Images in shards, in a folder or a bucket, for data sets that do not fit on a disk.

    ``lit-tricks data shard`` makes the shards from a folder of images. Copy the shards to a bucket, or use them in
    place. [litdata](https://github.com/Lightning-AI/litdata) reads them. Crops, colors, sizes and classes are the same
    as in ``ImageFolder``.

    Each process and worker has its own samples. In training, the shards and the samples in each shard are shuffled by
    seed and epoch. Crops and colors depend only on seed, epoch and sample. A run that is resumed in the middle of an
    epoch continues with exactly the remaining samples, in the same order if the number of workers is the same. Training
    drops the samples that do not fill a batch in each process, and drops different samples in each epoch.

    boto3 sets the credentials and endpoint of S3 (``AWS_PROFILE``, ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...),
    and google-cloud-storage sets them for GCS. Shards of a bucket are cached in ``cache_dir``, by default
    ``~/.lightning/chunks``, up to three quarters of the free disk. Shards in a folder are read in place.

    Cost: needs ``pip install "lit-tricks[streaming]"``, and for GCS google-cloud-storage. It is as fast as
    ``ImageFolder`` from a local disk. Use ``ImageFolder`` if the files fit on the disk, since its batches do not depend
    on the number of workers. litdata checks PyPI for newer versions only if LITDATA_CHECK_UPDATES=1 is set.

    Args:
        root: folder, or URL that starts with s3:// or gs://, with the shards of ``train``, ``val`` and perhaps
            ``test``.
        image_size: side of the model's input in pixels, at least 1.
        batch_size: images in a batch of one process, from 1 to the number of training images.
        num_workers: processes that load, for each loader; "auto" shares the available cores among the processes of
            the machine, 16 at most; 0 loads in the main process.
        resize_size: short side before the center crop in pixels, at least ``image_size``; None is ``image_size``
            times 256/224, rounded.
        augmentation: "paper" crops, flips and changes colors; "basic" only crops and flips; "none" uses the transform
            of validation.
        mean: of the channels R, G, B on the 0-255 scale.
        std: standard deviation of the channels R, G, B on the 0-255 scale, above 0.
        predict_dir: folder whose image files, at any depth, ``predict_dataloader`` gives as (images, paths).
        random_erasing: probability that a rectangle of a training image is covered with the mean color, in [0, 1].
        decode: "auto" stops decoding a JPEG at the end of the crop; "exact" decodes the whole file, and also finds
            damage below the crop.
        workers: "process", or "thread" for one process with ``num_workers`` threads.
        on_bad_image: "raise" stops the run; "skip" uses another sample in training and no sample in evaluation, and
            lists bad samples in ``bad_images.csv`` in the run folder.
        cache_dir: folder that caches shards of a bucket; None is litdata's default.
        eval_size: side of the images in validation, test and prediction in pixels, at least 1; None is ``image_size``.
        exif: rotate images by their EXIF orientation; see ``ImageFolder``. Images that ``data shard --short-side`` has
            shrunk have no EXIF.
        classes: names of the classes in the order of the labels, for a model that was trained in another order; None is
            the order of the shards.

    Raises:
        ModuleNotFoundError: without litdata.
        ValueError: if an argument is out of range, the classes of train, val and test differ, or a run is resumed
            with other shards.
        FileNotFoundError: if there are no shards.
        PermissionError: if the bucket denies access.
        RuntimeError: if a shard in a folder is missing or cut off; and while loading, for a sample that cannot be
            read; the message names its shard and number.

    Example:
        ``data: {class_path: Streaming, init_args: {root: s3://bucket/imagenet, batch_size: 256}}``
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 256,
        num_workers: int | Literal["auto"] = "auto",
        resize_size: int | None = None,
        augmentation: Augmentation = "paper",
        mean: Triple = MEAN,
        std: Triple = STD,
        predict_dir: str | None = None,
        random_erasing: float = 0.0,
        decode: Literal["auto", "exact"] = "auto",
        workers: Literal["process", "thread"] = "process",
        on_bad_image: OnBadImage = "raise",
        cache_dir: str | None = None,
        eval_size: int | None = None,
        exif: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        if predict_dir is None:  # to predict, no shard is read
            import_litdata()
        root = check_root(self, root)
        cache_dir = path(self, "cache_dir", cache_dir, "Give a folder.", "the folder of litdata")
        self.cache_dir = cache_dir
        super().__init__(
            root,
            image_size,
            batch_size,
            num_workers,
            resize_size,
            augmentation,
            mean,
            std,
            predict_dir,
            random_erasing=random_erasing,
            decode=decode,
            workers=workers,
            on_bad_image=on_bad_image,
            eval_size=eval_size,
            exif=exif,
            classes=classes,
        )
        own = inspect.signature(type(self)).parameters
        for name in [name for name in self.hparams if not name.startswith("_") and name not in own]:
            del self.hparams[name]  # an argument of ImageFolder that this one does not have

    def source(self, split: Split) -> Source:
        """Return the shards of a split, whose labels are in the order of ``classes``."""
        shards: Any = super().source(split)
        shards.order = self._order
        return shards  # type: ignore[no-any-return]

    def train_dataloader(self) -> DataLoader[Any]:
        """Give shuffled and augmented training batches."""
        self._check_enough()
        return self._stream("train", self.train_transform)

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        return self._stream(split, self.eval_transform)

    def _stream(self, split: Split, transform: Transform) -> DataLoader[Any]:
        from lit_tricks.data.shards.loader import ShardSamples, StreamLoader, collate

        warnings.filterwarnings("ignore", "Your `IterableDataset` has `__len__` defined")  # litdata's is exact
        shards: Any = self.source(split)
        training, trainer, (replicas, rank) = split == "train", self.trainer, self._replicas()
        samples = self._samples(split, shards, transform)
        decode = partial(decode_image, exact=self.decode == "exact", exif=self.exif)
        dataset = ShardSamples(shards, samples, training, replicas, rank, decode)
        # New workers for each epoch: those that live on would not learn which one it is.
        loading = self._loader_args(samples) | {"persistent_workers": False, "collate_fn": collate}
        if replicas > 1 and not training:
            loading["batch_size"] = eval_batch_size(self.batch_size, len(shards), replicas)
        epoch = (lambda: trainer.current_epoch) if training and trainer is not None else None
        return StreamLoader(dataset, epoch, **loading)

    def _images_of_process(self) -> int:
        return len(self.source("train")) // self._replicas()[0]

    def _read_classes(self) -> list[str]:
        root = self.root
        if "://" in root and not root.startswith(SCHEMES):
            raise ValueError(f"root={root!r} must be a folder, or a URL that starts with {' or '.join(SCHEMES)}")
        if self.predict_dir is not None and not os.path.isdir(os.path.join(root, "train")):
            return []
        shards: dict[str, Any] = {split: self.source(split) for split in SPLITS if split != "test" or self.has_test}
        check_same_classes({split: each.classes for split, each in shards.items()}, "the classes", root)
        return list(shards["train"].classes)

    def _load(self, split: Split) -> dict[Split, Source]:
        try:
            return {split: read_shards(self.root, split, self.cache_dir)}
        except (FileNotFoundError, PermissionError) as error:  # also for missing files, without permission to list
            if split == "test":
                raise self._no_test(self.root, "Add shards of ROOT/test") from error
            raise

    @property
    def has_test(self) -> bool:
        """Return whether there are test shards."""
        try:
            self.source("test")
        except FileNotFoundError:
            return False
        return True
