"""lit-tricks report and lit-tricks card: what they make of run folders, whole or not."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.browser import FLAGS, chromium, needs_browser
from helpers.cli import COSINE, FIT, cli, done, workplace, write_images
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, precision_score, recall_score
from torchmetrics.functional.classification import multiclass_calibration_error

import lit_tricks
from lit_tricks import callbacks
from lit_tricks.commands import report
from lit_tricks.run.reading.predictions import Predictions
from lit_tricks.run.reading.run import read_runs
from lit_tricks.run.report.citations import FILE, citations, link_of
from lit_tricks.run.report.content import report_sections
from lit_tricks.run.report.figures import draw_confusion, draw_recalls
from lit_tricks.run.report.page import to_html
from lit_tricks.run.report.style import DARK, LIGHT, color_of, draw

TRICKS = (*COSINE, "--trainer.callbacks+=LabelSmoothing", "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT, *TRICKS, "--trainer.max_epochs=3")
    return folder / "runs" / "tiny" / "v0"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are white squares: drawing them takes seconds."""
    square = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(square, "PNG")
    monkeypatch.setattr("lit_tricks.run.report.content.draw", lambda *args, **kwargs: square.getvalue())


@pytest.fixture(scope="module")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report."""
    run = tmp_path_factory.mktemp("reported") / "tiny" / "v0"
    shutil.copytree(trained, run)
    assert report([str(run)]) == run / "report.html"
    return run


@pytest.fixture
def run(trained: Path, folder: Path) -> Path:
    """A copy of the run, to add to and to take from."""
    shutil.copytree(trained, folder / "runs" / "tiny" / "v0")
    return Path("runs/tiny/v0")


def predictions(classes: int = 7, count: int = 500, seed: int = 0) -> Predictions:
    """Predictions that are right about every second time."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(count, classes)))
    label = rng.integers(0, classes, count)
    scores[range(count), label] += 1.5
    probabilities = scores.softmax(1)
    top = probabilities.topk(min(5, classes)).indices.numpy()
    images = rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    return Predictions(
        "test",
        [f"class {i}" for i in range(classes)],
        label,
        top,
        probabilities.max(1).values.numpy(),
        probabilities[range(count), label].numpy(),
        np.arange(count),
        np.flatnonzero(top[:, 0] != label)[:16],
        images,
        [],
    )


# What is counted


def test_confusion_is_that_of_scikit_learn() -> None:
    found = predictions()
    expected = confusion_matrix(found.label, found.predicted)
    np.testing.assert_array_equal(found.confusion().dense(7), expected)
    off = expected * (1 - np.eye(7, dtype=int))
    first, *_, last = found.confusion().mistakes()
    assert first == (*np.unravel_index(off.argmax(), off.shape), off.max())
    assert first[2] >= last[2] > 0


def test_recall_and_precision_are_those_of_scikit_learn() -> None:
    found = predictions()
    recalls, counts = found.recalls()
    np.testing.assert_allclose(recalls, recall_score(found.label, found.predicted, average=None))
    np.testing.assert_allclose(found.precisions(), precision_score(found.label, found.predicted, average=None))
    np.testing.assert_array_equal(counts, np.bincount(found.label))


@pytest.mark.parametrize("missing", [False, True])
def test_balanced_accuracy_and_macro_f1_match_scikit_learn(missing: bool) -> None:
    found = predictions()
    if missing:  # class 3 has no image, and class 5 is never predicted
        kept = found.label != 3
        found.label, found.top = found.label[kept], found.top[kept]
        found.top[:, 0][found.top[:, 0] == 5] = 3
    accuracy, f1 = found.balanced_accuracy(), found.macro_f1()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and have no image
        assert accuracy == pytest.approx(balanced_accuracy_score(found.label, found.predicted))
        assert f1 == pytest.approx(f1_score(found.label, found.predicted, average="macro"))


