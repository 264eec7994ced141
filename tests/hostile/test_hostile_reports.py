"""Reports and cards of run folders that somebody else made: damage is noted, nothing explodes, nothing leads out."""

from __future__ import annotations

import csv
import io
import json
import time
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lit_tricks.commands import card, report
from lit_tricks.run.folder import RunFolder
from lit_tricks.run.reading.run import read_run_folder
from lit_tricks.run.report.ablation_table import report_ablation
from lit_tricks.run.report.escaping import code_block, code_span, escape_markdown, row_cell
from lit_tricks.utils.bounded import parse_yaml, read_arrays
from lit_tricks.utils.config_files import resolve_configs

RESULTS: dict[str, Any] = {
    "best_checkpoint": "runs/a/v0/checkpoints/best.ckpt",
    "epoch": 1,
    "raw": {"val": {"loss": 1.0, "top1": 0.5}, "test": {"loss": 1.1, "top1": 0.4}},
    "seconds": 3.5,
    "time": {"clock": "host", "seconds": {"data": 1.0, "forward": 2.0}},
    "peak_memory": 10**9,
}
TRICKS: dict[str, Any] = {"EMA": {"arguments": {"decay": 0.9}, "effect": "decay 0.9"}}
CONFIG: dict[str, Any] = {
    "model": {"class_path": "lit_tricks.Classifier", "init_args": {"model": "resnet"}},
    "data": {"class_path": "lit_tricks.data.Digits", "init_args": {}},
    "trainer": {"max_epochs": 2, "callbacks": None},
}


def arrays(**changes: Any) -> dict[str, Any]:
    """Predictions of four images; ``...`` leaves an array out."""
    found = {
        "split": np.array("test"),
        "classes": np.array(["ant", "bee"]),
        "label": np.array([0, 1, 0, 1], np.int16),
        "top": np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.int16),
        "confidence": np.array([0.9, 0.8, 0.7, 0.6]),
        "probability": np.array([0.9, 0.2, 0.3, 0.6]),
        "index": np.arange(4),
        "wrong_index": np.array([1, 2]),
        "wrong_image": np.full((2, 8, 8, 3), 99, np.uint8),
        "wrong_file": np.array(["1.jpg", "2.jpg"]),
    }
    return {name: value for name, value in (found | changes).items() if value is not ...}


def pixels(**changes: Any) -> dict[str, Any]:
    """Predictions of the pixels of an image."""
    found = {
        "split": np.array("val"),
        "classes": np.array(["ground", "cell"]),
        "confusion": np.array([[5, 1], [2, 8]]),
        "images": np.array(1),
        "worst_iou": np.array([0.5]),
        "worst_index": np.array([0]),
        "worst_file": np.array(["0.jpg"]),
        "image_0": np.zeros((4, 4, 3), np.uint8),
        "mask_0": np.zeros((4, 4), np.int16),
        "predicted_0": np.ones((4, 4), np.int16),
    }
    return {name: value for name, value in (found | changes).items() if value is not ...}


