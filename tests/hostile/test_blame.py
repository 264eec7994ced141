"""An error of our own code, or of the machine, is never reported as the user's: it passes through as it is."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fits import run
from helpers.tricks import teacher
from PIL import Image
from torch import nn

from lit_tricks import Classifier
from lit_tricks.callbacks import KnowledgeDistillation, PreciseBN, TestTimeAugment
from lit_tricks.callbacks.soft_targets.teacher import load_teacher, logits_of
from lit_tricks.commands.exporting.file_formats import not_exportable
from lit_tricks.commands.sizes.size_range import macs
from lit_tricks.data.io.bad_images import BadImages
from lit_tricks.data.io.jpeg import BadImageError, read_image
from lit_tricks.data.segmentation.pairs import read_mask
from lit_tricks.data.shards.writer import image_bytes
from lit_tricks.models import load_weights
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.checkpoint_files import load_archive
from lit_tricks.utils.image_size import require_fit

OURS: dict[str, Any] = {"__name__": "lit_tricks.callbacks.mixup"}
THEIRS: dict[str, Any] = {"__name__": "users_project.net"}
NETWORK: dict[str, Any] = {"__name__": "lit_tricks.models.resnet"}


def raises(error: BaseException, home: dict[str, Any]) -> Any:
    """A function of a module that raises."""
    home = dict(home, error=error)
    exec("def function(*args, **kwargs):\n    raise error", home)
    return home["function"]


def caught(function: Any) -> bool:
    try:
        function()
    except BaseException as error:
        return is_about_input(error)
    raise AssertionError


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, AttributeError, TypeError, ZeroDivisionError])
def test_the_innermost_code_decides(kind: Any) -> None:
    assert caught(raises(kind("x"), THEIRS))
    assert caught(raises(kind("x"), NETWORK))
    assert not caught(raises(kind("x"), OURS))


def test_torch_is_between() -> None:
    network = nn.Sequential(nn.Identity())
    network[0].forward = raises(RuntimeError("x"), THEIRS)
    assert caught(lambda: network(torch.zeros(1)))
    network[0].forward = raises(RuntimeError("x"), OURS)
    assert not caught(lambda: network(torch.zeros(1)))
    assert caught(lambda: nn.Linear(2, 2)(torch.zeros(3)))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), OSError(errno.EMFILE, "x"), OSError(errno.ENOSPC, "x")]
)
def test_the_machine_is_no_input(error: Exception) -> None:
    assert not caught(raises(error, THEIRS))


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), OSError(errno.EIO, "x"), OSError("no number")])
def test_a_file_is_an_input(error: Exception) -> None:
    assert caught(raises(error, OURS))


# ---------------------------------------------------------------------------------------------------------------------
# Where a trick calls the network of the user


class InternalError(Exception):
    """An error of our own code."""


def test_precise_bn_passes_our_error_and_explains_the_networks() -> None:
    class Break(PreciseBN):
        home = OURS

        def _estimate(self, trainer: Any, pl_module: Any, names: Any = None) -> None:
            handle = pl_module.net.register_forward_pre_hook(raises(InternalError("inside"), self.home))
            try:
                super()._estimate(trainer, pl_module, names)
            finally:
                handle.remove()

    with pytest.raises(InternalError, match="inside"):
        run(Break(8), max_epochs=1)
    Break.home = THEIRS
    with pytest.raises(RuntimeError, match=r"PreciseBN.*InternalError: inside"):
        run(Break(8), max_epochs=1)


@pytest.mark.parametrize("home", [OURS, THEIRS], ids=["ours", "theirs"])
def test_views_of_another_size(home: dict[str, Any]) -> None:
    trick = TestTimeAugment(flip=False, scales=[1.0, 2.0])
    fails = raises(InternalError("inside"), home)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return fails() if images.size(-1) > 8 else images.mean((2, 3))

    if home is OURS:
        with pytest.raises(InternalError):
            trick._forward(forward, torch.randn(2, 3, 8, 8))
    else:
        with pytest.raises(RuntimeError, match=r"16 x 16.*InternalError"):
            trick._forward(forward, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("home", [OURS, THEIRS], ids=["ours", "theirs"])
def test_a_teacher_that_fails(home: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Identity())
    network[0].forward = raises(InternalError("inside"), home)
    with pytest.raises(InternalError if home is OURS else RuntimeError, match="inside"):
        logits_of(network, torch.zeros(1, 3, 8, 8), torch.zeros(1), "Sequential")


@pytest.mark.parametrize("error", [KeyError, AttributeError, IndexError, TypeError])
@pytest.mark.parametrize("place", ["read_checkpoint", "check_classes"])
def test_reading_a_teacher(error: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, path)
    monkeypatch.setattr(f"lit_tricks.callbacks.soft_targets.teacher.{place}", raises(error("ours"), OURS))
    with pytest.raises(error, match="ours"):
        load_teacher(str(path))


@pytest.mark.parametrize("error", [KeyError, AttributeError, ZeroDivisionError])
def test_building_a_teacher(error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, path)
    monkeypatch.setattr(Classifier, "load_from_checkpoint", raises(error("ours"), OURS))
    with pytest.raises(error, match="ours"):
        load_teacher(str(path))


def test_a_file_that_is_no_teacher_is_still_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    content = {"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": {"model_args": {"depth": 18}, "num_classes": 2}}
    torch.save(content | {"pytorch-lightning_version": "2.6.0"}, path)
    with pytest.raises(RuntimeError, match=r"teacher=.*x\.ckpt"):
        load_teacher(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=r"x\.ckpt"):
        load_teacher(str(path))


@pytest.mark.parametrize("home", [OURS, THEIRS], ids=["ours", "theirs"])
def test_the_probe_of_a_size(home: dict[str, Any]) -> None:
    plugin = SimpleNamespace(forward_context=torch.no_grad)

    class Module(nn.Module):
        trainer = SimpleNamespace(precision_plugin=plugin)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return raises(InternalError("inside"), home)() if images.size(-1) == 16 else images

    with pytest.raises(InternalError if home is OURS else RuntimeError, match="inside"):
        require_fit(Module(), (16, 16), torch.zeros(1, 3, 8, 8), "Trick")


@pytest.mark.parametrize("home", [OURS, THEIRS], ids=["ours", "theirs"])
def test_the_probe_of_a_sweep_of_sizes(home: dict[str, Any]) -> None:
    class Subject:
        train_size, device = 8, torch.device("cpu")

        def __init__(self) -> None:
            self.module = nn.Conv2d(3, 3, 1)

        logits = staticmethod(raises(InternalError("inside"), home))

    subject: Any = Subject()
    with pytest.raises(InternalError if home is OURS else ValueError, match="inside"):
        macs(subject, 8, 3)


def test_an_export_that_fails_in_our_own_code() -> None:
    exported: Any = type("Exported", (), {"network": nn.Linear(1, 1)})()
    with pytest.raises(AttributeError, match="ours") as ours:
        raises(AttributeError("ours"), OURS)()
    with pytest.raises(AttributeError, match="ours"):
        not_exportable(exported, "ONNX", ours.value)
    with pytest.raises(RuntimeError) as theirs:
        raises(RuntimeError("theirs"), THEIRS)()
    assert "Linear cannot be written by ONNX" in str(not_exportable(exported, "ONNX", theirs.value))


# ---------------------------------------------------------------------------------------------------------------------
# Where files are read


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def without_files(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x.png")


READERS = {
    "image": (read_image, BadImageError),
    "mask": (read_mask, ValueError),
    "sample of a shard": (lambda path: image_bytes(path, 4), RuntimeError),
}
each_reader = pytest.mark.parametrize("reader", READERS)


@each_reader
def test_too_many_open_files_are_no_damage(reader: str, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", without_files)
    with pytest.raises(OSError, match=r"x\.png") as found:
        READERS[reader][0](image)
    assert found.value.errno == errno.EMFILE


@each_reader
def test_no_memory_is_no_damage(reader: str, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", raises(MemoryError(), THEIRS))
    with pytest.raises(MemoryError):
        READERS[reader][0](image)


@each_reader
@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), OSError("truncated"), ValueError("x"), KeyError(5)])
def test_what_a_decoder_raises_is_damage(
    reader: str, error: Exception, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", raises(error, {"__name__": "PIL.PngImagePlugin"}))
    with pytest.raises(READERS[reader][1], match=r"x\.png"):
        READERS[reader][0](image)


@each_reader
def test_a_mistake_of_ours_is_no_damage(reader: str, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "BytesIO", raises(AttributeError("ours"), OURS))
    with pytest.raises(AttributeError, match="ours"):
        READERS[reader][0](image)


def test_a_broken_exif_is_no_damage_and_no_memory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image.Image, "getexif", raises(SyntaxError("broken"), {"__name__": "PIL.TiffImagePlugin"}))
    assert read_image(str(path), exif=True).size == (8, 8)
    monkeypatch.setattr(Image.Image, "getexif", raises(MemoryError(), {"__name__": "PIL.TiffImagePlugin"}))
    with pytest.raises(MemoryError):
        read_image(str(path), exif=True)


def test_skipping_bad_images_skips_none_for_want_of_file_handles(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_tricks.data.samples import Files

    assert BadImages
    files = Files([image], read_image, [0])
    monkeypatch.setattr(os, "open", without_files)
    with pytest.raises(OSError, match="open files"):
        files[0]


@pytest.mark.parametrize("reader", ["load_archive", "load_weights"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "no memory")])
def test_a_checkpoint_is_not_blamed_for_the_machine(
    reader: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(2, 2)
    path = tmp_path / "x.pth"
    torch.save(net.state_dict(), path)
    monkeypatch.setattr(torch, "load", raises(error, {"__name__": "torch.serialization"}))
    with pytest.raises(type(error)):
        load_archive(path) if reader == "load_archive" else load_weights(net, str(path))


def test_a_teacher_of_the_fits_is_left_alone() -> None:
    run(KnowledgeDistillation(teacher()), max_steps=2)
