"""Image sizes: resize a batch, read its size, and check which sizes a network supports."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_tricks.utils.batch import describe, tensors_in
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.modes import eval_mode

__all__ = ["require_fit", "require_size", "resize", "resize_nearest", "stride_of"]


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at another size, by bilinear interpolation, antialiased where they shrink.

    Args:
        images: (N, C, H, W), floats or uint8, which are rounded.
        size: the new height and width.
    """
    exact = images if images.dtype in (torch.float32, torch.float64) else images.float()
    resized = F.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=True)
    return (resized if images.is_floating_point() else resized.round_().clamp_(0, 255)).to(images.dtype)


def resize_nearest(target: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map at another size: each of its places takes the value that is nearest.

    Args:
        target: (..., H, W), of any type.
        size: the new height and width.
    """
    rows, columns = (
        ((torch.arange(new, device=target.device) + 0.5) * (old / new)).long()
        for new, old in zip(size, target.shape[-2:], strict=True)
    )
    return target[..., rows[:, None], columns]


def require_size(batch: Any, size: int, trick: str, remedy: str) -> None:
    """Check the size of the images of a batch, if it has images (tensors with four dimensions).

    Raises:
        RuntimeError: if the images have another size.
    """
    images = [tensor for _, tensor in tensors_in(batch) if tensor.dim() == 4]
    if images and not any(size in tensor.shape[1:] for tensor in images):
        raise RuntimeError(f"{trick} expects images of {size} pixels, and the batch is {describe(batch)}: {remedy}")


def require_fit(module: Any, size: tuple[int, int], known: Tensor | None, trick: str) -> None:
    """Raise if a network fails at this image size but works at its usual size.

    Args:
        module: a LightningModule with a ``forward`` that takes images. Other modules are not checked.
        size: height and width.
        known: an image (1, C, H, W) of a size that should work; None is the module's example
            input, or an image of 224 pixels.
        trick: name of the trick, for the message.

    Raises:
        RuntimeError: if the network fails, or its feature map becomes empty.
    """
    known = _example(module) if known is None else known
    if known is None:
        return
    error, vanished = _try(module, torch.zeros(*known.shape[:2], *size, dtype=known.dtype, device=known.device))
    if not error and not vanished:
        return
    other_error, other_vanished = _try(module, known)
    sizes = f"{size[0]} x {size[1]}", f"{known.size(2)} x {known.size(3)}"
    if error and not other_error:
        raise RuntimeError(
            f"{trick}: {type(module).__name__} takes images of {sizes[1]}, and none of {sizes[0]} pixels "
            f"({type(error).__name__}: {error}). Choose a size that it takes, or build it for any size: a vision "
            "transformer of timm with dynamic_img_size=True, a network for small images with a stem of stride 1."
        ) from error
    if vanished and not other_vanished and not other_error:
        raise RuntimeError(
            f"{trick}: images of {sizes[0]} pixels are too small for {type(module).__name__}: at {vanished}, which "
            "shrinks them, one pixel is left. Choose a larger size, or a network for small images."
        )


def _example(module: Any) -> Tensor | None:
    example = module.example_input_array
    if isinstance(example, Tensor) and example.dim() == 4:
        return torch.zeros_like(example[:1], device=module.device)
    filters = [param for param in module.parameters() if param.dim() == 4]
    return torch.zeros(1, filters[0].size(1), 224, 224, device=module.device) if filters else None


def _try(module: Any, image: Tensor) -> tuple[Exception | None, str]:
    """Return the error of a forward pass, and the name of a layer with strides that got a single pixel."""
    vanished: list[str] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() == 4 and max(args[0].shape[-2:]) == 1:
                vanished.append(name)

        return hook

    handles = [
        part.register_forward_pre_hook(look(name)) for name, part in module.named_modules() if stride_of(part) > 1
    ]
    try:
        eager, precision = torch.compiler.set_stance("force_eager"), module.trainer.precision_plugin
        with torch.no_grad(), eager, eval_mode(module), precision.forward_context():
            module(image)
        return None, vanished[0] if vanished else ""
    except Exception as error:  # a network that does not fit fails with any type
        if not is_about_input(error):
            raise
        return error, ""
    finally:
        for handle in handles:
            handle.remove()


def stride_of(layer: nn.Module) -> int:
    """Return the largest stride of a layer, 1 if it has none. torch takes numbers, tuples and lists."""
    stride = getattr(layer, "stride", 1)
    sides = stride if isinstance(stride, Sequence) else [stride]
    return max((int(side) for side in sides if isinstance(side, Integral)), default=1)
