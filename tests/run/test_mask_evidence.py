"""Records of a segmentation for its report, and their figures in the report."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import cli, done, results, workplace
from helpers.evidence import NAMES, samples, see_masks
from helpers.launch import two_processes
from helpers.masks import CLASSES, write_folder
from helpers.segmenters import FIT, IGNORED, TINY_YAML, K, loader, segmenter, trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from sklearn.metrics import precision_score, recall_score
from torch import Tensor

from lit_tricks.data import SegmentationFolder
from lit_tricks.run.evidence.callback import Evidence
from lit_tricks.run.evidence.mask_split import SIDE, WORST, MaskSplit, joined_masks
from lit_tricks.run.pictures import send_predictions
from lit_tricks.run.reading.mask_predictions import MaskPredictions
from lit_tricks.run.reading.run import read_runs
from lit_tricks.run.report.content import report_sections
from lit_tricks.run.report.figures import draw_confusion, draw_ious, draw_worst_masks
from lit_tricks.run.report.page import to_html
from lit_tricks.run.report.style import DARK, draw

Pixels = npt.NDArray[np.int64]


def count(mask: npt.NDArray[Any], predicted: npt.NDArray[Any], classes: int = K) -> Pixels:
    """The confusion matrix, pair by pair."""
    matrix = [[int(((mask == a) & (predicted == b)).sum()) for b in range(classes)] for a in range(classes)]
    return np.array(matrix)


def mean_iou(mask: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> float:
    """By sets of pixels."""
    known = mask != IGNORED
    found = []
    for label in range(K):
        true, guess = set(np.flatnonzero((mask == label) & known)), set(np.flatnonzero((predicted == label) & known))
        if true | guess:
            found.append(len(true & guess) / len(true | guess))
    return float(np.mean(found)) if found else float("nan")


# What is counted


def test_pixels_are_counted_as_numpy_does(tmp_path: Path) -> None:
    module, found, metrics = see_masks(tmp_path)
    images, masks = (torch.stack(each) for each in zip(*samples(), strict=True))
    with torch.no_grad():
        predicted = module.eval()(images).argmax(1).numpy()
    masks = masks.numpy()
    assert (found.split, found.classes, found.images) == ("test", NAMES, 11)
    np.testing.assert_array_equal(found.pixels, count(masks, predicted))
    assert found.pixels.sum() == (masks != IGNORED).sum()
    assert np.nanmean(found.ious()) == pytest.approx(metrics["test/miou"], abs=1e-6)
    assert found.pixels.diagonal().sum() / found.pixels.sum() == pytest.approx(metrics["test/pixel_accuracy"], abs=1e-6)
    true, guess = masks[masks != IGNORED], predicted[masks != IGNORED]
    settings: Any = {"average": None, "labels": range(K), "zero_division": np.nan}
    np.testing.assert_allclose(found.recalls()[0], recall_score(true, guess, **settings))
    np.testing.assert_allclose(found.precisions(), precision_score(true, guess, **settings))
    np.testing.assert_array_equal(found.confusion().dense(K), found.pixels)

    ious = np.array([mean_iou(mask, guess) for mask, guess in zip(masks, predicted, strict=True)])
    worst = np.argsort(ious, kind="stable")[:WORST]  # NaN comes last
    assert [each.where for each in found.worst] == [f"image {i}" for i in worst]
    assert [each.iou for each in found.worst] == pytest.approx(ious[worst], abs=1e-6)
    low, high = images.min(), images.max()
    for i, each in zip(worst, found.worst, strict=True):
        np.testing.assert_array_equal(each.mask, np.where(masks[i] == IGNORED, -1, masks[i]))
        np.testing.assert_array_equal(each.predicted, predicted[i])
        np.testing.assert_allclose(each.image[..., 0], 255 * (images[i, 0] - low) / (high - low), atol=0.51)


def test_the_last_validation_counts_where_nothing_was_tested(tmp_path: Path) -> None:
    module, evidence = segmenter(), Evidence()
    run = trainer(callbacks=[evidence], max_epochs=2)
    run.fit(module, loader(samples()), loader(samples()[:4]))
    evidence.save(tmp_path / "predictions.npz", run, None)
    found = MaskPredictions.read(tmp_path / "predictions.npz")
    assert (found.split, found.images, found.classes) == ("val", 4, ["0", "1", "2", "3", "4"])
    assert np.nanmean(found.ious()) == pytest.approx(run.callback_metrics["val/miou"].item(), abs=1e-6)


def logits_of(predicted: Tensor, classes: int = K) -> Tensor:
    return torch.nn.functional.one_hot(predicted, classes).movedim(-1, 1).float()


@pytest.mark.parametrize("kind", ["int64", "uint8", "with a channel", "named"])
def test_masks_of_all_kinds(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mask, predicted = torch.randint(K, (2, 6, 7), generator=generator), torch.randint(K, (2, 6, 7), generator=generator)
    mask[0, 0] = 255 if kind == "uint8" else -100
    image = torch.rand(2, 3, 6, 7, generator=generator)
    given = {"int64": mask, "uint8": mask.to(torch.uint8), "with a channel": mask[:, None], "named": mask}[kind]
    batch = {"image": image, "mask": given} if kind in ("named", "uint8") else (image, given)
    split = MaskSplit(None, 0, 1)
    split.add(batch, [torch.rand(2, K), logits_of(predicted)])
    part = split.part()
    assert part is not None
    np.testing.assert_array_equal(part["confusion"], count(mask.numpy(), predicted.numpy()))
    assert part["worst"][0]["image"].shape == (3, 6, 7)


def test_right_images_are_not_the_worst_and_sizes_may_differ(tmp_path: Path) -> None:
    split = MaskSplit(None, 0, 1)
    for size, wrong in (((6, 7), 0), ((300, 200), 40), ((480, 480), 9), ((4, 5), 1)):
        mask = torch.ones(1, *size, dtype=torch.int64)
        predicted = mask.clone()
        predicted[0, :wrong] = 0
        split.add((torch.rand(1, 3, *size), mask), [logits_of(predicted)])
    part = split.part()
    assert part is not None
    with (tmp_path / "a.npz").open("wb") as stream:
        np.savez_compressed(stream, split=np.array("val"), classes=np.array([]), **joined_masks([part]))
    found = MaskPredictions.read(tmp_path / "a.npz")
    assert [each.where for each in found.worst] == ["image 3", "image 1", "image 2"]  # 3/4, 260/300, 471/480, halved
    assert [each.iou for each in found.worst] == pytest.approx([3 / 8, 260 / 600, 471 / 960])
    assert [each.image.shape for each in found.worst] == [(4, 5, 3), (SIDE, 107, 3), (SIDE, SIDE, 3)]
    for each in found.worst:
        assert each.image.shape[:2] == each.mask.shape == each.predicted.shape
        assert set(np.unique(each.predicted)) == {0, 1}
        assert (each.predicted == 0).mean() == pytest.approx(1 - 2 * each.iou, abs=0.01)


def test_nothing_to_see_keeps_nothing() -> None:
    split = MaskSplit(None, 0, 1)
    split.add((torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)), [torch.rand(2, K)])
    split.add((torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)), [torch.rand(2, K, 2, 2)])
    split.add((torch.rand(2, 3, 4, 4),), [torch.rand(2, K, 4, 4)])
    assert split.part() is None


def test_150_classes_stay_small(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    split = MaskSplit(None, 0, 1)
    for _ in range(10):
        mask, predicted = (torch.randint(150, (1, 200, 200), generator=generator) for _ in range(2))
        split.add((torch.rand(1, 3, 200, 200, generator=generator), mask), [logits_of(predicted, 150)])
    with (tmp_path / "a.npz").open("wb") as stream:  # noise, which is as large as it can be
        np.savez_compressed(stream, split=np.array("val"), classes=np.array([]), **joined_masks([split.part() or {}]))
    assert (tmp_path / "a.npz").stat().st_size < 1_500_000


def test_images_that_a_sampler_repeats_count_once() -> None:
    """Three processes share seven images: two get an image a second time."""
    found = samples()[:7]
    images, masks = (torch.stack(each) for each in zip(*found, strict=True))
    predicted = torch.randint(K, masks.shape, generator=torch.Generator().manual_seed(0))
    parts = []
    for rank in range(3):
        split = MaskSplit(found, rank, 3)
        mine = [i % 7 for i in range(rank, 9, 3)]
        for batch in (mine[:2], mine[2:]):
            split.add((images[batch], masks[batch]), [logits_of(predicted[batch])])
        parts.append(split.part())
    whole = MaskSplit(found, 0, 1)
    whole.add((images, masks), [logits_of(predicted)])
    ours, theirs = joined_masks(parts), joined_masks([whole.part() or {}])  # type: ignore[arg-type]
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)
    np.testing.assert_array_equal(ours["confusion"], count(masks.numpy(), predicted.numpy()))
    assert ours["images"] == 7


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    two_processes(["mask_evidence_distributed"], tmp_path)
    (tmp_path / "one").mkdir()
    _, one, _ = see_masks(tmp_path / "one")
    two = MaskPredictions.read(tmp_path / "mask_evidence_distributed" / "predictions.npz")
    np.testing.assert_array_equal(two.pixels, one.pixels)
    assert two.images == one.images == 11
    assert [(each.where, each.iou) for each in two.worst] == [(each.where, each.iou) for each in one.worst]
    for ours, theirs in zip(two.worst, one.worst, strict=True):
        for part in ("image", "mask", "predicted"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))


def test_images_of_a_folder_are_named(tmp_path: Path) -> None:
    data = SegmentationFolder(str(write_folder(tmp_path / "data")), crop_size=16, base_size=20, num_workers=0)
    module, evidence = segmenter(num_classes=len(CLASSES), input_size=(3, 16, 16)), Evidence()
    run = trainer(callbacks=[evidence])
    run.validate(module, data, verbose=False)
    evidence.save(tmp_path / "predictions.npz", run, data.classes)
    found = MaskPredictions.read(tmp_path / "predictions.npz")
    assert (found.split, found.weights) == ("val", "last")
    assert {each.where for each in found.worst} == {"0.jpg", "1.jpg"}
    assert all(each.image.shape == (16, 16, 3) for each in found.worst)


# The report


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        Path("small.yaml").write_text(TINY_YAML)
        done(*FIT, "--trainer.max_epochs=1")
    return folder / "runs" / "small" / "v0"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are white squares: drawing them takes seconds."""
    square = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(square, "PNG")
    monkeypatch.setattr("lit_tricks.run.report.content.draw", lambda *args, **kwargs: square.getvalue())


