"""Test-time augmentation: the prediction for an image is the mean over several of its views (Krizhevsky et al., 2012).

One caveat: most published results use a single view. Do not compare results of several views with them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from torch.nn import functional as F

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import choice, flag, invalid, numbers, text
from lit_tricks.utils.batch import describe, images_in_list
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.image_size import resize

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["TestTimeAugment", "mean_logits", "tta_views"]

_CROP = 7 / 8  # part of the side: 224 of 256 pixels, as in the paper


def tta_views(images: Tensor, flip: bool, crops: Literal[1, 5, 10], scales: Sequence[float]) -> Iterator[Tensor]:
    """Yield the views of images, one after another.

    Args:
        images: images (N, C, H, W), floats or uint8.
        flip: whether each view also comes flipped horizontally.
        crops: 1 for the whole image; 5 for the four corners and the center, each 7/8 of the side; 10 for these and
            their flipped versions, for any ``flip``.
        scales: factors of the sides, applied before the crops.

    Example:
        >>> [tuple(view.shape) for view in tta_views(torch.zeros(1, 3, 32, 32), flip=True, crops=1, scales=[1.0, 1.5])]
        [(1, 3, 32, 32), (1, 3, 32, 32), (1, 3, 48, 48), (1, 3, 48, 48)]
    """
    for scale in scales:
        height, width = (round(side * scale) for side in images.shape[-2:])
        image = images if scale == 1 else resize(images, (height, width))
        h, w = (height, width) if crops == 1 else (round(height * _CROP), round(width * _CROP))
        low, right = height - h, width - w
        corners = [(0, 0), (0, right), (low, 0), (low, right)] if crops > 1 else []
        for top, left in (*corners, (low // 2, right // 2)):
            view = image[..., top : top + h, left : left + w]
            yield view
            if flip or crops == 10:
                yield view.flip(-1)


def mean_logits(logits: Sequence[Tensor], activation: Literal["softmax", "sigmoid"] = "softmax") -> Tensor:
    """Return logits of the mean probabilities of several views.

    Args:
        logits: logits of the views, each (N, K), or (N, K, H, W).
        activation: "softmax" gives the logarithm of the mean, "sigmoid" its log odds.

    Example:
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> mean_logits(logits).softmax(-1)
        tensor([[0.5000, 0.5000]])
    """
    stacked = torch.stack(list(logits))
    if stacked.dtype in (torch.float16, torch.bfloat16):
        stacked = stacked.float()
    number = math.log(len(stacked))
    if activation == "softmax":
        return stacked.log_softmax(2).logsumexp(0) - number  # over the classes of each view
    return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)


class TestTimeAugment(Trick):
    """Average the probabilities over several views of each image ([Krizhevsky et al., 2012](https://papers.nips.cc/paper/4824)).

    In validation, test and prediction, the module's ``forward`` runs once per view. It returns logits of the mean
    probability, in float32 or better, so the softmax, argmax and cross entropy of the module apply to the mean. Dense
    logits (N, K, H, W) are flipped and resized back before the mean. Training and the sanity check are not changed, and
    the module gets its batches without the views.

    Cost: the time of an evaluation, times the number of views. Use it for a small gain of accuracy in a test. Set
    ``flip=False`` where left and right matter (digits, text). Leave the trick out where prediction time matters, or
    to compare with published results.

    Args:
        flip: whether each view is also flipped horizontally, which doubles the number of views.
        crops: 1 (the whole image), 5 (four corners and the center, each 7/8 of the side), or 10 (the five crops,
            and the same five flipped). Dense logits need 1.
        scales: factors on the sides, each above 0, such as ``[0.875, 1.0, 1.125]``. Each scale adds a
            set of views. Images are resized before they are cropped, bilinear with antialiasing. At the scale 8/7,
            crops have the size of the original image.
        activation: "softmax", or "sigmoid" for several labels per image or one logit.
        layer: name of the module whose ``forward`` returns the logits, such as ``"model"``. None is the
            LightningModule.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: in the first batch, if this ``forward`` gets no images, returns no logits (N, K) or dense logits
            of the image's size, or cannot take a view.

    Example:
        ``- {class_path: TestTimeAugment, init_args: {flip: true}}``
    """

    transient: ClassVar[tuple[str, ...]] = ("recorded",)
    averages_views = True
    recorded: list[Tensor] | None = None
    """Logits (V, N, K) of the views, one tensor per call of ``forward``, while a calibration records them."""

    __test__ = False  # pytest collects classes whose names start with Test
    _calls = 0

    def __init__(
        self,
        flip: bool = True,
        crops: Literal[1, 5, 10] = 1,
        scales: Sequence[float] = (1.0,),
        activation: Literal["softmax", "sigmoid"] = "softmax",
        layer: str | None = None,
    ) -> None:
        self.flip: bool = flag(self, "flip", flip)
        self.crops: Literal[1, 5, 10] = choice(self, "crops", crops, (1, 5, 10))
        self.scales: list[float] = numbers(self, "scales", scales, "[0.1, 10]", "Give factors on the sides, as [1.0].")
        self.activation: Literal["softmax", "sigmoid"] = choice(self, "activation", activation, ("softmax", "sigmoid"))
        fix = "Name a module, such as 'model'."
        self.layer: str | None = text(self, "layer", layer, fix, or_none="the LightningModule")
        self.number: int = len(self.scales) * (self.crops if self.crops == 10 else self.crops * (1 + self.flip))
        if self.number == 1 and self.scales == [1.0]:
            raise invalid(
                self,
                "the only view is the image itself. Give flips, crops or scales, or leave the callback out.",
                flip=flip,
                crops=crops,
                scales=scales,
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Announce the views.

        Raises:
            RuntimeError: if the trick was passed twice, or the module has no such layer.
        """
        if any(isinstance(c, TestTimeAugment) and c is not self for c in callbacks_of(trainer)):
            raise RuntimeError("TestTimeAugment was passed twice. Keep only one.")
        if self.layer is not None and self.layer not in dict(pl_module.named_modules()):
            children = ", ".join(name for name, _ in pl_module.named_children())
            raise RuntimeError(
                f"TestTimeAugment(layer={self.layer!r}): {type(pl_module).__name__} has no such module. Its parts are "
                f"{children}."
            )
        where = {"fit": "validation", "validate": "validation", "test": "the test", "predict": "prediction"}
        [loop] = [name for fn, name in where.items() if fn == stage]  # of the enum, only the equality is a string's
        self.announce(f"{self.number} views per image, in {loop}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, except in the sanity check, and log the number of views."""
        if not trainer.sanity_checking:
            self._begin(pl_module)
            pl_module.log("test_time_augment/views", float(self.number), on_step=False, on_epoch=True, batch_size=1)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Warn once if there were no views."""
        if self._wrappers and not self._calls:
            self._calls = 1
            rank_zero_only(warnings.warn)(
                f"TestTimeAugment has no effect: {'forward' if self.layer is None else self.layer} of "
                f"{type(pl_module).__name__} was not called for the first batch. Name the module that gives the "
                'logits, as TestTimeAugment(layer="model").',
                stacklevel=2,
            )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore ``forward`` for training."""
        self.unwrap()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(pl_module)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Warn, once, if there were no views."""
        self.on_validation_batch_end(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin(pl_module)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Warn, once, if there were no views."""
        self.on_validation_batch_end(trainer, pl_module)

    def _begin(self, pl_module: LightningModule) -> None:
        self._calls = 0
        # A forward hook cannot call forward again, once for each view.
        self.wrap(pl_module.get_submodule(self.layer or ""), "forward", self._forward)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        where = next((key for key, value in named.items() if isinstance(value, Tensor) and value.dim() == 4), None)
        if any(map(images_in_list, ([value] for value in named.values()))):
            raise RuntimeError(
                "TestTimeAugment averages the probabilities of classes over views of an image, and `forward` gets a "
                "list of images, as for object detection, whose boxes have no mean over views: leave it out."
            )
        if where is None:
            raise RuntimeError(
                "TestTimeAugment makes views of images (N, C, H, W), and `forward` gets none, but "
                f"{describe(list(named.values()))}. Name the module that gets them, as TestTimeAugment(layer="
                '"model"), or remove TestTimeAugment.'
            )
        images, outputs = named[where], []
        for number, view in enumerate(tta_views(images, self.flip, self.crops, self.scales)):
            named[where] = view
            try:
                output = forward(*(named[i] for i in range(len(args))), **{k: named[k] for k in kwargs})
            except Exception as error:
                if view.shape == images.shape or not is_about_input(error):
                    raise
                raise RuntimeError(
                    f"TestTimeAugment: `forward` failed for a view of {view.size(2)} x {view.size(3)} pixels "
                    f"({type(error).__name__}: {error}). A network for one size supports only flips: leave crops and "
                    "scales out, or build it for any size."
                ) from error
            self._check(output, len(images), view)
            if output.dim() == 4:
                output = output.flip(-1) if self.flip and number % 2 else output
                if view.shape != images.shape:
                    output = F.interpolate(output, images.shape[-2:], mode="bilinear", align_corners=False)
            outputs.append(output)
        if self.recorded is not None:
            self.recorded.append(torch.stack(outputs).detach())
        return mean_logits(outputs, self.activation)

    def _check(self, output: Any, number: int, view: Tensor) -> None:
        is_dense = isinstance(output, Tensor) and output.dim() == 4 and output.shape[-2:] == view.shape[-2:]
        is_logits = isinstance(output, Tensor) and (output.dim() == 2 or is_dense) and len(output) == number
        if is_dense and self.crops > 1:
            raise RuntimeError(
                f"TestTimeAugment(crops={self.crops}): crops do not cover the image, and `forward` gives logits for "
                "each of its pixels: leave crops at 1. Flips and scales can be reversed."
            )
        if is_logits and (output.size(1) > 1 or self.activation == "sigmoid"):
            return
        what = describe(output) if not is_logits else "a single logit"
        remedy = "give activation='sigmoid'" if is_logits else "name the module that does, such as layer='model'"
        raise RuntimeError(
            f"TestTimeAugment averages the probabilities of logits (N, K), or of (N, K, H, W) for images of H x W "
            f"pixels, and `forward` gives {what}: {remedy}, or remove TestTimeAugment."
        )
