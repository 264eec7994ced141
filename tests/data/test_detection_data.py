"""Data modules of objects: what a batch is, boxes that move with the image, and what bad input is answered with."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.boxes import CLASSES, OBJECTS, change_coco, coco_content, voc_xml, write_coco, write_image, write_voc
from PIL import Image
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes

from lit_tricks.data import CocoDetection, DigitDetection, VOCDetection
from lit_tricks.data.datamodule import ImageDataModule
from lit_tricks.data.detection.base import zoom
from lit_tricks.data.synthetic.digit_scenes import DigitScenes

KINDS = ("coco", "voc")


def coco(root: Path, **kwargs: Any) -> CocoDetection:
    return CocoDetection(str(root), **({"batch_size": 3, "num_workers": 0} | kwargs))


def voc(root: Path, **kwargs: Any) -> VOCDetection:
    lists: dict[str, Any] = {"train": ["A/train"], "val": ["A/val"], "classes": CLASSES}
    return VOCDetection(str(root), **(lists | {"batch_size": 3, "num_workers": 0} | kwargs))


def module(kind: str, root: Path, **kwargs: Any) -> Any:
    if kind == "coco":
        return coco(write_coco(root), **kwargs)
    return voc(write_voc(root, ("A/train", "A/val")), **kwargs)


def file_of(kind: str, root: Path, split: str, i: int) -> Path:
    return root / (f"{split}2017/{i}.jpg" if kind == "coco" else f"A/JPEGImages/{split}{i}.jpg")


def same(one: Any, other: Any) -> bool:
    (images, targets), (others, their_targets) = one, other
    return all(map(torch.equal, images, others)) and all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        for mine, theirs in zip(targets, their_targets, strict=True)
    )


# What a batch is


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_read(kind: str, tmp_path: Path) -> None:
    data = module(kind, tmp_path)
    assert isinstance(data, ImageDataModule)
    assert (data.classes, data.num_classes) == (CLASSES, 2)
    [(images, targets)] = data.val_dataloader()
    assert (type(images), type(targets)) == (list, list)
    for i, (image, target, objects) in enumerate(zip(images, targets, OBJECTS, strict=True)):
        assert (image.dtype, image.shape) == (torch.float32, (3, 30, 40))
        pixels = np.asarray(Image.open(file_of(kind, tmp_path, "val", i)), dtype=np.float64)
        expected = (pixels - data.mean) / data.std
        np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=0.1)  # two decoders of JPEG
        assert type(target["boxes"]) is Tensor
        assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
        assert target["boxes"].shape == (len(objects), 4)
        assert target["boxes"].tolist() == [list(map(float, box)) for box, _ in objects]
        assert target["labels"].tolist() == [label for _, label in objects]
        assert target["iscrowd"].tolist() == [0] * len(objects)
    assert not data.has_test
    with pytest.raises(FileNotFoundError, match="no test split"):
        data.test_dataloader()


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_flipped_with_their_boxes(kind: str, tmp_path: Path) -> None:
    plain, flipped = (module(kind, tmp_path, flip=flip).train_dataloader().dataset for flip in (0.0, 1.0))
    for i, objects in enumerate(OBJECTS):
        assert torch.equal(flipped[i][0], plain[i][0].flip(-1))
        expected = [[40.0 - x1, float(y0), 40.0 - x0, float(y1)] for (x0, y0, x1, y1), _ in objects]
        assert flipped[i][1]["boxes"].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_crowds_and_difficult_objects_are_not_trained_on(kind: str, tmp_path: Path) -> None:
    data = module(kind, tmp_path)
    for split in ("train", "val"):
        content = coco_content()
        content["annotations"][0]["iscrowd"] = 1
        if kind == "coco":
            change_coco(tmp_path, split, content)
        else:
            first, second = (voc_xml([each], difficult=i) for each, i in zip(OBJECTS[0], (1, 0), strict=True))
            path = tmp_path / "A" / "Annotations" / f"{split}0.xml"
            path.write_text(first.replace("</annotation>", second[second.index("<object>") :]))
    data = coco(tmp_path) if kind == "coco" else voc(tmp_path)
    assert data.train_dataloader().dataset[0][1]["labels"].tolist() == [2]
    target = data.val_dataloader().dataset[0][1]
    assert (target["labels"].tolist(), target["iscrowd"].tolist()) == ([1, 2], [1, 0])


def test_images_of_many_sizes_are_a_batch(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    Image.new("L", (17, 90)).save(root / "val2017" / "1.jpg")  # gray; the annotation is silent on its size
    content = coco_content()
    del content["images"][1]["width"]
    change_coco(root, "val", content)
    [(images, _)] = coco(root).val_dataloader()
    assert [tuple(image.shape) for image in images] == [(3, 30, 40), (3, 90, 17), (3, 30, 40)]


def test_years_of_voc_are_joined(tmp_path: Path) -> None:
    root = write_voc(tmp_path, ("VOC2007/trainval", "VOC2012/trainval", "VOC2007/test"))
    data = VOCDetection(str(root), classes=CLASSES, batch_size=2, num_workers=0)
    assert len(data.train_dataloader().dataset) == 6
    assert len(data.val_dataloader().dataset) == 3
    assert VOCDetection(str(root)).num_classes == 20


def test_digits_are_where_their_boxes_are() -> None:
    data = DigitDetection()
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        scenes = DigitScenes(split)
        samples: Any = loader.dataset
        samples.transform = data.eval_transform
        assert len(samples) == len(scenes) == {"train": 1000, "val": 200}[split]
        for i in range(20):
            image, target = samples[i]
            scene, placed = scenes[i]
            pixels = image * data.std[0] + data.mean[0]
            np.testing.assert_allclose(pixels[0], np.asarray(scene), atol=1e-3)
            assert target["labels"].tolist() == [each.label + 1 for each in placed]
            assert target["boxes"].tolist() == [list(each.box) for each in placed]
            outside = pixels[0].clone()
            for x0, y0, x1, y1 in target["boxes"].int().tolist():
                assert outside[y0:y1, x0:x1].max() > 150  # ink
                outside[y0:y1, x0:x1] = 0
            assert outside.max() < 120  # the edges of a stroke


@pytest.mark.slow
def test_training_scenes_are_normalised() -> None:
    data = DigitDetection(scale=(1.0, 1.0))
    images = torch.stack([data.train_dataloader().dataset[i][0] for i in range(1000)])
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_zoom_moves_boxes_with_the_picture() -> None:
    """A bright rectangle lies where its box is, whatever the factor and place."""
    for factor, place in (
        (0.5, (0.0, 0.0)),
        (0.7, (1.0, 0.3)),
        (1.0, (0.5, 0.5)),
        (1.5, (0.5, 0.2)),
        (2.0, (0.4, 0.6)),
    ):
        pixels = torch.zeros(1, 60, 80, dtype=torch.uint8)
        pixels[:, 24:36, 30:50] = 200
        target = {
            "boxes": BoundingBoxes(torch.tensor([[30.0, 24, 50, 36]]), format="XYXY", canvas_size=(60, 80)),
            "labels": torch.tensor([4]),
            "iscrowd": torch.tensor([0]),
        }
        found, moved = zoom(pixels, target, factor, place)
        assert found.shape == pixels.shape
        assert moved["labels"].tolist() == [4]
        rows, columns = (torch.nonzero((found[0] > 100).any(dim)).flatten() for dim in (1, 0))
        bright = [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
        assert moved["boxes"].tolist()[0] == pytest.approx(bright, abs=1.01)


def test_zoom_leaves_out_what_it_cuts_away() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8], [36, 26, 44, 34], [0, 0, 30, 60]])
    target = {
        "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=(60, 80)),
        "labels": torch.tensor([1, 2, 3]),
        "iscrowd": torch.tensor([0, 0, 0]),
    }
    _, moved = zoom(torch.zeros(1, 60, 80, dtype=torch.uint8), target, 2.0, (0.5, 0.5))
    # the frame is the middle half: of the third, 10 of 30 columns and 30 of 60 rows are left, less than a quarter
    assert moved["labels"].tolist() == [2]
    assert moved["boxes"].tolist() == [[32.0, 22.0, 48.0, 38.0]]


# The seed alone decides


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_epoch_and_index_alone(workers: int) -> None:
    def batches(seed: int, epoch: int, workers: int) -> list[Any]:
        torch.manual_seed(seed)
        loader = DigitDetection(batch_size=20, num_workers=workers).train_dataloader()
        torch.rand(7)
        loader.sampler.set_epoch(epoch)
        return list(islice(loader, 2))

    reference = batches(3, 1, 0)
    assert all(same(one, other) for one, other in zip(batches(3, 1, workers), reference, strict=True))
    for other in (batches(3, 0, workers), batches(4, 1, workers)):
        assert not same(other[0], reference[0])


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    DigitDetection().train_dataloader().dataset[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_files_to_predict(tmp_path: Path) -> None:
    write_image(tmp_path / "b" / "1.png")
    write_image(tmp_path / "0.png")
    for data, channels in (
        (DigitDetection(predict_dir=str(tmp_path)), 1),
        (coco(Path("gone"), predict_dir=str(tmp_path)), 3),
    ):
        [(images, paths)] = data.predict_dataloader()
        assert paths == [str(tmp_path / "0.png"), str(tmp_path / "b" / "1.png")]
        assert [tuple(image.shape) for image in images] == [(channels, 30, 40)] * 2


# Bad input

Change = Callable[[Path], Any]


def use(make: Callable[[Path], Any], root: Path) -> None:
    data = make(root)
    data.setup("fit")
    list(data.val_dataloader())


def coco_with(**changes: Any) -> Change:
    """Annotations of val whose first object, or first image, is another."""

    def change(root: Path) -> None:
        content = coco_content()
        for key, value in changes.items():
            owner = content["images"][0] if key in ("file_name", "width") else content["annotations"][0]
            owner[key] = value
        change_coco(root, "val", content)

    return change


def coco_text(text: str, split: str = "val") -> Change:
    return lambda root: change_coco(root, split, text)


def coco_without(key: str) -> Change:
    return lambda root: change_coco(root, "val", {k: v for k, v in coco_content().items() if k != key})


def other_classes(root: Path) -> None:
    change_coco(root, "train", coco_content() | {"categories": [{"id": 3, "name": "ant"}, {"id": 8, "name": "cow"}]})


def twice(root: Path) -> None:
    change_coco(root, "val", coco_content() | {"images": coco_content()["images"] * 2})


NO_IMAGES = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'
VAL = r"instances_val2017\.json"
BAD_COCO: dict[str, tuple[Change, str]] = {
    "box outside": (
        coco_with(bbox=[30, 2, 20, 4]),
        rf"annotation 100 in .*{VAL}', of .*val2017/0\.jpg': .*\(30, 2, 50, 6\) lies outside of the image of 40 x 30",
    ),
    "box without area": (
        coco_with(bbox=[3, 2, 0, 4]),
        rf"annotation 100 in .*{VAL}', of .*0\.jpg': the box .* has no area",
    ),
    "box of less area": (coco_with(bbox=[3, 2, -5, 4]), "has no area"),
    "box beyond the edge": (coco_with(bbox=[40.5, 2, 0.4, 4]), "lies outside of the image"),
    "box of NaN": (coco_with(bbox=[float("nan"), 2, 1, 4]), "is not made of numbers"),
    "box of three numbers": (coco_with(bbox=[3, 2, 5]), rf"annotation 100 in .*{VAL}' needs .* a bbox of four numbers"),
    "label out of range": (
        coco_with(category_id=4),
        rf"annotation 100 in .*{VAL}', of .*0\.jpg', has category 4, and there are 3, 8",
    ),
    "object of no image": (coco_with(image_id=1), rf"annotation 100 in .*{VAL}' is of image 1, which it does not have"),
    "missing image": (
        coco_with(file_name="gone.jpg"),
        rf"{VAL}' names an image '.*val2017/gone\.jpg' that is not there",
    ),
    "no images folder": (
        lambda root: (root / "val2017").rename(root / "elsewhere"),
        "there is no folder of images '.*val2017'",
    ),
    "no annotations": (
        lambda root: (root / "annotations/instances_val2017.json").unlink(),
        f"there is no file of annotations '.*{VAL}'",
    ),
    "damaged": (coco_text('{"images": [{"id": 1'), rf"{VAL}' is damaged, or not JSON"),
    "binary": (
        lambda root: (root / "annotations/instances_val2017.json").write_bytes(b"\xff\xfe\x80"),
        "damaged, or not JSON",
    ),
    "a list": (coco_text("[1, 2]"), rf"{VAL}' is not in COCO's format"),
    "no categories": (coco_without("categories"), rf"{VAL}' is not in COCO's format \(KeyError: 'categories'\)"),
    "empty": (coco_text(NO_IMAGES), rf"{VAL}' has 0 images"),
    "empty train": (coco_text(NO_IMAGES, "train"), "has 0 images"),
    "twice the same id": (twice, "6 images 3 ids"),
    "other classes": (other_classes, r"train2017\.json' has 2 categories and .*only one file has bee, cow"),
    "image of another size": (
        coco_with(width=400, bbox=[90, 2, 20, 4]),
        r"annotation of '.*val2017/0\.jpg': the box .* outside of the image of 40 x 30",
    ),
    "damaged image": (
        lambda root: (root / "val2017/2.jpg").write_bytes(b"no image"),
        r"cannot read the image '.*2\.jpg'",
    ),
}


@pytest.mark.parametrize("name", BAD_COCO)
def test_coco_damaged_annotation_raises(name: str, tmp_path: Path) -> None:
    change, message = BAD_COCO[name]
    change(write_coco(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=f"(?s){message}"):
        use(coco, tmp_path)


def xml(text: str) -> Change:
    return lambda root: (root / "A/Annotations/val0.xml").write_text(text)


XML = r"Annotations/val0\.xml"
BAD_VOC: dict[str, tuple[Change, str]] = {
    "box outside": (
        xml(voc_xml([((30, 2, 50, 6), 1)])),
        rf"{XML}: the box .*\(30, 2, 50, 6\) lies outside of the image of 40 x 30",
    ),
    "box without area": (xml(voc_xml([((3, 2, 3, 6), 1)])), rf"{XML}: the box .* has no area"),
    "unknown class": (
        xml(voc_xml([((3, 2, 9, 6), 1)], ["cow"])),
        rf"{XML}' has an object 'cow', which is not among the 2 classes, ant, bee",
    ),
    "no box": (
        xml("<annotation><object><name>ant</name></object></annotation>"),
        rf"{XML}' has an object 'ant' whose bndbox lacks",
    ),
    "no number": (
        xml(voc_xml([((3, 2, 9, 6), 1)]).replace("<ymax>6", "<ymax>six")),
        "whose bndbox lacks xmin, ymin, xmax, ymax",
    ),
    "damaged": (xml("<annotation><object>"), rf"{XML}' is damaged, or not XML"),
    "no annotation": (lambda root: (root / "A/Annotations/val0.xml").unlink(), rf"there is no annotation '.*{XML}'"),
    "missing image": (
        lambda root: (root / "A/JPEGImages/val1.jpg").unlink(),
        r"val1\.xml' names an image '.*val1\.jpg' that is not there",
    ),
    "no list": (
        lambda root: (root / "A/ImageSets/Main/val.txt").unlink(),
        r"there is no '.*Main/val\.txt'; its folder has train",
    ),
    "empty list": (lambda root: (root / "A/ImageSets/Main/val.txt").write_text("\n"), r"Main/val\.txt' names no image"),
    "no images folder": (lambda root: (root / "A/JPEGImages").rename(root / "B"), "there is no folder '.*JPEGImages'"),
    "size is wrong": (
        xml(voc_xml([((90, 2, 99, 6), 1)], size=(100, 30))),
        r"annotation of '.*val0\.jpg': the box .* outside of the image of 40 x 30",
    ),
}


@pytest.mark.parametrize("name", BAD_VOC)
def test_voc_damaged_annotation_raises(name: str, tmp_path: Path) -> None:
    change, message = BAD_VOC[name]
    change(write_voc(tmp_path, ("A/train", "A/val")))
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        use(voc, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_boxes_can_be_skipped(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path) if kind == "coco" else write_voc(tmp_path, ("A/train", "A/val"))
    (coco_with(bbox=[3, 2, 0, 4]) if kind == "coco" else xml(voc_xml([((3, 2, 3, 6), 1), OBJECTS[0][1]])))(root)
    data = coco(root, on_bad_box="skip") if kind == "coco" else voc(root, on_bad_box="skip")
    with caplog.at_level("WARNING", "lit_tricks"):
        target = data.val_dataloader().dataset[0][1]
    assert target["labels"].tolist() == [2]
    assert kind == "coco" or "1 boxes outside of their image or without an area were skipped" in caplog.text


def test_a_box_may_stick_out_by_a_rounded_pixel(tmp_path: Path) -> None:
    coco_with(bbox=[-0.4, 3, 40.9, 27.5])(write_coco(tmp_path))
    assert coco(tmp_path).val_dataloader().dataset[0][1]["boxes"][0].tolist() == [0, 3, 40, 30]


ARGUMENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flip": (lambda root: coco(root, flip=1.5), "flip=1.5.*probability"),
    "scale": (lambda root: coco(root, scale=(2.0, 0.5)), "scale must be two rising factors"),
    "std": (lambda root: coco(root, std=(1.0, 0.0, 1.0)), "std="),
    "on_bad_box": (lambda root: coco(root, on_bad_box="ignore"), "on_bad_box='ignore'"),
    "size": (lambda root: DigitDetection(size=16), "size=16.*room"),
    "classes": (lambda root: voc(root, classes=["a", "a"]), "must be names, each once"),
    "train": (lambda root: voc(root, train=[]), r"train=\[\]"),
    "batch_size": (
        lambda root: DigitDetection(batch_size=2000).setup("fit"),
        "batch_size=2000 is larger than the 1000",
    ),
    "another size": (lambda root: DigitDetection().eval_transform_at(96), "the model resizes them: set its min_size"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_rejected_by_name(name: str, tmp_path: Path) -> None:
    make, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        make(write_coco(tmp_path))
