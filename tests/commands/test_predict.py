"""``lit-tricks predict``: which files it takes, which tables it writes, and with what."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import FIT, QUIET, Outcome, cli, done, logits_of, workplace, write_image_folder
from lightning.pytorch import Trainer
from PIL import Image, ImageOps

import lit_tricks
from lit_tricks.commands import predict
from lit_tricks.commands.predicting.loading import load
from lit_tricks.data import Digits, ImageFolder
from lit_tricks.data.io.jpeg import read_image
from lit_tricks.run.tables import check_table, write_table

FILES = ("b.png", "deep/a, b.jpg", "deep/er/alpha.PNG", "deep/er/gray.png", "deep/moving.gif")


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def table(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with images of all kinds, other files, and two runs: ``tiny`` on digits, ``animals`` on photos."""
    with workplace(tmp_path_factory.mktemp("predict")) as path:
        done(*FIT)
        write_image_folder(path / "data", classes=("zebra", "ant", "Mule, old"))
        words = ("--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0", "--name=animals")
        done(*FIT, "--data=ImageFolder", "--data.root=data", *words)
        (path / "data").rename(path / "gone")
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Any:
            return (torch.rand(shape, generator=generator) * 255).byte().numpy()

        root = path / "images"
        (root / "deep" / "er").mkdir(parents=True)
        Image.fromarray(noise(9, 8, 3)).save(root / "b.png")
        Image.fromarray(noise(30, 20, 3)).save(root / "deep" / "a, b.jpg")
        Image.fromarray(noise(8, 8)).save(root / "deep" / "er" / "gray.png")
        Image.fromarray(noise(11, 11, 4)).save(root / "deep" / "er" / "alpha.PNG")
        frames = [Image.fromarray(noise(8, 8, 3)) for _ in range(3)]
        frames[0].save(root / "deep" / "moving.gif", save_all=True, append_images=frames[1:])
        (root / "notes.txt").write_text("not an image")
        (root / "deep" / "film.mov").write_bytes(b"not an image")
        broken = path / "broken"
        broken.mkdir()
        (broken / "cut.png").write_bytes((root / "b.png").read_bytes()[:60])
        (broken / "empty.jpg").touch()
        (broken / "text.webp").write_text("no image")
        yield path


@pytest.fixture(autouse=True)
def output(folder: Path) -> Iterator[None]:
    """Remove what a test has written."""
    before = set(folder.iterdir())
    yield
    for path in set(folder.iterdir()) - before:
        if path.is_file():
            path.unlink()


def predicted(*words: str, images: str = "images", run: str = "tiny") -> Outcome:
    return done("predict", images, f"--ckpt=runs/{run}/v0", *words)


@pytest.mark.slow
def test_a_row_has_the_most_probable_classes(folder: Path) -> None:
    outcome = predicted("--batch-size=2")
    assert "5 predictions written to predictions.csv" in outcome.log
    rows = table("predictions.csv")
    names = [f"{kind}{i}" for i in range(1, 6) for kind in ("label", "probability")]
    assert list(rows[0]) == ["file", *names, "error"]
    assert sorted(row["file"] for row in rows) == sorted(f"images/{name}" for name in FILES)
    transform = Digits().eval_transform
    for row in rows:
        with Image.open(row["file"]) as image:
            logits = logits_of("runs/tiny/v0/checkpoints/best.ckpt", transform(image)[None])
        probabilities = logits[0].softmax(0).tolist()
        ranking = sorted(range(10), key=lambda label: -probabilities[label])[:5]
        assert [row[f"label{i}"] for i in range(1, 6)] == [str(label) for label in ranking]
        written = [float(row[f"probability{i}"]) for i in range(1, 6)]
        assert written == pytest.approx([probabilities[i] for i in ranking], abs=2e-6)
        assert row["error"] == ""


@pytest.mark.slow
def test_predict_needs_no_training_data(folder: Path) -> None:
    predicted("-o", "out.csv", "--top-k=9", run="animals")
    names = ["Mule, old", "ant", "zebra"]
    data = ImageFolder(str(folder / "gone"), image_size=16)
    for row in table("out.csv"):
        pixels = data.input_transform()(row["file"])
        found = logits_of("runs/animals/v0/checkpoints/best.ckpt", pixels[None])[0].softmax(0).tolist()
        written = {row[f"label{i}"]: float(row[f"probability{i}"]) for i in (1, 2, 3)}
        assert written == pytest.approx(dict(zip(names, found, strict=True)), abs=2e-6)