def test_accuracy_by_class_frequency() -> None:
    found = predictions()
    assert not found.is_imbalanced
    assert found.by_frequency() == {}
    found.train_counts = np.array([50, 900, 10, 400, 0, 400, 80])  # class 4 is not trained
    assert {name: classes.tolist() for name, classes in found.groups().items()} == {
        "head": [1, 3], "middle": [5, 6], "tail": [0, 2],
    }  # fmt: skip
    recall = recall_score(found.label, found.predicted, average=None)
    values = found.by_frequency()
    assert values["balanced_accuracy"] == pytest.approx(recall.mean())
    for name, classes in {"head": [1, 3], "middle": [5, 6], "tail": [0, 2]}.items():
        assert values[f"{name}_recall"] == pytest.approx(recall[classes].mean())
    found.train_counts = np.array([100, 1000, 100, 100, 100, 100, 100])
    assert not found.is_imbalanced  # 10 times is not more than 10 times
    found.train_counts = None
    found.label = np.repeat([0, 1], [480, 20])  # counts of the evaluated images, as training counts are missing
    assert found.is_imbalanced
    assert {name: classes.tolist() for name, classes in found.groups().items()} == {
        "head": [0], "middle": [], "tail": [1],
    }  # fmt: skip
    assert "middle_recall" not in found.by_frequency()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_an_imbalanced_run_reports_accuracy_by_class_frequency(folder: Path) -> None:
    for split, counts in (("train", (45, 12, 4)), ("val", (4, 4, 4))):
        for label, count in enumerate(counts):
            write_images(folder / "photos" / split / f"class {label}", count, seed=10 * label)
    words = [*FIT, "--data=ImageFolder", "--data.root=photos", "--data.image_size=16", "--data.batch_size=8"]
    done(*words, "--data.num_workers=0", "--trainer.limit_val_batches=1.0", "--data.balance=1")
    [run] = read_runs(["runs/tiny/v0"])
    assert run.predictions
    assert run.predictions.train_counts is not None
    assert run.predictions.train_counts.tolist() == [45, 12, 4]  # the sampler draws others
    metrics = run.metrics["val"]
    label, predicted = run.predictions.label, run.predictions.predicted
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert metrics["head_recall"] == pytest.approx((predicted[label == 0] == 0).mean())
    assert metrics["tail_recall"] == pytest.approx((predicted[label == 2] == 2).mean())
    assert "tail_recall" in Path("runs/tiny/v0/report.md").read_text()
    [section] = [each for each in report_sections([run]) if each.title == "Accuracy by class frequency"]
    assert "4 to 45 training images per class" in section.text[0]
    [row] = section.tables[0].rows
    assert row[3] == f"{metrics['head_recall']:.2%} (1)"


def test_calibration_error_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.dirichlet([0.3] * 7, 500))
    found = predictions()
    found.confidence, found.top = scores.max(1).values.numpy(), scores.argmax(1)[:, None].numpy()
    expected = multiclass_calibration_error(scores, torch.from_numpy(found.label), 7, n_bins=15)
    assert found.calibration().error == pytest.approx(float(expected), abs=1e-7)  # theirs is in single precision


@pytest.mark.slow
def test_a_real_run_agrees_with_its_metrics(trained: Path) -> None:
    [run] = read_runs([trained])
    assert run.predictions
    test = run.metrics["test"]
    assert (run.predictions.predicted == run.predictions.label).mean() == pytest.approx(test["top1"])
    assert run.predictions.calibration().error == pytest.approx(test["ece"], abs=1e-6)
    assert not run.missing


def test_the_first_24_runs_look_different() -> None:
    for theme in (LIGHT, DARK):
        assert len({color_of(theme, number) for number in range(24)}) == 24


# The page


