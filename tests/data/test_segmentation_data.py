"""Data with masks: each layout, image and mask transformed alike, and what is wrong with files, named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.masks import CLASSES, write_ade, write_folder, write_pair, write_voc
from lightning.pytorch import seed_everything
from PIL import Image

from lit_tricks.data import ADE20KSegmentation, DigitSegmentation, SegmentationFolder, VOCSegmentation
from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.segmentation.pairs import EvalPair, RandomPair, read_mask, scaled

SMALL: dict[str, Any] = {"crop_size": 16, "base_size": 20, "batch_size": 2, "num_workers": 0}


def folder_data(root: Path, **args: Any) -> SegmentationFolder:
    return SegmentationFolder(str(root), **(SMALL | args))


def batches(data: ImageDataModule, seed: int = 0, epoch: int = 0) -> list[Any]:
    seed_everything(seed, verbose=False)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


LAYOUTS: dict[str, Callable[[Path], tuple[Any, int]]] = {
    "folder": lambda root: (folder_data(write_folder(root)), len(CLASSES)),
    "voc": lambda root: (VOCSegmentation(str(write_voc(root)), **SMALL), 21),
    "ade": lambda root: (ADE20KSegmentation(str(write_ade(root)), **SMALL), 150),
    "digits": lambda root: (DigitSegmentation(batch_size=2), 11),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_images_and_masks(layout: str, tmp_path: Path) -> None:
    data, classes = LAYOUTS[layout](tmp_path)
    assert data.num_classes == classes
    data.setup()
    channels, *size = data.input_size
    loaders = [data.train_dataloader(), data.val_dataloader()]
    if data.has_test:
        loaders.append(data.test_dataloader())
    else:
        with pytest.raises(FileNotFoundError, match="no test split"):
            data.test_dataloader()
    assert data.has_test == (layout == "digits")
    for loader in loaders:
        images, masks = next(iter(loader))
        assert images.shape == (2, channels, *size)
        assert images.dtype == torch.float32
        assert masks.shape == (2, *size)
        assert masks.dtype == torch.int64
        known = masks[masks != data.ignore_index]
        assert 0 <= known.min() <= known.max() < classes


def test_the_classes_of_voc_and_ade(tmp_path: Path) -> None:
    voc, ade = VOCSegmentation(str(tmp_path)).classes, ADE20KSegmentation(str(tmp_path)).classes
    assert (voc[0], voc[15], voc[20]) == ("background", "person", "tvmonitor")
    assert (ade[0], ade[149]) == ("1", "150")
    rows = [f"{i}\t0.1\t1\t1\t0\tname {i}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    assert ADE20KSegmentation(str(tmp_path)).classes[149] == "name 150"


def test_labels_of_a_palette_are_its_indices_and_borders_are_ignored(tmp_path: Path) -> None:
    """Pascal VOC: the colors that PIL shows are 0 to 20, and 255."""
    root = write_voc(tmp_path)
    data = VOCSegmentation(str(root), **SMALL)
    data.setup()
    image, mask = data.source("val")[0]
    file = root / "SegmentationClass" / "c.png"
    with Image.open(file) as stored:
        assert stored.mode == "P"
        assert torch.equal(mask, torch.from_numpy(np.array(stored)).long())
    assert set(mask.unique().tolist()) == {0, 20, 255}
    assert image.size == mask.shape[::-1]


def test_label_0_of_ade_is_ignored_and_the_others_move_down(tmp_path: Path) -> None:
    root = write_ade(tmp_path)
    data = ADE20KSegmentation(str(root), **SMALL)
    data.setup()
    stored = np.array(Image.open(root / "annotations" / "training" / "a.png"))
    mask = data.source("train")[0][1]
    assert set(np.unique(stored)) == {0, 1, 150}
    assert torch.equal(mask, torch.from_numpy(np.where(stored == 0, 255, stored.astype(int) - 1)))


def test_names_of_classes_from_a_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    assert folder_data(root).classes == list(CLASSES)
    assert folder_data(root, classes=["x", "y", "z", "w"]).classes == ["x", "y", "z", "w"]
    assert folder_data(tmp_path / "gone", predict_dir=str(root)).classes == []  # a checkpoint knows them


def test_scenes_are_masked_where_the_ink_is() -> None:
    data = DigitSegmentation()
    data.setup()
    scenes = data.source("train")
    image, mask = scenes[3]
    pixels = torch.from_numpy(np.array(image))
    assert set(mask.unique().tolist()) == {0} | {digit.label + 1 for digit in scenes.scenes[3][1]}
    assert pixels[mask > 0].min() > 0.3 * 255
    assert pixels[mask == 0].max() < 0.4 * 255
    labels = torch.stack([scenes[i][1] for i in range(50)])
    assert set(labels.unique().tolist()) == set(range(11))


@pytest.mark.slow
def test_mean_and_deviation_of_the_scenes() -> None:
    data = DigitSegmentation()
    data.setup()
    scenes = data.source("train")
    pixels = np.stack([np.asarray(scenes[i][0]) for i in range(len(scenes))])
    assert data.mean == (pytest.approx(pixels.mean(), abs=0.01),)
    assert data.std == (pytest.approx(pixels.std(), abs=0.01),)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


def ramp(width: int = 37, height: int = 23) -> tuple[Image.Image, torch.Tensor]:
    """An image whose red is the label of the pixel times 10, in blocks of 4 pixels."""
    rows, columns = np.mgrid[:height, :width]
    labels = (rows // 4 + columns // 4) % 8
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = labels * 10
    return Image.fromarray(pixels), torch.from_numpy(labels.astype(np.int64))


MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def test_image_and_mask_are_moved_alike() -> None:
    """At full scale the red of a pixel tells its label, wherever a crop and a flip have put it."""
    image, mask = ramp()
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, labels = RandomPair(16, (23, 23), True, MEAN, STD, 255)(image, mask)
        assert pixels.shape == (3, 16, 16)
        assert torch.equal(pixels[0], labels * 10.0)
        seen.add(tuple(labels[0].tolist()))
    assert len(seen) > 20


@pytest.mark.parametrize("short", [23, 46, 69, 31, 57])
def test_a_mask_that_is_resized_stays_on_the_grid_of_its_image(short: int) -> None:
    """PIL's nearest pixel is that at the middle; torch's interpolate would be half a pixel off."""
    image, mask = ramp()
    pixels, labels = scaled(image, mask, short, 3)
    assert min(labels.shape) == short
    assert pixels.shape[1:] == labels.shape
    size = labels.shape[::-1]
    nearest = Image.fromarray(mask.numpy().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    assert (torch.from_numpy(np.array(nearest)) == labels).float().mean() > 0.98  # but for ties
    smooth = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BILINEAR)))[..., 0]
    assert (smooth.int() - pixels[0].int()).abs().max() <= 2


def test_padding_has_the_mean_color_and_is_ignored() -> None:
    image, mask = ramp(12, 8)
    torch.manual_seed(0)
    pixels, labels = RandomPair(16, (8, 8), False, (1.0, 2.0, 3.0), (2.0, 2.0, 2.0), -7)(image, mask)
    assert torch.equal(labels[:8, :12], mask)
    assert (labels[8:] == -7).all()
    assert (labels[:, 12:] == -7).all()
    assert (pixels[:, 8:] == 0).all()
    torch.testing.assert_close(pixels[0, :8, :12], (mask * 10 - 1.0) / 2)


def test_scales_are_those_that_were_given() -> None:
    image, mask = ramp(40, 40)
    sides = {scaled(image, mask, short, 3)[1].shape for short in (20, 80)}  # type: ignore[union-attr]
    assert sides == {(20, 20), (80, 80)}
    data = SegmentationFolder("x", classes=["a", "b"])
    assert (data.train_transform.sides, data.train_transform.size) == ((260, 1040), 480)  # GluonCV's
    assert not DigitSegmentation().train_transform.flip


def test_evaluation_crops_the_centre_and_prediction_sees_all() -> None:
    image, mask = ramp(40, 20)
    transform = EvalPair(20, 20, MEAN, STD)
    pixels, labels = transform(image, mask)
    assert torch.equal(labels, mask[:, 10:30])
    assert torch.equal(pixels[0], labels * 10.0)
    whole = transform(image)
    assert whole.shape == (3, 20, 40)
    assert torch.equal(whole[0], mask * 10.0)
    assert EvalPair(10, 10, MEAN, STD)(image).shape == (3, 10, 20)


def test_an_epoch_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    root = write_folder(tmp_path, count=6)
    first = batches(folder_data(root))
    again = batches(folder_data(root, num_workers=2))
    assert all(
        torch.equal(x, y) for one, other in zip(first, again, strict=True) for x, y in zip(one, other, strict=True)
    )
    for other in (batches(folder_data(root), seed=1), batches(folder_data(root), epoch=1)):
        assert not all(torch.equal(one[1], two[1]) for one, two in zip(first, other, strict=True))


def test_images_to_predict_come_one_by_one_with_their_paths(tmp_path: Path) -> None:
    for name, size in (("a.png", (30, 20)), ("b/c.jpg", (20, 60))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / name)
    for data, channels, short in (
        (folder_data(tmp_path / "gone", predict_dir=str(tmp_path), batch_size=7), 3, 16),
        (DigitSegmentation(predict_dir=str(tmp_path)), 1, 64),
        (DigitSegmentation(predict_dir=str(tmp_path), eval_size=20), 1, 20),
    ):
        data.setup("predict")
        (first, one), (second, two) = list(data.predict_dataloader())
        assert first.shape == (1, channels, short, short * 3 // 2)
        assert second.shape == (1, channels, short * 3, short)
        assert (one, two) == ((str(tmp_path / "a.png"),), (str(tmp_path / "b/c.jpg"),))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def spoil(root: Path, **pair: Any) -> None:
    write_pair(root / "train" / "images" / "bad.png", root / "train" / "masks" / "bad.png", **pair)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "size": (
        lambda root: spoil(root, size=(24, 24), mask_size=(24, 20)),
        r"the mask '.*masks/bad\.png' has 24 x 20 pixels, and its image '.*images/bad\.png' 24 x 24",
    ),
    "label": (
        lambda root: spoil(root, labels=[0, 4, 9]),
        r"the mask '.*bad\.png' has labels out of range: 4, 9\. The 4 classes are 0 to 3, and 255 is ignored",
    ),
    "colors": (
        lambda root: spoil(root, mode="RGB"),
        r"the mask '.*bad\.png' has colors \(mode RGB\) and no labels",
    ),
    "broken mask": (
        lambda root: (spoil(root), (root / "train/masks/bad.png").write_bytes(b"no image")),
        r"cannot read the mask '.*masks/bad\.png'",
    ),
    "broken image": (
        lambda root: (spoil(root), (root / "train/images/bad.png").write_bytes(b"no image")),
        r"cannot read the image '.*images/bad\.png'",
    ),
    "no mask": (
        lambda root: (spoil(root), (root / "train/masks/bad.png").unlink()),
        r"no mask in '.*train/masks' for 'bad': each image needs a mask of the same name",
    ),
    "no image": (
        lambda root: (spoil(root), (root / "train/images/bad.png").unlink()),
        r"no image in '.*train/images' for 'bad'",
    ),
    "two images": (
        lambda root: (spoil(root), Image.new("RGB", (9, 9)).save(root / "train/images/bad.jpg")),
        r"'.*train/images' has both 'bad\.(png|jpg)' and 'bad\.(png|jpg)': remove one",
    ),
    "no split": (
        lambda root: (root / "val").rename(root / "validation"),
        r"there is no folder '.*val/images'; expected are ROOT/train/images/NAME\.jpg",
    ),
    "empty split": (
        lambda root: [file.unlink() for file in (root / "val").rglob("*.*")],
        r"no image in '.*val/images': files must end in \.jpg",
    ),
    "black and white": (
        lambda root: [spoil_all(root, file) for file in (root / "train/masks").iterdir()],
        r"have the labels \[0, 255\], of which 255 is ignored, so that no two classes are left",
    ),
}


def spoil_all(root: Path, file: Path) -> None:
    labels = np.array(Image.open(file))
    Image.fromarray(np.where(labels > 0, 255, 0).astype(np.uint8)).save(file)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    make, message = BAD[case]
    make(root)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        batches(folder_data(root, batch_size=1))


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "crop": ({"crop_size": 0}, "crop_size=0"),
    "scale": ({"scale": (0.0, 1.0)}, r"scale=\(0\.0, 1\.0\)"),
    "reversed": ({"scale": (2.0, 1.0)}, "scale must be two rising factors"),
    "std": ({"std": (1.0, 1.0, 0.0)}, "std="),
    "ignored": ({"ignore_index": 1}, "ignore_index=1 is one of the 4 classes"),
    "batch": ({"batch_size": 9}, "batch_size=9 is larger than the 4 training images"),
    "root": ({"root": "nowhere"}, "root='nowhere' is not a folder; expected are ROOT/train/images"),
    "eval_size": ({"eval_size": 0}, "eval_size=0"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments_are_rejected_by_name(case: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    args, message = ARGUMENTS[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SegmentationFolder(**({"root": str(root)} | SMALL | args)).setup()


def test_bad_lists_of_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "classes.txt").write_text("one\none\n")
    with pytest.raises(ValueError, match="two names or more"):
        folder_data(root)
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no classes.txt .*classes="):
        folder_data(root)


def test_bad_voc_and_ade(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc")
    with pytest.raises(FileNotFoundError, match=r"no '.*Segmentation/train_aug\.txt'"):
        VOCSegmentation(str(root), train_set="train_aug").setup()
    (root / "ImageSets/Segmentation/train.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="list of the images for train, is empty"):
        VOCSegmentation(str(root)).setup()
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nnowhere\n")
    with pytest.raises(FileNotFoundError, match=r"no image in .*'nowhere'"):
        VOCSegmentation(str(root)).setup()
    root = write_ade(tmp_path / "ade")
    write_pair(root / "images/training/x.jpg", root / "annotations/training/x.png", labels=[0, 151])
    with pytest.raises(ValueError, match=r"x\.png' .*151.*1 to 150"):
        batches(ADE20KSegmentation(str(root), **(SMALL | {"batch_size": 1})))
    (root / "objectInfo150.txt").write_text("Idx\n1\tx\n")
    with pytest.raises(ValueError, match="150 classes, and has 1"):
        ADE20KSegmentation(str(root))


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_masks_of_any_mode(mode: str, tmp_path: Path) -> None:
    labels = np.arange(12).reshape(3, 4) % 2 if mode == "1" else np.arange(12).reshape(3, 4)
    kinds = {"1": np.bool_, "I;16": np.uint16, "I": np.int32}
    image = Image.fromarray(labels.astype(kinds.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([255 - value for value in range(256)] * 3)
    file = tmp_path / ("mask.tif" if mode == "I" else "mask.png")
    image.save(file)
    assert np.array_equal(read_mask(str(file)), labels)
