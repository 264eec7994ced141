"""lit-tricks export: what others make of the files, without lit_tricks; what is rejected, and in which words."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers.cli import FIT, QUIET, TINY, cli, done, logits_of, results, workplace, write_image_folder, write_images
from helpers.detectors import detector
from huggingface_hub import HfApi, ModelCard
from lightning.pytorch import LightningModule, Trainer
from packaging.version import Version
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from lit_tricks import Classifier, Segmenter
from lit_tricks.commands import export
from lit_tricks.commands.exporting.detector_formats import agreement
from lit_tricks.commands.exporting.network import crop_pct
from lit_tricks.commands.exporting.timm_folder import timm_arguments
from lit_tricks.data import CIFAR10, DigitDetection, Digits, ImageFolder
from lit_tricks.models import create_model, load_weights
from lit_tricks.models.resnet import resnet

NET = ("--model.model_args={depth: 18, width: 0.125}", "--trainer.max_epochs=6", "--trainer.limit_train_batches=1.0")
EMA = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9")
FORMATS = ("timm", "onnx", "torch-export", "safetensors")
ONNX_SLOW = ("timm", pytest.param("onnx", marks=pytest.mark.slow), "torch-export", "safetensors")

# What runs on another machine: a process in which lit_tricks and Lightning cannot be imported.
ELSEWHERE = """
import sys
class Missing:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing)
import json
import numpy as np
images = np.load("images.npy")
{code}
np.save("logits.npy", logits)
"""
TORCH = """
import timm, torch
model = timm.create_model("local-dir:{path}", pretrained=True).eval()
known = {{"metadata.json": ""}}
program = torch.export.load("{path}/../torch-export.pt2", extra_files=known)
assert json.loads(known["metadata.json"])["input_size"] == "[1, 8, 8]"
images = torch.from_numpy(images)
with torch.no_grad():
    logits = model(images).numpy()
assert np.array_equal(program.module()(images).numpy(force=True), logits)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession("{path}", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {{"images": images}})[0]
"""


def elsewhere(code: str, path: str | Path, images: torch.Tensor, missing: tuple[str, ...] = ()) -> torch.Tensor:
    """Logits that a program without lit_tricks gives."""
    np.save("images.npy", images.numpy())
    missing = ("lit_tricks", "lightning", "pytorch_lightning", *missing)
    program = ELSEWHERE.format(missing=set(missing), code=code.format(path=path))
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on how they are shared out
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120, env=threads
    )
    assert ran.returncode == 0, ran.stderr
    return torch.from_numpy(np.load("logits.npy"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with averaged weights, its metrics, and images for its network."""
    with workplace(tmp_path_factory.mktemp("trained")) as folder:
        done(*FIT, *NET, *EMA)
    return folder / "runs/tiny/v0"


@pytest.fixture(scope="module")
def files(trained: Path) -> dict[str, Path]:
    """The best checkpoint in all formats."""
    outputs = {kind: trained / f"{kind}.pt2" for kind in FORMATS}
    with workplace(trained):
        for kind, output in outputs.items():
            done("export", "checkpoints/best.ckpt", "--format", kind, "--output", str(output))
    return outputs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, trained: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        shutil.copytree(trained, "run", ignore=shutil.ignore_patterns("*.pt2"))
        yield tmp_path


BEST = "run/checkpoints/best.ckpt"


def made(kind: str, *words: str, checkpoint: str = BEST) -> str:
    """Export, and say what was written."""
    outcome = done("export", checkpoint, "--format", kind, *words)
    found = re.fullmatch(r"export: (\S+)\n", outcome.log)
    assert found, outcome.log
    return found[1]


def rejected(message: str, *words: str) -> None:
    before = sorted(Path().rglob("*"))
    outcome = cli("export", *words)
    assert re.fullmatch(rf"lit-tricks: error: {message}\n", outcome.err), outcome.err
    assert outcome.code in (1, 2)
    assert sorted(Path().rglob("*")) == before


def saved(model: Any, path: str = "made.ckpt", data: Any = None, **settings: Any) -> str:
    """A checkpoint that was made in Python."""
    module = model if isinstance(model, LightningModule) else Classifier(model, **settings)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer.strategy.connect(module)
    module.trainer, trainer.datamodule = trainer, data
    trainer.save_checkpoint(path, weights_only=True)
    return path


def shaken(network: nn.Module) -> nn.Module:
    """Statistics of BatchNorm, and all else, that differ from the start."""
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return network


def digit(number: int = 7) -> tuple[Image.Image, int]:
    digits = load_digits()
    return Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8)), int(digits.target[number])


NOISE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9))


# timm