@pytest.mark.slow
def test_the_flags_of_old(folder: Path) -> None:
    path = "runs/tiny/v0/checkpoints/best.ckpt"
    done("predict", "--ckpt_path", path, "--images", "images", "--output", "old.csv", *QUIET, "--data.batch_size=3")
    done("predict", f"--ckpt_path={path}", "--images=images", "--output=older.csv")
    predicted("-o=new.csv")
    assert Path("old.csv").read_text() == Path("older.csv").read_text() == Path("new.csv").read_text()


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (("images/b.png",), ["images/b.png"]),
        (("images/b.png", "images/deep/er", "images/b.png"), ["images/b.png", *(f"images/{x}" for x in FILES[2:4])]),
        (("images/*",), ["images/b.png", "images/notes.txt"]),
        (("images/**/*.[pg]*",), ["images/b.png", *(f"images/{x}" for x in FILES[3:])]),
        (("--images", "images/b.png", "images/deep/moving.gif"), ["images/b.png", "images/deep/moving.gif"]),
    ],
)
def test_files_folders_and_globs(folder: Path, words: tuple[str, ...], files: list[str]) -> None:
    done("predict", *words, "--ckpt=runs/tiny/v0", "-o=out.csv")
    rows = table("out.csv")
    assert [row["file"] for row in rows] == files
    assert [row["file"] for row in rows if row["error"]] == [file for file in files if file.endswith("txt")]


def test_omitted_images_are_counted(folder: Path) -> None:
    log = predicted("-o=out.csv", "--top-k=1").log
    assert "2 files were ignored" in log
    assert "images/notes.txt" in log
    assert "1 .mov" in log
    assert list(table("out.csv")[0]) == ["file", "label1", "probability1", "error"]


@pytest.mark.parametrize("run", ["tiny", "animals"])
@pytest.mark.parametrize("words", [(), ("--batch-size=1",)])
def test_a_broken_file_is_a_row_with_its_error(folder: Path, run: str, words: tuple[str, ...]) -> None:
    outcome = cli("predict", "broken", "images/b.png", f"--ckpt=runs/{run}/v0", "-o=out.csv", *words)
    assert outcome.code == 0
    assert "3 of 4 files could not be read" in outcome.log
    rows = table("out.csv")
    assert [row["file"] for row in rows] == ["broken/cut.png", "broken/empty.jpg", "broken/text.webp", "images/b.png"]
    assert [bool(row["error"]) for row in rows] == [True, True, True, False]
    assert [bool(row["label1"]) for row in rows] == [False, False, False, True]
    assert "truncated" in rows[0]["error"]


def test_workers_report_broken_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tricks.data.datamodule.FILES_PER_WORKER", 4)
    predict(["broken", "images/b.png"], ckpt="runs/animals/v0", output="out.json", device="cpu")
    assert [row["error"] is not None for row in json.loads(Path("out.json").read_text())] == [True, True, True, False]


@pytest.mark.slow
def test_the_ending_decides_the_format(folder: Path) -> None:
    predicted("-o=new/deep/out.json", images="images/b.png")
    [row] = json.loads(Path("new/deep/out.json").read_text())
    assert (row["file"], row["error"]) == ("images/b.png", None)
    assert isinstance(row["probability1"], float)
    predicted("-o=out.jsonl")
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert row in lines
    predicted("-o=plain", images="images/b.png")
    assert Path("plain").read_text() == predicted("-o", "-", images="images/b.png").out.replace("\r\n", "\n")


def test_standard_output_has_nothing_but_the_table(folder: Path) -> None:
    outcome = cli("predict", "images/b.png", "--ckpt", "runs/tiny/v0", "--output", "-")
    assert len(rows_of(outcome.out)) == 1
    assert outcome.out.startswith("file,label1,")


def test_parquet_has_rows_of_broken_images_too(folder: Path) -> None:
    from pyarrow import parquet  # here, as its import takes a while

    cli("predict", "broken", "images", "--ckpt=runs/tiny/v0", "-o=out.parquet")
    found = parquet.read_table("out.parquet").to_pylist()
    predicted("-o=out.jsonl")
    assert len(found) == 8
    assert found[0]["label1"] is None
    expected = json.loads(Path("out.jsonl").read_text().splitlines()[0])
    assert found[3]["probability1"] == pytest.approx(expected["probability1"], abs=1e-6)


def test_parquet_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lit_tricks.run.tables.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lit-tricks\[parquet\]"):
        check_table(str(tmp_path / "new" / "x.parquet"))
    assert not (tmp_path / "new").exists()


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    write_table(str(tmp_path / "x.json"), {"file": "", "score": ".2f"}, [["é\udcff", float("nan")]])
    assert json.loads((tmp_path / "x.json").read_text()) == [{"file": "é\udcff", "score": None}]