@pytest.fixture
def run(trained: Path, folder: Path) -> Path:
    shutil.copytree(trained, folder / "runs" / "small" / "v0")
    return Path("runs/small/v0")


SECTIONS = [
    "Results", "Tricks in force", "Learning curves", "Where the time went", "Mistakes", "IoU of the classes",
    "Images with the lowest IoU",
]  # fmt: skip


@pytest.mark.slow
def test_the_report_of_a_run(run: Path) -> None:
    assert "draws the confusion matrix, the IoU of each class and" in (run / "report.md").read_text()
    done("report", str(run))
    markdown = (run / "report.md").read_text()
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == [s for s in SECTIONS if s != "Tricks in force"]
    pictures = re.findall(r"!\[.+\]\((.+)\)", markdown)
    assert pictures[-3:] == ["confusion.png", "classes.png", "worst_images.png"]
    for name in pictures:
        with Image.open(run / name) as image:
            assert image.width > 300
    [found] = read_runs([run])
    assert found.missing == {}
    assert found.masks is not None
    assert np.nanmean(found.masks.ious()) == pytest.approx(results(run)["raw"]["test"]["miou"], abs=1e-6)
    assert f"{4 * 64 * 64:,} pixels of 4 test images, with the best checkpoint." in markdown
    # each class stands in the table, the worst first, those that did not occur last
    cells = [line.split(" | ")[2] for line in markdown.partition("| class |")[2].splitlines() if line.startswith("| ")]
    values = [-1.0 if cell == "-" else float(cell[:-1]) for cell in cells if cell != "---:"]
    assert len(values) == 11
    known = [value for value in values if value >= 0]
    assert known == sorted(known) == values[: len(known)]


