"""``lit-tricks resolution``: its accuracies and costs, what it leaves, and what it rejects."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rich.console
import rich.progress
import timm
import torch
from helpers.cli import FIT, cli, done, workplace, write_image_folder
from helpers.fits import make_trainer
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder as Folder
from torchvision.transforms import v2

from lit_tricks import Classifier
from lit_tricks.commands import resolution
from lit_tricks.commands.sizes.size_range import parse_sizes
from lit_tricks.data import Digits, ImageFolder
from lit_tricks.data.io import jpeg as _jpeg


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a tiny network on the digits."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT)
    return str(folder / "runs/tiny/v0/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path), mock.patch("lit_tricks.run.report.resolution_curve._draw", wraps=None) as draw:
        draw.side_effect = lambda rows, train_size, title, path: path.write_bytes(b"")  # takes longer than the rest
        yield tmp_path


def result(folder: str = "resolution") -> list[dict[str, Any]]:
    with Path(folder, "resolution.csv").open(newline="") as stream:
        return [{key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(stream)]


def write_state(architecture: str, num_classes: int, **model_args: Any) -> str:
    """A file of random weights."""
    torch.manual_seed(0)
    torch.save(timm.create_model(architecture, num_classes=num_classes, **model_args).state_dict(), "weights.pth")
    return "weights.pth"


class Flat(LightningModule):
    """Its cost can be worked out by hand, and it takes one size only if it is told so."""

    def __init__(self, side: int | None = None) -> None:
        super().__init__()
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if side is None else [nn.Flatten()]
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *pool, nn.Linear(4 if side is None else 4 * side**2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)  # type: ignore[no-any-return]


class Foreign(LightningDataModule):
    """A data module without any class of this library."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root

    def val_dataloader(self) -> Any:
        steps = [v2.Resize(10), v2.CenterCrop(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        return DataLoader(Folder(f"{self.root}/val", v2.Compose(steps)), batch_size=4)


# ---------------------------------------------------------------------------------------------------------------------
# Its numbers


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["128:448:32"], [128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448]),
        (["24:40:10"], [24, 34]),
        (["288", "224", "224:232:8"], [224, 232, 288]),
        ([8], [8]),
    ],
)
def test_parse_sizes_expands_ranges(words, sizes):
    assert parse_sizes(words) == sizes


@pytest.mark.parametrize("word", ["", "a", "8:a", "8:16", "1:2:3:4", "16:8:2", "8:16:0", "0:8:1", "-8", "2.5"])
def test_sizes_that_are_none(word):
    with pytest.raises(ValueError, match=rf"--sizes '{word}' .*128:448:32"):
        parse_sizes([word])


@pytest.mark.slow
def test_accuracies_are_those_of_the_trainer(trained):
    outcome = done("resolution", f"--ckpt={trained}", "--sizes", "8:12:2", "--split=test")
    assert re.search(r"\n *8 .* training", outcome.out)
    assert outcome.out.count("best") == 1
    rows = result()
    assert [row["size"] for row in rows] == [8, 10, 12]
    model = Classifier.load_from_checkpoint(trained, map_location="cpu", weights_only=True)
    for row in rows:
        [expected] = make_trainer().test(model, Digits(eval_size=int(row["size"])), verbose=False)
        for name in ("top1", "top5"):
            assert row[name] == pytest.approx(expected[f"test/{name}"])
    assert len({row["top1"] for row in rows}) > 1


@pytest.mark.slow
def test_crop_ratios_are_lines_of_their_own(trained):
    done("resolution", f"--ckpt={trained}", "--sizes", "8", "10", "--crop-ratio", "0.8", "1.0")
    rows = result()
    assert [(row["size"], row["crop_ratio"]) for row in rows] == [(8, 0.8), (10, 0.8), (8, 1.0), (10, 1.0)]
    data = Digits()
    data.setup("validate")
    loader = data.val_dataloader()
    loader.dataset.transform = data.eval_transform_at(10, 0.8)
    model = Classifier.load_from_checkpoint(trained, map_location="cpu", weights_only=True).eval()
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).double() for images, labels in loader]
    assert rows[1]["top1"] == pytest.approx(float(torch.cat(right).mean()))


@pytest.mark.slow
def test_default_sizes_begin_where_something_is_left(trained):
    done("resolution", f"--ckpt={trained}")
    assert [row["size"] for row in result()] == list(range(5, 15))  # 4 is nothing to a network that shrinks by 8


def test_cost_is_that_by_hand(tmp_path):
    root = write_image_folder(tmp_path / "images")
    resolution(module=Flat(), data=ImageFolder(str(root), 8, batch_size=2, num_workers=0), sizes=["8", "13"])
    rows = result()
    assert [row["gmac"] for row in rows] == [(s * s * 4 * 3 * 9 + 4 * 3) / 1e9 for s in (8, 13)]
    assert "top5" not in rows[0]  # of three classes


