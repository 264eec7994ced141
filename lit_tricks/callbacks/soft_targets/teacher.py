"""The teacher of a distillation, from a module, a checkpoint of ours or a name of timm's: a network that stays as is.

One caveat: the only file of the callbacks that imports timm, or our modules, and only where a teacher needs them.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_tricks.utils.batch import describe
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.checkpoint_files import check_classes, read_checkpoint
from lit_tricks.utils.finite import first_not_finite_in, not_finite
from lit_tricks.utils.modules import require_initialized
from lit_tricks.utils.rng import isolated_random_state

__all__ = ["Renormalized", "load_teacher", "logits_of", "require_apart"]

_FILE_ENDINGS = (".ckpt", ".pth", ".pt", ".safetensors", ".bin")


def load_teacher(teacher: str | nn.Module) -> nn.Module:
    """Build a teacher, frozen and in evaluation mode; of a module a copy, so that the user's stays as it is.

    Args:
        teacher: a module, the path of a checkpoint of a Classifier or Segmenter, or a name with pretrained weights in
            timm.

    Raises:
        FileNotFoundError: if it looks like a file and none is there.
        ValueError: if it is neither a file nor a timm name; the message lists the nearest names.
        ConnectionError: if the download fails.
        RuntimeError: if the file holds neither.
    """
    if isinstance(teacher, nn.Module):
        require_initialized(teacher, "KnowledgeDistillation(teacher)")
    with isolated_random_state():  # building the teacher's weights draws numbers, and the student's run must not change
        built = copy.deepcopy(teacher) if isinstance(teacher, nn.Module) else _by_name(teacher)
    if name := first_not_finite_in(built):
        raise RuntimeError(f"KnowledgeDistillation: {not_finite(name, 'the teacher')}")
    return built.requires_grad_(False).eval()


def require_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Raise if a teacher is part of its student, or the student part of its teacher.

    Raises:
        RuntimeError: if they have a parameter in common.
    """
    theirs = {id(parameter) for parameter in teacher.parameters()}
    shared = next((name for name, parameter in student.named_parameters() if id(parameter) in theirs), None)
    if shared is not None:
        raise RuntimeError(
            f"KnowledgeDistillation: the teacher shares {shared!r} with the student, {type(student).__name__}, and "
            "would be trained and saved with it. Pass a separate network as the teacher (copy.deepcopy makes one), and "
            "do not store it in the student."
        )


class Renormalized(nn.Module):
    """A teacher whose images have another normalization than the batch.

    Args:
        teacher: the teacher.
        mean: mean per channel of the teacher's normalization.
        std: standard deviation per channel of the teacher's normalization.
        input_mean: mean per channel of the batch's normalization.
        input_std: standard deviation per channel of the batch's normalization.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        to, by, was, was_by = (
            torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
            for values in (mean, std, input_mean or [0.0] * len(mean), input_std or [1.0] * len(mean))
        )
        self.teacher = teacher
        self.register_buffer("scale", (was_by / by).float())
        self.register_buffer("shift", ((was - to) / by).float())

    def forward(self, images: Tensor) -> Any:
        """Return the teacher's output.

        Args:
            images: (N, C, H, W), floats, or uint8, which are divided by 255 first.

        Raises:
            RuntimeError: if the images have another number of channels than mean.
        """
        if images.dim() != 4 or images.size(1) != len(self.scale):
            raise RuntimeError(
                f"KnowledgeDistillation: mean has {len(self.scale)} numbers, and the images are {describe(images)}. "
                "Give one number for each channel of (N, C, H, W)."
            )
        images = images if images.is_floating_point() else images / 255
        return self.teacher(images.to(self.scale) * self.scale + self.shift)


def logits_of(teacher: nn.Module, images: Tensor, labels: Tensor, name: str) -> Tensor:
    """Return the teacher's logits for a batch, (rows, K), with one row per label, in their order.

    Args:
        teacher: the teacher.
        images: images of the batch.
        labels: labels of the batch.
        name: name of the teacher, for messages.

    Raises:
        RuntimeError: if the teacher fails on the images, or does not return logits for each label.
    """
    who = f"KnowledgeDistillation: the teacher, {name},"
    try:
        output: Any = teacher(images)
    except Exception as error:  # a network that does not fit fails with any type
        if not is_about_input(error):
            raise
        raise RuntimeError(
            f"{who} fails on the images of the batch, {describe(images)}: {error}. It gets the images of the student, "
            "mixed or not: take one for this size and these channels, or wrap it in a module that resizes."
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        raise RuntimeError(
            f"{who} returns {describe(logits)}, and no logits of shape (N, classes) or (N, classes, H, W): wrap it in "
            "a module that returns them."
        )
    rows = logits.movedim(1, -1).flatten(0, -2)
    if len(rows) != labels.numel():
        raise RuntimeError(
            f"{who} returns logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}: it must "
            "return one row of logits for each of them."
        )
    return rows


def _by_name(teacher: str) -> nn.Module:
    path = Path(teacher).expanduser()
    if path.is_file():
        return _checkpoint(path)
    if path.suffix in _FILE_ENDINGS or len(path.parts) > 1:
        raise FileNotFoundError(
            f"KnowledgeDistillation(teacher={teacher!r}): there is no such file, seen from {Path.cwd()}. Correct the "
            "path."
        )
    import timm

    if not timm.is_model_pretrained(teacher):
        nearest = difflib.get_close_matches(teacher, timm.list_pretrained(), n=3)
        near = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(
            f"KnowledgeDistillation(teacher={teacher!r}): it is neither a file nor a name with pretrained weights in "
            f"timm.{near}"
        )
    try:
        model: nn.Module = timm.create_model(teacher, pretrained=True)
    except OSError as error:
        raise ConnectionError(
            f"KnowledgeDistillation(teacher={teacher!r}): the download failed: {error}. Build it where there is a "
            "network, or give a module."
        ) from error
    return model


def _checkpoint(path: Path) -> nn.Module:
    from lit_tricks.tasks.classification import Classifier
    from lit_tricks.tasks.segmentation import Segmenter

    try:
        settings = read_checkpoint(path).get("hyper_parameters", {})
        check_classes(settings, path)
        module = Segmenter if "decoder" in settings else Classifier
        return module.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError) as error:  # damage, arguments that do not fit, and weights of another network
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"KnowledgeDistillation(teacher={str(path)!r}): it is no checkpoint of a Classifier or Segmenter that was "
            f"built by name ({type(error).__name__}: {reason}). Build the network yourself, load its weights, and give "
            "it as a module."
        ) from error