@pytest.mark.usefixtures("undrawn")
def test_several_runs_are_compared_by_class(run: Path) -> None:
    shutil.copytree(run, "runs/small/v1")
    done("report", str(run), "runs/small/v1", "--out=both")
    markdown = Path("both/report.md").read_text()
    assert "| class | pixels | IoU, small/v0 | found, small/v0 | right, small/v0 | IoU, small/v1 |" in markdown
    for name in ("confusion_small_v1", "worst_images_small_v0", "classes"):
        assert Path(f"both/{name}.png").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_file_is_said(run: Path) -> None:
    content = (run / "predictions.npz").read_bytes()
    (run / "predictions.npz").write_bytes(content[: len(content) // 2])
    outcome = cli("report", str(run))
    assert outcome.code == 0
    assert "no predictions. The reason: predictions.npz cannot be read" in (run / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 12, 30, 150])
def test_any_number_of_classes(classes: int) -> None:
    rng = np.random.default_rng(0)
    split = MaskSplit(None, 0, 1)
    for _ in range(3):
        mask = torch.from_numpy(rng.integers(-1, classes, (1, 20, 30)))
        predicted = torch.from_numpy(rng.integers(0, classes, (1, 20, 30)))
        split.add((torch.rand(1, 1, 20, 30), mask), [logits_of(predicted, classes)])
    with Path("a.npz").open("wb") as stream:
        names = np.array([f"class {i}" for i in range(classes)])
        np.savez_compressed(stream, split=np.array("val"), classes=names, **joined_masks([split.part() or {}]))
    predictions_of_a = MaskPredictions.read(Path("a.npz"))
    for function, *args in (
        (draw_confusion, predictions_of_a, ""),
        (draw_ious, {"a": predictions_of_a, "b": predictions_of_a}, ["a", "gone", "b"]),
        (draw_worst_masks, predictions_of_a),
    ):
        with Image.open(io.BytesIO(draw(function, *args, theme=DARK))) as image:  # type: ignore[arg-type]
            assert 300 < image.width < 2000


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_mistake(run: Path) -> None:
    [found] = read_runs([run])
    found.masks = MaskPredictions("test", ["a", "b"], 3, np.diag([5, 0]), [])
    text = to_html("x", report_sections([found]))
    assert "None were kept: all images are right" in text
    assert '<tr><th scope="row">b</th>' in text


def test_wandb_gets_the_confusion_and_the_worst_images(run: Path) -> None:
    class Offline(WandbLogger):
        def __init__(self) -> None:
            self.logged: dict[str, object] = {}

        @property
        def experiment(self) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(log=self.logged.update)

    logger = Offline()
    send_predictions(run, [object(), logger])
    assert logger.logged.keys() == {"test/confusion", "test/worst_images"}