@pytest.mark.slow
def test_options_of_the_trainer_and_the_data(folder: Path) -> None:
    predicted("-o=one.csv")
    predicted("-o=flipped.csv", "--config", "tricks/test_time_augment", "--device=cpu")
    predicted("-o=same.csv", "--trainer.precision", "32-true")
    predicted("-o=larger.csv", "--data.eval_size", "9")
    one, flipped, same, larger = (Path(f"{name}.csv").read_text() for name in ("one", "flipped", "same", "larger"))
    assert one == same
    assert len({one, flipped, larger}) == 3


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (("nowhere",), "images='nowhere'.*no such file"),
        (("no*where",), r"images='no\*where'.*no file matches"),
        (("gone/train/none",), "images='gone/train/none'.*no such file"),
        (("runs/tiny/v0/checkpoints",), "no image was found.*.heic"),
        (("broken",), "none of the 3 files.*broken/cut.png"),
        (("images", "-o=out.txt"), "output='out.txt'.*.jsonl"),
        (("images", "-o=images"), "output='images' is a folder"),
        (("images", "--top-k=0"), "top_k=0"),
        (("images", "--batch-size=-1"), "batch_size=-1"),
        (("images", "--device=tpu9"), "device='tpu9'.*mps"),
        (("images", "--topk=3"), "topk"),
        (("--images",), "IMAGES"),
    ],
)
def test_predict_wrong_arguments_explain_themselves(folder: Path, words: tuple[str, ...], token: str) -> None:
    before = set(folder.rglob("*"))
    outcome = cli("predict", *words, "--ckpt=runs/tiny/v0")
    assert outcome.code in (1, 2)
    assert outcome.err.startswith("lit-tricks: error: ")
    assert outcome.err.count("\n") == 1
    assert re.search(token, outcome.err), outcome
    assert set(folder.rglob("*")) == before


def test_predict_without_checkpoint_is_rejected(folder: Path) -> None:
    outcome = cli("predict", "images")
    assert (outcome.code, "ckpt" in outcome.err) == (2, True)
    outcome = cli("predict", "images", "--ckpt=images/notes.txt")
    assert (outcome.code, "images/notes.txt is not a checkpoint" in outcome.err) == (1, True)


def test_names_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"images/b.png\n\nimages/{FILES[3]}\n"))
    assert predicted("-o=piped.csv", images="-").out == ""
    done("predict", "images/b.png", f"images/{FILES[3]}", "--ckpt", "runs/tiny/v0", "-o=named.csv")
    assert Path("piped.csv").read_text() == Path("named.csv").read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "no image was found" in cli("predict", "-", "--ckpt", "runs/tiny/v0").err


def test_help_is_about_predicting(folder: Path) -> None:
    out = done("predict", "--help").out
    assert all(flag in out for flag in ("IMAGES", "--ckpt", "--top-k", "--device", "--batch-size", "--output"))
    assert len(out.splitlines()) < 80