@pytest.mark.slow
def test_timm_and_torch_give_the_same_without_us(files: dict[str, Path]) -> None:
    assert torch.equal(elsewhere(TORCH, files["timm"], NOISE), logits_of(BEST, NOISE))


def test_timm_folder_holds_all_settings(folder: Path) -> None:
    path = made("timm", "--license", "apache-2.0")
    assert path == "run/checkpoints/best_timm"
    assert {file.name for file in Path(path).iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert not [file for file in Path("run/checkpoints").iterdir() if file.name.startswith(".")]
    config = json.loads(Path(path, "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet18d", 10, 64)
    assert config["label_names"] == [str(number) for number in range(10)]
    known = config["pretrained_cfg"]
    assert (known["input_size"], known["crop_pct"], known["crop_mode"]) == ([1, 8, 8], 1.0, "squash")
    assert (known["mean"], known["std"]) == (pytest.approx([4.88 / 16]), pytest.approx([6.02 / 16]))
    assert (known["interpolation"], known["license"]) == ("bilinear", "apache-2.0")


def test_the_averaged_weights_are_exported() -> None:
    content = torch.load(BEST, weights_only=True)
    [raw] = [state["raw"] for state in content["callbacks"].values() if isinstance(state, dict) and "raw" in state]
    with safe_open(made("safetensors"), "pt") as file:
        weight = file.get_tensor("fc.weight")
    assert torch.equal(weight, content["state_dict"]["model.fc.weight"])
    assert raw


def test_a_folder_of_timm_can_be_fine_tuned_and_saved_again(folder: Path) -> None:
    path = made("timm")
    adapts = Version(timm.__version__) >= Version("1.0.31")  # the first convolution of a deep stem to other channels
    channels = 3 if adapts else 1
    other = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=3, in_chans=channels)
    assert (other.fc.out_features, other.conv1[0].in_channels) == (3, channels)
    own = timm.create_model(f"local-dir:{path}", pretrained=True)
    assert torch.equal(other.layer1[0].conv1.weight, own.layer1[0].conv1.weight)
    timm.models.save_for_hf(own, "again", model_config={"label_names": own.pretrained_cfg["label_names"]})
    assert torch.equal(timm.create_model("local-dir:again", pretrained=True).eval()(NOISE), own.eval()(NOISE))


def test_timm_pushes_it_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    own = timm.create_model(f"local-dir:{made('timm')}", pretrained=True)
    pushed: dict[str, Any] = {}

    class Hub(HfApi):
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **kwargs: Any) -> bool:
            return True  # the card, which we have uploaded

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> None:  # type: ignore[override]
            pushed.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    timm.models.push_to_hf_hub(own, "me/digits", safe_serialization=True)
    config = json.loads(pushed["config.json"])
    assert config["architecture"] == "resnet18d"
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.305])
    assert config["pretrained_cfg"]["label_names"] == [str(number) for number in range(10)]


def test_the_card_of_the_folder_says_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = made("timm", "--license", "mit")
    card = ModelCard.load(Path(path, "README.md"))
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == (
        "timm",
        "mit",
        "image-classification",
    )
    assert {"timm", "lit-tricks", "ema"} <= set(card.data.tags)
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert found["test", "top-1 accuracy"] == pytest.approx(results("run")["averaged"]["test"]["top1"], abs=1e-4)
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    image, label = digit()
    image.convert("RGB").save("image.png")
    exec(code.replace("local-dir:best_timm", f"local-dir:{path}"), {})
    assert capsys.readouterr().out == f"{label}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_args",
    [
        {"depth": 18, "variant": "A"}, {"depth": 18, "variant": "B"}, {"depth": 18, "variant": "C"},
        {"depth": 18, "variant": "C", "width": 0.125}, {"depth": 34, "variant": "D", "width": 0.0625},
        {"depth": 50, "variant": "C", "width": 0.03125}, {"depth": 101, "variant": "D", "width": 0.03125},
        {"depth": 18, "pool": "avgmax", "norm": "group", "drop_rate": 0.2, "drop_path_rate": 0.1},
        {"depth": 18, "width": 0.125, "pool": "max", "norm": "layer", "output_stride": 8},
    ],
)  # fmt: skip
def test_variants_that_timm_has(model_args: dict[str, Any]) -> None:
    model = Classifier(model_args=model_args, num_classes=3, input_size=(1, 32, 32))
    shaken(model.model)
    path = export(saved(model), format="timm", mean=[0.5], std=[0.5], output="folder")
    images = torch.randn(2, 1, 32, 32)
    rebuilt = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(images), model.eval()(images))