def test_each_image_is_decoded_once(tmp_path, monkeypatch):
    root, decoded = write_image_folder(tmp_path / "images"), []
    decode = _jpeg._decode
    monkeypatch.setattr(_jpeg, "_decode", lambda data, *args: (decoded.append(data), decode(data, *args))[1])
    data = ImageFolder(str(root), 8, batch_size=2, num_workers=0)
    resolution(module=Flat(), data=data, sizes=["6:14:2"], crop_ratio=[0.8, 1.0])
    assert len(decoded) == len(set(decoded)) == 6


def test_batches_are_small_where_images_are_large(tmp_path, monkeypatch):
    root, sizes = write_image_folder(tmp_path / "images"), []
    monkeypatch.setattr(sys.modules["lit_tricks.commands.sizes.resolution_sweep"], "BYTES", 12 * (8**2 + 12**2) * 2)
    module = Flat()
    module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    resolution(module=module, data=ImageFolder(str(root), 8, batch_size=6, num_workers=0), sizes=["8", "12"])
    assert max(sizes) == 2


def test_any_module_on_any_data(tmp_path):
    root = write_image_folder(tmp_path / "images")
    module = Flat()
    resolution(module=module, data=Foreign(str(root)), sizes=["8", "16"])
    steps = [v2.Resize(20), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    images, labels = next(iter(DataLoader(Folder(str(root / "val"), v2.Compose(steps)), batch_size=6)))
    with torch.no_grad():
        expected = (module(images).argmax(1) == labels).double().mean()
    assert result()[1]["top1"] == pytest.approx(float(expected))


def test_weights_of_a_checkpoint_for_a_module_by_import_path(tmp_path):
    root = write_image_folder(tmp_path / "images")
    torch.manual_seed(3)
    module = Flat()
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint("flat.ckpt", weights_only=True)
    words = ("--data=ImageFolder", f"--data.root={root}", "--data.batch_size=2", "--data.num_workers=0")
    done("resolution", "--ckpt=flat.ckpt", f"--module={__name__}.Flat", *words, "--sizes", "8")
    by_command = result()
    resolution(module=module, data=ImageFolder(str(root), batch_size=2, num_workers=0), sizes=["8"])
    assert by_command == result()


def test_timm_by_name_with_its_own_normalisation(tmp_path):
    root = write_image_folder(tmp_path / "images")
    weights = write_state("test_resnet", 3)
    words = ("--data=ImageFolder", f"--data.root={root}", "--data.batch_size=2", "--data.num_workers=0")
    outcome = done("resolution", "--ckpt=test_resnet", f"--weights={weights}", *words, "--sizes", "64")
    known = timm.get_pretrained_cfg("test_resnet")
    assert "test_resnet: images are normalized by its mean" in outcome.log
    steps = [v2.Resize(round(64 / known.crop_pct)), v2.CenterCrop(64), v2.ToImage()]
    folder = Folder(str(root / "val"), v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)]))
    images, labels = next(iter(DataLoader(folder, batch_size=6)))
    network = timm.create_model("test_resnet", num_classes=3, checkpoint_path=weights).eval()
    with torch.no_grad():
        logits = network(v2.functional.normalize(images, known.mean, known.std))
    assert result()[0]["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves


@pytest.mark.slow
def test_the_picture_and_a_second_run_in_the_same_folder(trained, tmp_path):
    mock.patch.stopall()
    from lit_tricks.run.report import resolution_curve as report

    rows = [
        {"size": s, "crop_ratio": r, "gmac": s / 10, "top1": s / 50, "top5": 1.0} for r in (0.8, 1) for s in (8, 16)
    ]
    report.__dict__["_draw"](rows, 8, "title", tmp_path / "plot.png")
    done("resolution", f"--ckpt={trained}", "--sizes", "8")
    done("resolution", f"--ckpt={trained}", "--sizes", "10")
    assert [row["size"] for row in result()] == [10]


@pytest.mark.slow
def test_flags_win_over_the_settings_of_the_checkpoint(trained):
    done("resolution", f"--ckpt={trained}", "--sizes", "8", "--split=test")
    before = result()
    done("resolution", f"--ckpt={trained}", "--sizes", "8", "--split=test", "--data.split_seed=5")
    assert result() != before  # other images are for the test


def test_an_interrupted_run_leaves_nothing_half(trained, monkeypatch):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lit_tricks.commands.sizes.resolution_sweep"], "_metrics", stop)
    before = sorted(Path().iterdir())
    assert cli("resolution", f"--ckpt={trained}", "--sizes", "8").code == 130
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(("mode", "expected"), [("", "offline"), ("disabled", None)])
def test_resolution_with_wandb_logs_the_curve(mode, expected, trained, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(sys.modules["lit_tricks.run.wandb_run"], "_logged_in", lambda: False)
    with mock.patch.object(wandb, "init") as init, mock.patch.object(wandb, "Image"):
        done("resolution", f"--ckpt={trained}", "--sizes", "8", "10", "--wandb")
    assert init.call_args.kwargs["mode"] == expected
    logged = init.return_value.__enter__.return_value.log.call_args.args[0]
    assert logged["resolution"].data[1][0] == 10


def test_a_progress_bar_on_a_terminal(trained, monkeypatch):
    shown: list[tuple[str, float]] = []

    class Bar(rich.progress.Progress):
        def add_task(self, description: str, **kwargs: Any) -> Any:
            shown.append((description, kwargs["total"]))
            return super().add_task(description, **kwargs)

    module = sys.modules["lit_tricks.commands.progress"]
    monkeypatch.setattr(module, "Progress", Bar)
    monkeypatch.setattr(module, "Console", lambda **_: rich.console.Console(file=io.StringIO(), force_terminal=True))
    resolution(ckpt=trained, sizes=["8"])
    assert shown == [("images", 180)]


# ---------------------------------------------------------------------------------------------------------------------
# What it rejects


def rejected(message: str, *words: str) -> None:
    outcome = cli("resolution", *words)
    assert re.fullmatch(rf"(?s)lit-tricks: error: {message}\n", outcome.err), outcome
    assert outcome.code in (1, 2)
    assert not Path("resolution").exists()


@pytest.mark.slow
def test_resolution_wrong_arguments_explain_themselves(trained):
    ckpt = f"--ckpt={trained}"
    rejected("give --ckpt, a checkpoint, or the name of one of timm's models.")
    rejected("--ckpt no.ckpt: there is no such file. .*", "--ckpt=no.ckpt")
    rejected(".*resnet1 is neither a file nor a model of timm's.*", "--ckpt=resnet1", "--data=Digits")
    rejected("resnet18 does not name its training data: set --data, .*", "--ckpt=resnet18")
    rejected("--sizes '8:a' is no size: .*", ckpt, "--sizes", "8:a")
    rejected("--crop_ratio 2 is not above 0 and at most 1: .*", ckpt, "--crop-ratio", "2")
    rejected(
        r"nothing of an image is left at 2 pixels \(model.layer\d.0.*, which has stride 2, gets a map of 1 pixel\): "
        "use 5 or more.",
        ckpt, "--sizes", "2", "8",
    )  # fmt: skip
    content = torch.load(trained, weights_only=True)
    torch.save({key: value for key, value in content.items() if key != "datamodule_hyper_parameters"}, "bare.ckpt")
    rejected("bare.ckpt does not name its training data: set --data, .*--config.*", "--ckpt=bare.ckpt")
    done("resolution", "--ckpt=bare.ckpt", "--sizes", "8", "--config=data/digits")
    Path("text.ckpt").write_text("text")


def test_rejects_data_of_other_classes(trained, tmp_path):
    root = write_image_folder(tmp_path / "images")
    words = ("--data=ImageFolder", f"--data.root={root}", "--data.batch_size=2")
    rejected(".*only in the checkpoint: 0, 1, .*; only in the data: ant, bee, cow.*", f"--ckpt={trained}", *words)
    weights = write_state("test_resnet", 5)
    rejected(
        "weights.pth is for other classes than the 3 of the data.*same classes.",
        "--ckpt=test_resnet", f"--weights={weights}", *words,
    )  # fmt: skip


def test_a_transformer_of_one_size(tmp_path):
    root = write_image_folder(tmp_path / "images")
    write_state("vit_tiny_patch16_224", 3, depth=1)
    words = ("--ckpt=vit_tiny_patch16_224", "--weights=weights.pth", "--data=ImageFolder", f"--data.root={root}")
    words += ("--data.batch_size=2", "--data.num_workers=0", "--sizes", "256")
    rejected(
        r"VisionTransformer supports only images of 224 pixels .*--model_args '\{dynamic_img_size: true\}' .*",
        *words, "--model_args", "{depth: 1}",
    )  # fmt: skip
    done("resolution", *words, "--model_args", "{depth: 1, dynamic_img_size: true}")
    assert result()[0]["size"] == 256


def test_a_layer_of_one_size_and_a_map_that_vanishes(tmp_path):
    root = write_image_folder(tmp_path / "images")
    data = ImageFolder(str(root), 8, batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match=r"Flat .*8 pixels"):
        resolution(module=Flat(8), data=data, sizes=["8:10:2"])
    module = Flat()
    module.net.insert(1, nn.MaxPool2d(4))
    with pytest.raises(ValueError, match=r"3 pixels .*net.1.*4 or more"):
        resolution(module=module, data=data, sizes=["3"])
    with pytest.raises(ValueError, match="size at which the model was trained"):
        resolution(module=Flat(), data=Foreign(str(root)))
    with pytest.raises(ValueError, match=r"Foreign .*`eval_transform_at"):
        resolution(module=Flat(), data=Foreign(str(root)), sizes=["8"], crop_ratio=[0.9])
    with pytest.raises(ValueError, match="LightningModule has no `forward`"):
        resolution(module=LightningModule(), data=data)


def test_resolution_help_explains_arguments():
    assert "resolution" in done("--help").out
    text = done("resolution", "--help").out
    for word in ("--ckpt", "--sizes", "--crop-ratio", "--wandb", "Touvron"):
        assert word in text