class Page(HTMLParser):
    """Tags in their order, and a check that they are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


SECTIONS = [
    "Results", "Tricks in force", "Learning curves", "Where the time went", "Mistakes", "Calibration", "Worst classes",
    "Most wrong images",
]  # fmt: skip


@pytest.mark.slow
def test_the_report_of_a_run(reported: Path) -> None:
    run = reported
    text = (run / "report.html").read_text()
    page = Page(text)
    assert re.findall(r"<h2 [^>]+>(.+?)</h2>", text) == SECTIONS
    # accessible, and complete by itself
    assert len(page.all("h1")) == 1
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * len(SECTIONS)
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] and image["src"] for image in page.all("img"))
    for attrs in (*page.all("img"), *page.all("source")):
        data = attrs.get("src") or attrs.get("srcset") or ""
        assert data.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).verify()
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all("scope" in attrs for attrs in page.all("th"))
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {(attrs["href"] or "")[1:] for attrs in page.all("a")} == ids
    assert not re.search(r"(src|href|url\()\W*(https?:)?//|@import|<script", text)

    markdown = (run / "report.md").read_text()
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == SECTIONS
    pictures = re.findall(r"!\[(.+)\]\((.+)\)", markdown)
    assert {name for _, name in pictures} == {
        "loss.png", "top-1_accuracy.png", "learning_rate.png", "time.png", "confusion.png", "reliability.png",
        "classes.png", "most_wrong.png",
    }  # fmt: skip
    for _, name in pictures:
        with Image.open(run / name) as image:
            assert image.width > 300


@pytest.mark.usefixtures("undrawn")
def test_several_runs_are_laid_over_each_other(run: Path) -> None:
    shutil.copytree(run, "runs/tiny/v1")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.5
    Path("runs/tiny/v1/config.yaml").write_text(yaml.safe_dump(config))
    outcome = done("report", str(run), "runs/tiny/v1", "--out", "both")
    assert "report: both/report.html" in outcome.log
    assert not (run / "report.html").exists()
    markdown = Path("both/report.md").read_text()
    assert "| model.init_args.optimizer.init_args.lr | 0.1 | 0.5 |" in markdown
    assert "Loss against the training step, of tiny/v0, tiny/v1." in markdown
    assert Path("both/confusion_tiny_v1.png").is_file()
    Page(Path("both/report.html").read_text())


PARTS = {
    "metrics.csv": ("curves", "Learning curves"),
    "results.json": ("results", "Results"),
    "tricks.json": ("tricks", "Tricks in force"),
    "predictions.npz": ("predictions", "Calibration"),
    "config.yaml": ("settings", None),
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("how", ["missing", "empty", "damaged"])
@pytest.mark.parametrize("file", PARTS)
def test_missing_data_is_listed(run: Path, file: str, how: str) -> None:
    part, section = PARTS[file]
    content = (run / file).read_bytes()
    (run / file).unlink()
    if how != "missing":
        (run / file).write_bytes(content[: len(content) // 2] if how == "damaged" else b"")
    [found] = read_runs([run])
    titles = [section.title for section in report_sections([found])]
    if (file, how) not in (("metrics.csv", "damaged"), ("config.yaml", "damaged"), ("config.yaml", "empty")):
        if (file, how) != ("metrics.csv", "empty"):
            assert file in found.missing[part]
            assert "What is missing" in titles
        assert section not in titles
    Page(to_html("x", report_sections([found])))


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_an_older_version(folder: Path) -> None:
    """It has metrics and results alone."""
    Path("old").mkdir()
    Path("old/metrics.csv").write_text("epoch,step,val/loss\n0,1,2.5\n1,2,nan\n2,3,1.5\n")
    Path("old/results.json").write_text(json.dumps({"best_checkpoint": "", "epoch": 1, "raw": {"val": {"loss": 2.5}}}))
    done("report", "old")
    markdown = Path("old/report.md").read_text()
    for part in ("tricks", "settings", "predictions", "time"):
        assert f"no {part}. The reason: " in markdown
    assert "Top-1 accuracy was not logged." in markdown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere: there is no such folder. Pass a run folder"),
        (("runs/tiny",), "runs/tiny is not the folder of a run: give one of those in it, runs/tiny/v0."),
        (("empty",), "empty is not the folder of a run: it has none of results.json"),
        (("runs/tiny/v0", "runs/tiny/../tiny/v0"), "is given twice"),
        ((), "RUNS"),
    ],
)
def test_report_wrong_folders_explain_themselves(run: Path, words: tuple[str, ...], message: str) -> None:
    Path("empty").mkdir()
    outcome = cli("report", *words)
    assert outcome.code
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize("classes", [2, 12, 30, 200])
def test_any_number_of_classes(classes: int) -> None:
    for function, *args in (
        (draw_confusion, predictions(classes), ""),
        (draw_recalls, {"a": predictions(classes), "b": predictions(classes, seed=1)}, ["a", "gone", "b"]),
    ):
        with Image.open(io.BytesIO(draw(function, *args, theme=DARK))) as image:
            assert image.width > 300


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_mistake(run: Path) -> None:
    [found] = read_runs([run])
    found.predictions = perfect = predictions(200)
    perfect.top = perfect.label[:, None]
    perfect.wrong_index, perfect.wrong_image = perfect.wrong_index[:0], perfect.wrong_image[:0]  # type: ignore[index]
    text = to_html("x", report_sections([found]))
    assert "None: tiny/v0 has all images right." in text


def browse(folder: Path, *words: str) -> str:
    profile = folder / f"profile-{len(list(folder.glob('profile-*')))}"
    command = [chromium(), *FLAGS, f"--user-data-dir={profile}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
def test_a_browser_shows_the_page(reported: Path, folder: Path) -> None:
    run = reported
    page = (run / "report.html").as_uri()
    # What it makes of the page: the sizes of all pictures, and whether anything sticks out.
    probe = """<script>addEventListener("load", () => { document.body.dataset.found = JSON.stringify({
      broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length, pictures: document.images.length,
      loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
      wide: document.documentElement.scrollWidth - innerWidth }) })</script></body>"""
    probed = folder / "probed.html"
    probed.write_text((run / "report.html").read_text().replace("</body>", probe))
    for width in (500, 1280):  # headless windows are no narrower
        dom = browse(folder, f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri())
        match = re.search(r'data-found="([^"]+)"', dom)
        assert match
        found = json.loads(match[1].replace("&quot;", '"'))
        assert (found["broken"], found["loaded"]) == (0, 0)
        assert found["pictures"] > 8
        assert found["wide"] <= 0
    grounds = {}
    for theme, setting in (("dark", 0), ("light", 1)):
        shot = folder / f"{theme}.png"
        browse(
            folder, f"--blink-settings=preferredColorScheme={setting}", "--window-size=390,6000",
            f"--screenshot={shot}", page,
        )  # fmt: skip
        with Image.open(shot) as image:
            assert image.size == (390, 6000)
            grounds[theme] = image.convert("RGB").getpixel((2, 2))
            colors = image.convert("RGB").getcolors(2**24) or []
            assert len(colors) > 500  # there are pictures in it
    assert grounds == {"dark": (0x15, 0x18, 0x1D), "light": (0xFF, 0xFF, 0xFF)}


# The card


def test_the_card_of_a_checkpoint(run: Path) -> None:
    outcome = done("card", str(run / "checkpoints" / "best.ckpt"), "--license", "mit")
    assert "card: runs/tiny/v0/README.md" in outcome.log
    card = ModelCard.load(run / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "lit-tricks", "image-classification")
    assert data.datasets == ["digits"]
    assert {"image-classification", "lit-tricks", "warmup-cosine", "label-smoothing", "ema"} <= set(data.tags)
    results = json.loads((run / "results.json").read_text())["averaged"]
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    for split in ("val", "test"):
        assert found[split, "top-1 accuracy"] == pytest.approx(results[split]["top1"], abs=1e-4)
        assert found[split, "expected calibration error"] == pytest.approx(results[split]["ece"], abs=1e-4)
    text = card.text
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert keys == [
        "he2019bag", "szegedy2016rethinking", "tarvainen2017mean", "he2016deep", "wightman2019timm",
        "sutskever2013importance", "alpaydin1998optical",
    ]  # fmt: skip
    assert "methods =" not in text
    assert "| LabelSmoothing | 0.1 of the target's probability shared by all classes | smoothing=0.1" in text
    assert "| optimizer | torch.optim.SGD(lr=0.1, momentum=0.9" in text
    [settings] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(settings) == yaml.safe_load((run / "config.yaml").read_text())
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    code = code.replace('"best.ckpt"', repr(str(run / "checkpoints" / "best.ckpt")))
    write_images(run, 1)
    found: dict[str, Any] = {}
    exec(code.replace('"image.jpg"', repr(str(run / "0.jpg"))), found)
    assert len(found["names"]) == 5
    assert found["logits"].shape == (1, 10)


def test_metrics_of_another_checkpoint_are_its_own(run: Path) -> None:
    done("card", str(run / "checkpoints" / "last.ckpt"), "--output", "last.md")
    text = Path("last.md").read_text()
    assert "At epoch 2, averaged weights." in text
    assert "This checkpoint was not tested." in text
    assert "| test |" not in text


def test_distillation_by_dist_cites_both_papers(run: Path) -> None:
    tricks = {"KnowledgeDistillation": {"effect": "", "arguments": {"teacher": "resnet50", "loss": "dist"}}}
    (run / "tricks.json").write_text(json.dumps(tricks))
    done("card", str(run / "checkpoints" / "best.ckpt"), "--output", "dist.md")
    assert {"hinton2015distilling", "huang2022knowledge"} <= set(
        re.findall(r"@\w+\{(\w+)", Path("dist.md").read_text())
    )


def test_a_checkpoint_without_its_run(run: Path) -> None:
    shutil.copy(run / "checkpoints" / "best.ckpt", "alone.ckpt")
    done("card", "alone.ckpt")
    text = Path("README.md").read_text()
    assert "None are known" in text
    assert "| EMA | - | - |" in text
    assert "Those that left a trace in the checkpoint" in text
    ModelCard(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.ckpt",), "nowhere.ckpt: there is no such file. Give a checkpoint"),
        (("tiny.yaml",), "tiny.yaml is not a checkpoint of Lightning, or damaged."),
        (("{best}",), "runs/tiny/v0/README.md exists: choose another file with --output, or give --overwrite"),
        (("{best}", "--output", "no/where.md"), "lies in a folder that does not exist"),
    ],
)
def test_errors_of_the_card(run: Path, words: tuple[str, ...], message: str) -> None:
    (run / "README.md").write_text("mine")
    outcome = cli("card", *(word.format(best=run / "checkpoints" / "best.ckpt") for word in words))
    assert outcome.code == 1
    assert message in outcome.err
    assert (run / "README.md").read_text() == "mine"


# What to cite


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_trick_can_be_cited(name: str) -> None:
    link = link_of(getattr(callbacks, name).__doc__)
    assert len(citations([link])) == 1, f"add an entry with url = {{{link}}} to {FILE.name}"


@pytest.mark.parametrize("file", sorted((Path(lit_tricks.__file__).parents[1] / "configs/optimizers").glob("*.yaml")))
def test_every_optimizer_can_be_cited(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())["model"]["init_args"]["optimizer"]
    name = settings["class_path"].rpartition(".")[2]
    assert len(citations(methods=[name])) == 1


def test_the_entries_are_whole() -> None:
    text = FILE.read_text()
    entries = re.findall(r"^@\w+\{(\w+),\n((?:  \w+ = \{.*\},?\n)+)\}$", text, re.MULTILINE)
    assert len(entries) == text.count("\n@")
    assert len({key for key, _ in entries}) == len(entries)
    for key, fields in entries:
        names = re.findall(r"^  (\w+) =", fields, re.MULTILINE)
        assert {"title", "author", "url"} <= set(names), key
        assert all(line.endswith(",") for line in fields.splitlines()[:-1]), key
        assert fields.count("{") == fields.count("}"), key
    assert citations() == []