@pytest.mark.parametrize(
    ("model_args", "reason"),
    [
        ({"depth": 18, "small_input": True}, r"small_input: true \(a stem .*\)"),
        ({"depth": 50, "variant": "A"}, r"variant: A \(strides .*\)"),
        ({"depth": 18, "variant": "B", "width": 0.125}, r"width: 0\.125 with variant: B \(its stem has 64 channels\)"),
        ({"depth": 50, "variant": "A", "small_input": True}, r"small_input.* and no variant: A \(.*\)"),
        ({"pool": "spp"}, "pool: spp"),
        ({"norm": "instance"}, "norm: instance"),
        ({"norm": "frozen_batch"}, "norm: frozen_batch"),
        ({"separable": True}, "separable: True"),
        ({"new": 3}, "new: 3"),
    ],
)
def test_networks_that_timm_has_not(model_args: dict[str, Any], reason: str) -> None:
    message = rf"timm's ResNet has no {reason}: choose --format onnx, torch-export or safetensors, which take .*"
    with pytest.raises(ValueError, match=message):
        timm_arguments("resnet", model_args)


@pytest.mark.slow
def test_small_vgg_is_exported_and_has_no_timm_folder() -> None:
    """Export compares the logits of the file with the logits of the checkpoint."""
    model = Classifier("small_vgg", model_args={"width": 1 / 16}, num_classes=3, input_size=(1, 16, 16))
    shaken(model.model)
    checkpoint = saved(model)
    path = export(checkpoint, format="torch-export", mean=[0.5], std=[0.5], output="folder")
    assert Path(path).exists()
    with pytest.raises(ValueError, match="timm has no small_vgg: choose --format onnx"):
        export(checkpoint, format="timm", mean=[0.5], std=[0.5], output="other")


@pytest.mark.parametrize("network", ["a torch.nn.Module", {"class_path": "torchvision.models.resnet18"}])
def test_networks_of_others_are_no_timm_folder(network: Any) -> None:
    if isinstance(network, str):
        network = None
    with pytest.raises(ValueError, match=r"timm builds .*(an object|torchvision.*resnet18): choose"):
        timm_arguments(network, {})


def test_arguments_that_timm_names_otherwise() -> None:
    given = {
        "depth": 18,
        "pool": "avgmax",
        "norm": "group",
        "drop_rate": 0.2,
        "drop_path_rate": 0.1,
        "output_stride": 8,
    }
    expected = {"global_pool": "avgmax", "norm_layer": "groupnorm", "drop_rate": 0.2, "drop_path_rate": 0.1}
    assert timm_arguments("resnet", given) == ("resnet18d", expected | {"output_stride": 8})
    assert timm_arguments("resnet", {"pool": "avg", "norm": "batch", "init": "xavier"}) == ("resnet50d", {})


def test_groups_that_timm_makes_otherwise() -> None:
    model = Classifier(model_args={"depth": 18, "width": 0.125, "norm": "group"}, num_classes=3, input_size=(1, 8, 8))
    message = r"timm cannot build this network \(num_channels.* must be divisible by num_groups.*\): choose --format .*"
    rejected(message, saved(model), "--format=timm", "--mean=0.5", "--std=0.5")


@pytest.mark.slow
def test_network_that_timm_builds_differently_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(given: dict[str, Any]) -> Any:
        return lambda model, model_args: ("resnet18d", given)

    for given, reason in (
        ({"stem_width": 4, "channels": [8, 16, 32, 64], "avg_down": False}, "cannot build .*Missing key"),
        ({"stem_width": 4, "channels": [8, 16, 32, 64], "output_stride": 8}, "gives other logits .* no arguments for"),
        ({"stem_width": 4, "channels": [8, 16, 32, 64], "act_layer": "silu"}, "gives other logits .* no arguments for"),
        ({"no": 1}, r"cannot build .*'no'"),
    ):
        monkeypatch.setattr("lit_tricks.commands.exporting.timm_folder.timm_arguments", lying(given))
        rejected(rf".*{reason}.*: choose --format onnx, torch-export or safetensors, .*", BEST, "--format=timm")