def write_run(folder: Path, predicted: dict[str, Any] | None = None, **parts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"results": RESULTS, "tricks": TRICKS}.items():
        text = parts.get(name, content)
        (folder / f"{name}.json").write_text(text if isinstance(text, str) else json.dumps(text))
    config = parts.get("config", CONFIG)
    (folder / "config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    rows = parts.get("metrics", "epoch,step,train/loss_epoch,val/loss,val/top1\n0,1,2,2,0.3\n1,2,1,1,0.5\n")
    (folder / "metrics.csv").write_text(rows)
    np.savez_compressed(folder / "predictions.npz", **(arrays() if predicted is None else predicted))
    return folder


class Page(HTMLParser):
    """Tags and the text that a browser shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time, and are drawn in the tests that are about them."""
    monkeypatch.setattr("lit_tricks.run.report.content.draw", lambda *args, **kwargs: dot())


def dot() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    return stream.getvalue()


def noted(folder: Path, part: str) -> str:
    """Make the report, which must say why a part is missing."""
    text = Page(report([str(folder)])).text
    assert f"no {part}." in text, text[-600:]
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Wrong content


def test_a_whole_run_misses_nothing(tmp_path: Path, undrawn: None) -> None:
    assert "The reason" not in Page(report([str(write_run(tmp_path / "a" / "v0"))])).text
    assert "The reason" not in Page(report([str(write_run(tmp_path / "b" / "v0", pixels()))])).text


def deep(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """A copy with another value at a path such as ``time/clock``; ``...`` leaves it out."""
    key, _, rest = path.partition("/")
    changed = dict(value)
    if rest:
        changed[key] = deep(value[key], rest, new)
    elif new is ...:
        del changed[key]
    else:
        changed[key] = new
    return changed


BAD_RESULTS = [
    ("seconds", "abc"), ("seconds", [1]), ("seconds", -1), ("seconds", True), ("time", "x"), ("time", [1]),
    ("time/clock", ...), ("time/clock", "sundial"), ("time/clock", None), ("time/seconds", ...), ("time/seconds", [1]),
    ("time/seconds/data", "long"), ("time/seconds/data", None), ("raw", [1]), ("raw", "x"), ("raw/val", "x"),
    ("raw/val", [1, 2]), ("raw/val/top1", "abc"), ("raw/val/top1", [1]), ("raw/val/top1", {}), ("averaged", [1]),
    ("peak_memory", "<b>"), ("peak_memory", {}), ("epoch", "last"), ("epoch", [1]), ("best_checkpoint", 5),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BAD_RESULTS)
def test_wrong_results_are_noted(path: str, value: Any, tmp_path: Path, undrawn: None) -> None:
    run = write_run(tmp_path / "v0", results=deep({"averaged": {}} | RESULTS, path, value))
    assert "results.json cannot be read" in noted(run, "results")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"x"', "null", "NaN", '{"raw": NaN}', "[" * 10_000, '{"epoch": 1e999}', "\ud800"]
)
def test_results_that_are_no_results_are_noted(text: str, tmp_path: Path, undrawn: None) -> None:
    run = write_run(tmp_path / "v0", results="{}")
    (run / "results.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    noted(run, "results")


@pytest.mark.parametrize(
    "tricks",
    [
        {"EMA": []}, {"EMA": "x"}, {"EMA": {}}, {"EMA": {"arguments": [1], "effect": ""}},
        {"EMA": {"arguments": {}, "effect": 5}}, [],
    ],
)  # fmt: skip
def test_wrong_tricks_are_noted(tricks: Any, tmp_path: Path, undrawn: None) -> None:
    noted(write_run(tmp_path / "v0", tricks=tricks), "tricks")


@pytest.mark.parametrize(
    "config",
    [
        deep(CONFIG, "model", "resnet"), deep(CONFIG, "model", [1]), deep(CONFIG, "model/init_args", [1]),
        deep(CONFIG, "data", 5), deep(CONFIG, "trainer", "x"), deep(CONFIG, "model/class_path", [1]),
        "a: [", "!!python/object/apply:os.system [touch PWNED]", "{1: 2, model: {class_path: 3}}", "ckpt_path: [1]",
    ],
)  # fmt: skip
def test_wrong_settings_are_noted(config: Any, tmp_path: Path, undrawn: None, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    noted(write_run(tmp_path / "v0", config=config), "settings")
    assert not Path("PWNED").exists()


BAD_ARRAYS: dict[str, dict[str, Any]] = {
    "labels below zero": {"label": np.array([-5, 0, 0, 0])},
    "a label of 2**40": {"label": np.array([2**40, 0, 0, 0])},
    "labels of words": {"label": np.array(list("abcd"))},
    "labels of another number": {"label": np.array([0, 1])},
    "a table of labels": {"label": np.zeros((4, 2), np.int64)},
    "no labels": {"label": ...},
    "top of another length": {"top": np.zeros((3, 2), np.int64)},
    "top without columns": {"top": np.zeros((4, 0), np.int64)},
    "top of one dimension": {"top": np.zeros(4, np.int64)},
    "a top class of 2**40": {"top": np.full((4, 1), 2**40)},
    "an unknown wrong index": {"wrong_index": np.array([7, 8])},
    "images of seven channels": {"wrong_image": np.zeros((2, 8, 8, 7), np.uint8)},
    "images of floats": {"wrong_image": np.zeros((2, 8, 8, 3))},
    "images of one dimension": {"wrong_image": np.zeros(2, np.uint8)},
    "images without pixels": {"wrong_image": np.zeros((2, 0, 8, 3), np.uint8)},
    "an unknown split": {"split": np.array("x")},
    "a list of splits": {"split": np.array(["test", "val"])},
    "no split": {"split": ...},
    "confidence above one": {"confidence": np.array([0.9, 5, 0.7, 0.6])},
    "confidence that is no number": {"confidence": np.array([0.9, np.nan, 0.7, 0.6])},
    "confidence of words": {"confidence": np.array(list("abcd"))},
    "a table of names": {"classes": np.array([["ant"], ["bee"]])},
}
BAD_PIXELS: dict[str, dict[str, Any]] = {
    "a matrix that is no square": {"confusion": np.zeros((2, 3), np.int64)},
    "a matrix of words": {"confusion": np.array([["a"]])},
    "counts below zero": {"confusion": np.array([[-1, 0], [0, 1]])},
    "counts that overflow": {"confusion": np.full((2, 2), 2**62)},
    "labels that are no classes": {"mask_0": np.full((4, 4), 9)},
    "a mask of another size": {"predicted_0": np.zeros((2, 2), np.int16)},
    "no image": {"image_0": ...},
    "an image of seven channels": {"image_0": np.zeros((4, 4, 7), np.uint8)},
    "lists of other lengths": {"worst_iou": np.array([0.5, 0.6])},
    "a list of numbers of images": {"images": np.array([1, 2])},
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_wrong_predictions_are_noted(what: str, tmp_path: Path, undrawn: None) -> None:
    noted(write_run(tmp_path / "v0", arrays(**BAD_ARRAYS[what])), "predictions")


@pytest.mark.parametrize("what", BAD_PIXELS)
def test_wrong_predictions_of_pixels_are_noted(what: str, tmp_path: Path, undrawn: None) -> None:
    noted(write_run(tmp_path / "v0", pixels(**BAD_PIXELS[what])), "predictions")


def test_pickled_arrays_are_not_loaded(tmp_path: Path, undrawn: None) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return pytest.fail, ("executed",)

    noted(write_run(tmp_path / "v0", arrays(label=np.array([Evil()] * 4, dtype=object))), "predictions")


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "v0", metrics="epoch,step,val/loss\n0,1,2.5\n1,2,1.2")  # of 1.25
    assert [row["val/loss"] for row in read_run_folder(run).rows] == [2.5]


def test_runs_that_resume_each_other_are_noted(tmp_path: Path) -> None:
    a, b = tmp_path / "a" / "v0", tmp_path / "b" / "v0"
    for run, other in ((a, b), (b, a)):
        write_run(run, config=CONFIG | {"ckpt_path": str(other / "checkpoints" / "last.ckpt")})
    assert len(read_run_folder(a).rows) >= 2
    assert "curves before it was resumed" in read_run_folder(b).missing or read_run_folder(b).rows


# ---------------------------------------------------------------------------------------------------------------------
# Explosions


def npy(shape: str, descr: str = "<i8", data: bytes = b"") -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (63 - (10 + len(head)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + data


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "member",
    [npy("(50000000000,)"), npy("(-1,)"), npy("(3,)", data=b"\0" * 8), npy("(1,)", "<U100000000"), b"x"],
    ids=["400 GB", "below zero", "too short", "a long word", "no array"],
)  # fmt: skip
def test_an_array_that_is_larger_than_its_file_takes_no_memory(member: bytes, tmp_path: Path, undrawn: None) -> None:
    run = write_run(tmp_path / "v0")
    with zipfile.ZipFile(run / "predictions.npz", "w") as archive:
        archive.writestr("label.npy", member)
    with pytest.raises(ValueError, match=r"label|magic|EOF|expected"):
        read_arrays(run / "predictions.npz")
    noted(run, "predictions")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        data = b"\0" * 2**25
        for number in range(9):
            archive.writestr(f"{number}.npy", npy(f"({2**25},)", "|u1", data))
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than"):
        read_arrays(tmp_path / "a.npz")
    assert time.monotonic() - start < 1


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [LAUGHS, MERGES, "a: &a [*a]", "[" * 5000], ids=["laughs", "merges", "itself", "deep"])
def test_aliases_that_explode_are_rejected(text: str, tmp_path: Path, undrawn: None, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, yaml.YAMLError)):
        parse_yaml(text)
    Path("bomb.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"--config bomb\.yaml"):
        resolve_configs(["fit", "--config", "bomb.yaml"])
    noted(write_run(tmp_path / "v0", config=text), "settings")


def test_a_few_aliases_are_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: {d: 3}}") == {"a": [1, 2], "b": [1, 2], "c": {"d": 3}}
    assert parse_yaml("") is None


# ---------------------------------------------------------------------------------------------------------------------
# Names

EVIL = (
    "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://evil/a.png)",
    "a|b", "a`b", "```\n# x", "a\nb", "*x*", "&lt;b&gt;", r"$x_{\frac$", "$$", r"\$x$", "\u202e\ud800", "=1+1", "画像",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if number % 4 else ()) for number, name in enumerate(EVIL)]
)
def test_a_name_is_text_in_every_report(name: str, tmp_path: Path) -> None:
    clean = name.encode("utf-8", "backslashreplace").decode()
    predicted = arrays(classes=np.array([clean, "bee"]), wrong_file=np.array([clean.replace("\n", " "), "2.jpg"]))
    tricks = {name: {"arguments": {name: name}, "effect": name}}
    run = write_run(
        tmp_path / "v0", predicted, tricks=tricks, results=deep(RESULTS, "raw/val", {"loss": 1.0, name: 0.5})
    )
    page = Page(report([str(run)]))  # draws all pictures
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert "onerror" not in page.text or "<img src=x onerror" in page.text  # shown as text
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "](javascript:" not in text.replace("\\]", "")
    assert "](http" not in text.replace("\\]", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"), ("<b>", "&lt;b&gt;"), ("[x](y)", r"\[x\](y)"), ("a\nb", "a b"), ("`", r"\`"), ("a_b", "a_b"),
        ("R&D", "R&amp;D"), ("$x$", r"\$x\$"), ("\\", "\\\\"), ("51.00 ± 1.41", "51.00 ± 1.41"), ("+ ema", "+ ema"),
    ],
)  # fmt: skip
def test_markdown_is_escaped(text: str, shown: str) -> None:
    assert escape_markdown(text) == shown


def test_code_does_not_end_early() -> None:
    assert code_span("a`b") == "`` a`b ``"
    assert code_span("a\nb") == "`a b`"
    assert code_block("```\n<script>", "yaml") == ["````yaml", "```\n<script>", "````"]


def test_the_table_of_an_ablation_runs_no_formulas(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    names = ("baseline", "+ ema", "+ cmd|' /C calc'!A0", "=1+1", "<b>$x$")
    report_ablation(tmp_path, {name: {0: run} for name in names}, "above")
    with (tmp_path / "ablation.csv").open(encoding="utf-8") as stream:
        rows = [row["row"] for row in csv.DictReader(stream)]
    assert rows == ["baseline", "+ ema", "'+ cmd|' /C calc'!A0", "'=1+1", "<b>$x$"]
    assert "&lt;b&gt;" in (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert row_cell("- label_smoothing") == "- label_smoothing"


# ---------------------------------------------------------------------------------------------------------------------
# Places


@pytest.mark.parametrize("file", ["report.md", "report.html", "loss.png", "confusion.png"])
def test_a_report_follows_no_link(file: str, tmp_path: Path, undrawn: None) -> None:
    run = write_run(tmp_path / "v0")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / file).symlink_to(victim)
    report([str(run)])
    assert victim.read_text() == "precious"
    assert not (run / file).is_symlink()


@pytest.mark.parametrize("name", ["../../x", "..", "a/../../x", "/tmp/x", "", ".", "a\\..\\x", "a\0b"])
def test_the_name_of_a_run_stays_in_the_folder_of_runs(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--name"):
        RunFolder().create(str(tmp_path / "runs"), name)
    assert not list(tmp_path.iterdir())
    folder = RunFolder()
    folder.create(str(tmp_path / "runs"), "group/plain")
    assert folder.path == tmp_path / "runs/group/plain/v0"


PLACES = ("/home/me/secret/photos", "~/secret/photos", "C:\\Users\\secret\\photos", "\\\\server\\secret\\photos")


@pytest.mark.parametrize("place", PLACES)
def test_a_card_names_no_folder_of_the_machine(place: str, tmp_path: Path) -> None:
    config = deep(deep(CONFIG, "data", {"class_path": "lit_tricks.data.ImageFolder", "init_args": {"root": place}}),
                  "trainer/default_root_dir", place)  # fmt: skip
    tricks = {"KnowledgeDistillation": {"arguments": {"teacher": place}, "effect": ""}}
    run = write_run(tmp_path / "v0", config=config, tricks=tricks)
    (run / "checkpoints").mkdir()
    content = {
        "pytorch-lightning_version": "2.6.0", "epoch": 1, "state_dict": {"w": torch.zeros(1)},
        "hyper_parameters": {"model": "resnet", "model_args": {"weights": place}},
        "datamodule_hyper_parameters": {"_class_path": "lit_tricks.data.ImageFolder", "root": place},
    }  # fmt: skip
    torch.save(content, run / "checkpoints" / "best.ckpt")
    text = card(str(run / "checkpoints" / "best.ckpt")).read_text(encoding="utf-8")
    assert "secret" not in text
    assert "photos" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["x` <script>alert(1)</script>", "[x](javascript:alert(1))", "<img src=x>"])
def test_a_card_escapes_the_model(name: str, tmp_path: Path) -> None:
    content = {
        "pytorch-lightning_version": "2.6.0", "epoch": 1, "state_dict": {"w": torch.zeros(1)},
        "hyper_parameters": {"model": name, "num_classes": 2},
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt")
    text = card(str(tmp_path / "a.ckpt")).read_text(encoding="utf-8")
    body = text.split("---\n", 2)[2]
    title = body.strip().splitlines()[0]
    assert "<" not in title
    assert "](" not in title.replace("\\]", "")


def test_the_checks_of_this_file_see_what_they_should(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>a<script>b</script>")
    page = Page(tmp_path / "a.html")
    assert page.tags == ["p", "script"]
    change: Callable[..., Any] = deep
    assert change({"a": {"b": 1}}, "a/b", ...) == {"a": {}}