@pytest.mark.slow
def test_an_exported_file_predicts_the_same(folder: Path) -> None:
    for run in ("tiny", "animals"):
        done("export", f"runs/{run}/v0", "--format=onnx", f"-o={run}.onnx")
        predicted("-o=ckpt.json", run=run)
        done("predict", "images", f"--ckpt={run}.onnx", "-o=onnx.json")
        ckpt, onnx = (json.loads(Path(f"{name}.json").read_text()) for name in ("ckpt", "onnx"))
        for ours, theirs in zip(ckpt, onnx, strict=True):
            numbers = [key for key in ours if key.startswith("probability")]
            assert [theirs[key] for key in numbers] == pytest.approx([ours[key] for key in numbers], abs=1e-4)
            assert {**theirs, **dict.fromkeys(numbers)} == {**ours, **dict.fromkeys(numbers)}


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_exports_keep_the_orientation_rule(folder: Path, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(32 * 20 * 3, dtype=np.uint32).reshape(20, 32, 3) % 251
    Image.fromarray(pixels.astype(np.uint8)).save("phone.png", exif=exif)
    model = lit_tricks.Classifier(model_args={"depth": 18, "width": 0.125}, num_classes=2, class_names=["a", "b"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model.trainer = trainer
    trainer.strategy.connect(model)
    trainer.save_checkpoint("turned.ckpt", weights_only=True)
    content = torch.load("turned.ckpt", weights_only=True)
    settings = {"_class_path": "lit_tricks.data.ImageFolder", "root": "gone", "image_size": 32, "exif": turned}
    torch.save(content | {"datamodule_hyper_parameters": settings}, "turned.ckpt")
    done("export", "turned.ckpt", "--format=onnx", "-o=turned.onnx")
    [ours], [theirs] = (lit_tricks.predict(file, "phone.png") for file in ("turned.ckpt", "turned.onnx"))
    assert theirs.names == ours.names
    assert theirs.probabilities == pytest.approx(ours.probabilities, abs=1e-4)
    assert [load(file)[1].exif for file in ("turned.ckpt", "turned.onnx")] == [turned, turned]
    done("export", "turned.ckpt", "--format=timm", "-o=turned")
    assert json.loads(Path("turned", "config.json").read_text())["exif"] is turned
    assert ("exif_transpose" in Path("turned", "README.md").read_text()) is turned
    shutil.rmtree("turned")


def test_files_that_are_no_exported_network(folder: Path) -> None:
    Path("text.onnx").write_text("no network")
    assert "text.onnx is not a file that ONNX Runtime reads" in cli("predict", "images", "--ckpt=text.onnx").err


def test_heic_names_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_tricks.data.io.formats.find_spec", lambda name: None)
    Path("phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    predicted("-o=out.csv", "phone.heic")
    assert "lit-tricks[heic]" in table("out.csv")[-1]["error"]


def test_heic_is_read(folder: Path) -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64), (200, 10, 10)).save("phone.heic", exif=exif, quality=95)
    predicted("-o=out.csv", "phone.heic", images="images/b.png")
    assert [row["error"] for row in table("out.csv")] == ["", ""]
    for turned in (False, True):  # HEIC has its own field, which the decoder obeys. EXIF does not count.
        image = read_image("phone.heic", exif=turned)
        assert (image.mode, image.size) == ("RGB", (96, 64))
        assert np.abs(np.asarray(image).mean((0, 1)) - [200, 10, 10]).max() < 5


def test_avif_and_webp(folder: Path) -> None:
    image = Image.fromarray(np.full((9, 9, 3), 200, np.uint8))
    for name in ("x.webp", "x.avif"):
        image.save(name)
    predicted("-o=out.csv", "x.webp", "x.avif", images="images/b.png")
    assert [row["error"] for row in table("out.csv")] == ["", "", ""]


@pytest.mark.slow
def test_predictions_in_python(folder: Path) -> None:
    with Image.open("images/b.png") as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels.copy()).movedim(-1, 0)
    for run, classes in (("tiny", 10), ("animals", 3)):
        predicted("-o=written.json", images="images/b.png", run=run)
        [row] = json.loads(Path("written.json").read_text())
        kinds: list[Any] = ["images/b.png", Path("images/b.png"), image, pixels, tensor]
        for found in lit_tricks.predict(f"runs/{run}/v0", kinds, batch_size=2):
            assert found.names == [row[f"label{i}"] for i in range(1, min(classes, 5) + 1)]
            written = [row[f"probability{i}"] for i in range(1, min(classes, 5) + 1)]
            assert found.probabilities == pytest.approx(written, abs=2e-3)
        for each in kinds:
            [(names, probabilities)] = lit_tricks.predict(f"runs/{run}/v0", each, top_k=1)
            assert (names, len(probabilities)) == ([row["label1"]], 1)
    assert len(lit_tricks.predict("runs/animals/v0", np.stack([pixels, pixels]))) == 2


@pytest.mark.parametrize(
    ("image", "token"),
    [
        (np.zeros((8, 8, 3)), "uint8"),
        (torch.zeros(3, 8, 8), "uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\(H, W, 3\)"),
        ([None], "Give a path"),
        (7, "is no image"),
    ],
)
def test_images_that_are_none(folder: Path, image: Any, token: str) -> None:
    with pytest.raises(ValueError, match=token):
        lit_tricks.predict("runs/tiny/v0", image)


def test_the_transform_of_a_checkpoint(folder: Path) -> None:
    for run, data in (("tiny", Digits()), ("animals", ImageFolder("gone", image_size=16))):
        path = f"runs/{run}/v0/checkpoints/best.ckpt"
        model = lit_tricks.Classifier.load_from_checkpoint(path, weights_only=True).eval()
        transform = model.transform()
        assert torch.equal(transform("images/b.png"), data.input_transform()("images/b.png"))
        with torch.no_grad():
            assert model(transform("images/b.png")[None]).shape == (1, model.num_classes)
        with pytest.raises(ValueError, match=r"uint8.*transform\(\)"):
            model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"transform\(\).*unknown"):
        lit_tricks.Classifier(model_args={"depth": 18, "width": 0.03125}, num_classes=3).transform()


def test_exif_turns_images_alike_everywhere(folder: Path) -> None:
    for orientation in range(1, 9):
        pixels = np.random.default_rng(orientation).integers(0, 256, (20, 32, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("phone.jpg", "phone.png"):
            Image.fromarray(pixels).save(name, exif=exif)
            with Image.open(name) as image:
                upright = ImageOps.exif_transpose(image)
                turned, plain = (ImageFolder("gone", image_size=16, exif=each) for each in (True, False))
                assert read_image(name, exif=True).size == upright.size
                assert torch.allclose(turned.input_transform()(name), plain.input_transform()(upright), atol=0.1)
                assert torch.equal(turned.input_transform()(image), plain.input_transform()(upright))
                assert read_image(name).size == image.size
    assert ImageFolder("gone").exif is False