def test_models_of_timm_by_name() -> None:
    settings = {"model_args": {"img_size": 32, "patch_size": 8}, "num_classes": 4, "input_size": (3, 32, 32)}
    model = Classifier("test_vit", class_names=["a", "b", "c", "d"], **settings)
    shaken(model.model)
    path = export(saved(model), format="timm", mean=[0.5] * 3, std=[0.25] * 3, output="vit")
    images = torch.randn(2, 3, 32, 32)
    rebuilt = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(rebuilt(images), logits_of("made.ckpt", images))
    config = json.loads(Path(path, "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["label_names"] == ["a", "b", "c", "d"]
    assert config["pretrained_cfg"]["fixed_input_size"] is True
    assert not {"url", "hf_hub_id", "tag", "license"} & config["pretrained_cfg"].keys()


# ONNX


@pytest.mark.slow
def test_onnxruntime_alone_gives_the_same(files: dict[str, Path]) -> None:
    import onnxruntime

    path = files["onnx"]
    for count in (1, 2, 7):
        images = torch.randn(count, 1, 8, 8)
        assert (elsewhere(ONNX, path, images, missing=("torch", "timm")) - logits_of(BEST, images)).abs().max() < 1e-4
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [given], [gives] = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, gives.name, gives.shape) == ("images", ["batch", 1, 8, 8], "logits", ["batch", 10])
    metadata = session.get_modelmeta().custom_metadata_map
    check_metadata(metadata)
    assert str(Path(timm.__file__).parent).encode() not in Path(path).read_bytes()  # no folder of this machine


def check_metadata(metadata: dict[str, str]) -> None:
    assert json.loads(metadata["input_size"]) == [1, 8, 8]
    assert json.loads(metadata["mean"]) == pytest.approx([0.305])
    assert json.loads(metadata["std"]) == pytest.approx([0.37625])
    assert json.loads(metadata["label_names"]) == [str(number) for number in range(10)]
    assert json.loads(metadata["crop_pct"]) == 1
    assert json.loads(metadata["metrics"]) == results("run")["averaged"]
    assert metadata["license"] == "unknown"


@pytest.mark.slow
def test_a_digit_by_onnxruntime_alone_from_what_the_file_says(files: dict[str, Path]) -> None:
    code = """
import onnxruntime
from packaging.version import Version
from PIL import Image
session = onnxruntime.InferenceSession("{path}")
known = {{key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()
          if key in ("input_size", "mean", "std", "label_names")}}
channels, height, width = known["input_size"]
logits = np.empty((0, 10), np.float32)
for number in range(20):
    image = Image.open(f"digit{{number}}.png").convert("L").resize((width, height), Image.BILINEAR)
    x = (np.asarray(image, np.float32)[None, None] / 255 - known["mean"][0]) / known["std"][0]
    logits = np.concatenate([logits, session.run(None, {{"images": x.astype(np.float32)}})[0]])
assert len(known["label_names"]) == 10
"""
    here = []
    for number in range(20):
        image, _ = digit(number)
        image.save(f"digit{number}.png")
        here.append(logits_of(BEST, Digits().eval_transform(image)[None]))
    found = elsewhere(code, files["onnx"], NOISE, missing=("torch", "timm"))
    assert torch.equal(found.argmax(1), torch.cat(here).argmax(1))
    assert (found - torch.cat(here)).abs().max() < 1e-4


@pytest.mark.parametrize("missing", [("onnxruntime",), ("onnx", "onnxscript")])
def test_onnx_needs_its_packages(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lit_tricks.commands.exporting.file_formats.find_spec",
        lambda name: None if name in missing else find_spec(name),
    )
    message = rf'--format onnx needs {", ".join(missing)}, .* not installed: pip install "lit-tricks\[export\]"'
    rejected(message, BEST, "--format=onnx")


# torch.export and safetensors


@pytest.mark.slow
def test_torch_export_takes_any_number_of_images(files: dict[str, Path]) -> None:
    path, known = files["torch-export"], {"metadata.json": ""}
    program = torch.export.load(path, extra_files=known).module()
    for count in (1, 6):
        images = torch.randn(count, 1, 8, 8)
        assert torch.equal(program(images), logits_of(BEST, images))
    check_metadata(json.loads(known["metadata.json"]))
    assert str(Path(timm.__file__).parent).encode() not in Path(path).read_bytes()


@pytest.mark.slow
def test_safetensors_load_anywhere() -> None:
    path = made("safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = set(file.keys())
    check_metadata(metadata)
    assert metadata["format"] == "pt"
    network = create_model(metadata["model"], 10, in_chans=1, **json.loads(metadata["model_args"]))
    assert keys == network.state_dict().keys()
    load_weights(network, path)
    with torch.no_grad():
        assert torch.equal(network.eval()(NOISE), logits_of(BEST, NOISE))


@pytest.mark.slow
def test_small_inputs_go_into_all_but_timm() -> None:
    done(*FIT)  # its model_args have small_input
    path = "runs/tiny/v0/checkpoints/best.ckpt"
    rejected(r"timm's ResNet has no small_input: true .*: choose --format onnx, .*", path, "--format=timm")
    assert (elsewhere(ONNX, made("onnx", checkpoint=path), NOISE) - logits_of(path, NOISE)).abs().max() < 1e-4


# How images are made the input


@pytest.mark.parametrize("sizes", [(224, 256), (288, 329), (32, 32), (176, 232), (299, 342)])
def test_timm_resizes_to_the_same_size(sizes: tuple[int, int]) -> None:
    size, resize_size = sizes
    transform = timm.data.create_transform((3, size, size), crop_pct=crop_pct(*sizes), interpolation="bilinear")
    assert transform.transforms[0].size == resize_size
    assert crop_pct(*sizes) == pytest.approx(size / resize_size, rel=1e-12)


def test_every_size_before_the_crop_can_be_told() -> None:
    for resize_size in range(1, 400):
        for size in range(1, resize_size + 1, 7):
            assert int(size / crop_pct(size, resize_size)) == resize_size


@pytest.mark.slow
def test_photos_are_made_the_same_by_timm(folder: Path) -> None:
    root = write_image_folder(folder / "photos")
    words = (
        "--data.image_size=16",
        "--data.eval_size=18",
        "--data.batch_size=4",
        "--data.num_workers=0",
        "--name=photos",
    )
    done(*FIT, "--data=ImageFolder", f"--data.root={root}", *words, "--model.model_args={depth: 18, width: 0.125}")
    path = "runs/photos/v0/checkpoints/best.ckpt"
    root.rename("gone")
    model = timm.create_model(f"local-dir:{made('timm', checkpoint=path)}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == [3, 18, 18]
    assert config["mean"] == pytest.approx([123.68 / 255, 116.779 / 255, 103.939 / 255])
    transform = timm.data.create_transform(**config)
    data = ImageFolder("gone", image_size=16, eval_size=18, batch_size=4, num_workers=0)
    with Image.open("gone/val/ant/0.jpg") as image:
        ours = data.on_after_batch_transfer([data.eval_transform(image)[None], torch.zeros(1)], 0)[0][0]
        theirs = transform(image.convert("RGB"))
    assert (ours - theirs).abs().max() < 3 / 255 / min(config["std"])  # the resizing of PIL and of torch


def test_settings_of_cifar(folder: Path) -> None:
    data = CIFAR10(str(folder / "nowhere"))
    data.hparams["_class_path"] = "lit_tricks.data.CIFAR10"  # as the command line has it
    settings = {"model_args": {"depth": 18, "width": 0.125}, "num_classes": 10, "input_size": (3, 32, 32)}
    path = saved("resnet", data=data, class_names=data.classes, **settings)
    config = json.loads(Path(made("timm", checkpoint=path), "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["crop_mode"]) == (1.0, "center")
    assert config["label_names"][:2] == ["airplane", "automobile"]


@pytest.mark.slow
def test_a_checkpoint_that_knows_no_data() -> None:
    settings = {"model_args": {"depth": 18, "width": 0.125}, "num_classes": 4, "input_size": (3, 32, 32)}
    path = saved("resnet", **settings)
    message = r"made\.ckpt has no normalization: set --mean and --std, on .* that is not 32\."
    rejected(message, path, "--format=timm")
    known = ("--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.2")
    config = json.loads(Path(made("timm", *known, checkpoint=path), "config.json").read_text())
    found = config["pretrained_cfg"]
    assert (found["mean"], found["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert (found["crop_pct"], found["input_size"]) == (0.875, [3, 32, 32]) or found["crop_pct"] == 32 / 37
    more = ("--input-size=48", "--crop-ratio=1", "--overwrite")
    config = json.loads(Path(made("timm", *known, *more, checkpoint=path), "config.json").read_text())
    assert (config["pretrained_cfg"]["crop_pct"], config["pretrained_cfg"]["input_size"]) == (1.0, [3, 48, 48])


# Whose checkpoint, and where to


class Other(LightningModule):
    """No classifier."""

    def __init__(self, encoder: str = "x", num_classes: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(1, 1)


class Doubled(Classifier):
    """Its own forward."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(images)


def test_modules_that_are_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Other())
    rejected(
        r"made\.ckpt is not of a Classifier: it has the setting 'encoder'\. Give --module, .*", path, "--format=onnx"
    )
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_class_path"] = f"{__name__}.Other"
    torch.save(content, path)
    rejected(
        rf"made\.ckpt is of {__name__}\.Other: export takes a Classifier, Segmenter or Detector\.",
        path,
        "--format=onnx",
    )
    content["hyper_parameters"]["_class_path"] = "nowhere.Net"
    torch.save(content, path)
    rejected(r"made\.ckpt names 'nowhere\.Net', .*--import nowhere.*", path, "--format=onnx")
    del content["hyper_parameters"]
    torch.save(content, path)
    rejected(r"made\.ckpt is not of a Classifier: it does not name its module.*", path, "--format=onnx")
    module = Doubled(model_args={"depth": 18, "width": 0.125}, num_classes=10, input_size=(1, 8, 8))
    with pytest.raises(ValueError, match="Doubled is no Classifier"):
        export(BEST, format="onnx", module=module)


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [
        pytest.param("onnx", "ppm", marks=pytest.mark.slow),  # which pools to bins
        pytest.param("onnx", "pan", marks=pytest.mark.full),  # which needs a padded image
        ("torch-export", "fcn"),
        pytest.param("torch-export", "pan", marks=pytest.mark.slow),
        *(pytest.param("torch-export", name, marks=pytest.mark.full) for name in ("aspp", "ppm", "fpn")),
        ("safetensors", "fpn"),
    ],
)
def test_exported_segmenter_equals_model(kind: str, decoder: Any) -> None:
    network: dict[str, Any] = {"depth": 18, "width": 1 / 16, "small_input": True}
    torch.manual_seed(0)
    model = Segmenter("resnet", 11, network, decoder=decoder, input_size=(1, 64, 64)).eval()
    path = made(kind, "--mean=0.1", "--std=0.2", checkpoint=saved(model))
    images = torch.randn(3, 1, 64, 64)
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path)
        assert json.loads(session.get_modelmeta().custom_metadata_map["num_classes"]) == 11
        assert session.get_modelmeta().custom_metadata_map["task"] == "image-segmentation"
        [logits] = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
    elif kind == "torch-export":
        torch.testing.assert_close(torch.export.load(path).module()(images), model(images), rtol=1e-5, atol=1e-5)
    else:
        other = Segmenter("resnet", 11, network, decoder=decoder, input_size=(1, 64, 64)).eval()
        load_weights(other.model, path)
        torch.testing.assert_close(other(images), model(images), rtol=0, atol=0)


def test_timm_has_no_form_for_a_segmenter() -> None:
    model = Segmenter("resnet", 11, {"depth": 18, "width": 1 / 16}, input_size=(1, 64, 64))
    rejected(r".* is of a Segmenter, and timm has classifiers: choose .*", saved(model), "--format=timm")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("faster_rcnn", kind) for kind in ("onnx", "torch-export", "safetensors")),
        ("retinanet", "onnx"),
        pytest.param("retinanet", "torch-export", marks=pytest.mark.full),
        ("retinanet", "safetensors"),
    ],
)
def test_exported_detector_equals_model(kind: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "torch-export" and Version(torch.__version__) < Version("2.14"):
        pytest.skip("torch.export of 2.9 cannot trace the selection of boxes")
    module = detector(model).eval()
    if model == "retinanet":  # an untrained one finds nothing
        module.model.score_thresh = 0.0
        nn.init.normal_(module.model.head.classification_head.cls_logits.weight)
        monkeypatch.setattr("lit_tricks.commands.exporting.network.module_of", lambda path: module)
    path = made(kind, "--mean=0.1", "--std=0.2", checkpoint=saved(module))
    images = [torch.randn(1, *size) for size in ((64, 64), (50, 90))]
    expected = [tuple(found[key] for key in ("boxes", "scores", "labels")) for found in module(images)]
    assert min(len(each[1]) for each in expected) > 5
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path)
        known = session.get_modelmeta().custom_metadata_map
        assert (known["task"], known["first_label"], known["input_size"]) == ("object-detection", "1", "[1, 64, 64]")
        for image, objects in zip(images, expected, strict=True):
            found = tuple(map(torch.from_numpy, session.run(["boxes", "scores", "labels"], {"image": image.numpy()})))
            assert agreement(objects, found) > 0.99  # type: ignore[arg-type]
        assert "lit_tricks/" not in Path(path).read_bytes().decode(errors="ignore")
    elif kind == "torch-export":
        found = torch.export.load(path).module()(images[0])
        assert agreement(expected[0], found) > 0.99  # type: ignore[arg-type]
    else:
        assert load_file(path)["model.backbone.body.net.conv1.0.weight"].shape[1] == 1


def test_objects_that_differ() -> None:
    boxes = torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9], [1, 1, 9, 9]])
    objects = boxes, torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1, 2, 2])
    order = torch.tensor([0, 2, 1])
    assert agreement(objects, tuple(each[order] for each in objects)) == 1  # type: ignore[arg-type]
    assert agreement(objects, (boxes + 0.1, *objects[1:])) == 0
    assert agreement(objects, (boxes, objects[1], objects[2] + 1)) == 0
    assert agreement(objects, tuple(each[:2] for each in objects)) == pytest.approx(2 / 3)  # type: ignore[arg-type]
    assert agreement(tuple(each[:0] for each in objects), tuple(each[:0] for each in objects)) == 1  # type: ignore[arg-type]


@pytest.mark.slow
def test_an_exported_detector_predicts_the_same(folder: Path) -> None:
    module = detector(class_names=list("abcdefghij")).eval()
    data = DigitDetection()
    data.hparams["_class_path"] = "lit_tricks.data.DigitDetection"
    path = saved(module, data=data)
    write_images(folder / "objects", 2)
    Image.new("L", (40, 64), 99).save(folder / "objects" / "gray.png")
    made("onnx", checkpoint=path)
    tables = []
    for ckpt in (path, "made.onnx"):
        done("predict", "objects", "--ckpt", str(ckpt), "-o=objects.json")
        tables.append(json.loads(Path("objects.json").read_text()))
    ours, theirs = ([(row["file"], row["label"]) for row in each] for each in tables)
    assert ours == theirs
    assert len(ours) > 5
    for name in ("score", "x0", "y1"):
        assert [row[name] for row in tables[0]] == pytest.approx([row[name] for row in tables[1]], abs=0.02)


@pytest.mark.slow
def test_a_network_by_import_path(folder: Path) -> None:
    words = ("--config=net.yaml", "--name=net", "--data.num_workers=0")
    settings = {"class_path": f"{__name__}.Net", "init_args": {"features": 12}}
    model = {"class_path": "Classifier", "init_args": {"model": settings}}
    Path("net.yaml").write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"model": model}))
    done("fit", *words)
    card = Path(done("card", "runs/net/v0").log.split("card: ")[1].strip()).read_text()
    assert "# Net-digits" in card
    images = torch.rand(2, 1, 8, 8)
    for kind in ("onnx", "torch-export", "safetensors"):
        assert Path(made(kind, checkpoint="runs/net/v0")).exists()
    rejected(
        r".*timm builds models by name, and the network of this checkpoint is .*Net: .*", "runs/net/v0", "--format=timm"
    )
    session = pytest.importorskip("onnxruntime").InferenceSession("runs/net/v0/checkpoints/best.onnx")
    [logits] = session.run(["logits"], {"images": images.numpy()})
    expected = logits_of("runs/net/v0/checkpoints/best.ckpt", images)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """A network of one's own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, features), nn.ReLU(), nn.Linear(features, 10))

    def forward(self, images: torch.Tensor) -> Any:
        return self.layers(images)


@pytest.mark.slow
def test_a_network_that_was_given_as_an_object() -> None:
    network = shaken(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    module = Classifier(network, num_classes=3, input_size=(3, 2, 2))
    path = saved(module)
    rejected(r"made\.ckpt does not name the network .*: set --module to a Classifier with it\.", path, "--format=onnx")
    fresh = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), num_classes=3, input_size=(3, 2, 2))
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3}
    images = torch.randn(4, 3, 2, 2)
    with torch.no_grad():
        expected = module.eval()(images)
    found = export(path, format="onnx", module=fresh, **statistics)
    assert (elsewhere(ONNX, found, images) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="timm builds models by name"):
        export(path, format="timm", module=fresh, **statistics)


class Branching(nn.Module):
    """A network that no exporter can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits if logits.sum() > 0 else -logits


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_a_network_that_can_not_be_traced(kind: Any) -> None:
    module = Classifier(Branching(), num_classes=3, input_size=(3, 2, 2))
    rejection = (
        r"Branching cannot be written by .*: choose another --format\.$|onnxruntime gives other logits"  # torch 2.7
    )
    with pytest.raises(ValueError, match=rejection) as error:
        export(saved(module), format=kind, module=module, mean=[0.5] * 3, std=[0.5] * 3)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in Path().glob("*made*")) == ["made.ckpt"]


BAD = {
    "no such checkpoint": (("nowhere.ckpt",), r"nowhere\.ckpt: there is no such file\. Give a checkpoint .*"),
    "not a checkpoint": (("tiny.yaml",), r"tiny\.yaml is not a checkpoint of Lightning, or damaged\."),
    "folder": (("run/no",), "run/no: this folder has no checkpoint.*"),
    "format": (
        (BEST, "--format=tim"),
        r"--format: 'tim' .*'torch-export'.*",
    ),
    "no folder": ((BEST, "-o", "no/where"), "--output no/where lies in a folder that does not exist: make it first."),
    "folder in the way": ((BEST, "-o", "run"), "--output run is a folder, and --format onnx writes a file: .*"),
    "file in the way": (
        (BEST, "--format=timm", "-o", "tiny.yaml"),
        r"--output tiny\.yaml is a file.*",
    ),
    "channels": ((BEST, "--mean", "0.1", "0.2"), "--mean has 2 values, and the images have 1 channels: give as many."),
    "scale": ((BEST, "--mean", "78"), r"--mean 78\.0: on the scale from 0 to 1 it is 1/255 of that on 0-255\."),
    "no deviation": ((BEST, "--std", "0"), r"--std 0\.0: .*"),
    "size": ((BEST, "--input-size=0"), "--input_size=0 is below 1: .*"),
    "crop": ((BEST, "--crop-ratio=2"), "--crop_ratio 2 is not above 0 and at most 1: .*"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(case: str) -> None:
    words, message = BAD[case]
    Path("run/no").mkdir(exist_ok=True)
    rejected(message, *words, *(() if any("--format" in word for word in words) else ("--format=onnx",)))


def test_a_damaged_checkpoint() -> None:
    whole = Path(BEST).read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    rejected(r"half\.ckpt is not a checkpoint of Lightning, or damaged\.", "half.ckpt", "--format=safetensors")


def test_a_size_that_the_network_does_not_take() -> None:
    path = saved("test_vit", num_classes=4, model_args={"img_size": 32}, input_size=(3, 32, 32))
    words = ("--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--input-size=40")
    rejected(
        r"the network takes no images of 3 x 40 x 40 \(.*\): give its --input_size\.", path, "--format=timm", *words
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONNX_SLOW)
def test_existing_file_is_replaced_only_on_request(kind: str) -> None:
    path = Path(BEST).with_name(
        {"timm": "best_timm", "onnx": "best.onnx", "torch-export": "best.pt2"}.get(kind, f"best.{kind}")
    )
    file = path / "model.safetensors" if kind == "timm" else path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"mine")
    rejected(rf"{file} exists: choose another --output, or give --overwrite to replace it\.", BEST, f"--format={kind}")
    assert file.read_bytes() == b"mine"
    file.with_name(".gitattributes").write_text("kept")
    assert made(kind, "--overwrite") == str(path)
    assert file.stat().st_size > 100_000
    assert file.with_name(".gitattributes").read_text() == "kept"


def test_no_permission_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(**kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # a read-only folder is no obstacle where the tests run as root
    monkeypatch.setattr("tempfile.TemporaryFile", reject)
    rejected(
        r"\S+best\.pt2 .*Permission denied.*--output.*",
        BEST,
        "--format=torch-export",
    )


@pytest.mark.parametrize("kind", ONNX_SLOW)
def test_a_failed_check_leaves_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Classifier.load_from_checkpoint

    def nan(*args: Any, **kwargs: Any) -> Any:
        module = before(*args, **kwargs)
        nn.init.constant_(module.model.fc.bias, float("nan"))  # equal to nothing
        return module

    monkeypatch.setattr(Classifier, "load_from_checkpoint", nan)
    rejected(r".*", BEST, f"--format={kind}")


# A checkpoint alone is enough to predict, too


def test_predicting_with_cifar_needs_no_download(folder: Path) -> None:
    data = CIFAR10(str(folder / "nowhere"))
    data.hparams["_class_path"] = "lit_tricks.data.CIFAR10"
    settings = {"model_args": {"depth": 18, "width": 0.125}, "num_classes": 10, "input_size": (3, 32, 32)}
    path = saved("resnet", data=data, class_names=data.classes, **settings)
    write_images(folder / "images", 2)
    done("predict", f"--ckpt_path={path}", "--images=images", "--data.num_workers=0", *QUIET)
    assert set(re.findall("[a-z]{4,}", Path("predictions.csv").read_text())) & set(data.classes)


@pytest.mark.slow
def test_predicting_where_another_folder_has_the_name_of_the_data(folder: Path) -> None:
    root = write_image_folder(folder / "images")
    words = ("--data.image_size=16", "--data.batch_size=4", "--data.num_workers=0")
    done(*FIT, "--data=ImageFolder", "--data.root=images", *words)
    root.rename(folder / "gone")
    write_images(folder / "images", 2)
    done("predict", "--ckpt_path=runs/tiny/v0/checkpoints/best.ckpt", "--images=images", *QUIET)
    assert "ant" in Path("predictions.csv").read_text()


def test_resnet_is_what_the_translation_thinks_of() -> None:
    """Whoever gives it another argument says here what timm has for it."""
    import inspect

    known = {"depth", "variant", "num_classes", "in_chans", "small_input", "width", "zero_init_last", "init", "weights"}
    known |= {"pool", "norm", "separable", "drop_rate", "drop_path_rate", "output_stride"}
    assert inspect.signature(resnet).parameters.keys() <= known
