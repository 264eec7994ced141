"""Binary cross entropy: a sigmoid per class instead of one softmax ("ResNet strikes back", Wightman et al., 2021).

One caveat: the probabilities are sigmoids. A softmax over the logits keeps the order of the classes, so top-1 and top-5
are right, but calibration errors and losses of a softmax measure probabilities that were not trained.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lit_tricks._compat import callbacks_of
from lit_tricks.callbacks.base import Trick
from lit_tricks.callbacks.optim.initializer import Initializer, sign_of_training
from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import flag, number, texts
from lit_tricks.utils.batch import Path
from lit_tricks.utils.modules import check_shapes, find_classifier, has_matrix, own_parameter

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["BinaryCrossEntropy", "multi_hot", "prior_logit"]


def multi_hot(shares: Tensor, target_threshold: float | None = None) -> Tensor:
    """Return the target of each class: 1 for shares above a threshold, 0 for others, or the shares.

    Args:
        shares: label distribution, for classes in any dimension.
        target_threshold: threshold in [0, 0.5). None returns the shares.

    Example:
        >>> multi_hot(torch.tensor([0.7, 0.3, 0.0]), target_threshold=0.2)
        tensor([1., 1., 0.])
    """
    return shares if target_threshold is None else (shares > target_threshold).to(shares.dtype)


def prior_logit(num_classes: int) -> float:
    """Return the logit whose sigmoid is ``1 / num_classes``: ``-log(K - 1)``.

    Args:
        num_classes: number of classes, at least 2.

    Example:
        >>> round(prior_logit(1000), 2)
        -6.91
    """
    return -math.log(num_classes - 1)


class BinaryCrossEntropy(LossTrick, Initializer):  # type: ignore[misc]  # both packages' callback, see base.py
    """Train a sigmoid per class instead of a softmax ([Wightman et al., 2021](https://arxiv.org/abs/2110.00476)).

    The module's softmax cross entropy becomes a binary cross entropy per class. An image that MixUp or
    CutMix mixes has both labels: each class with a share above ``target_threshold`` has the target 1. LabelSmoothing
    then gives ``y (1 - s) + s / K``, as in timm. (timm smooths before the threshold, which removes the smoothing.) In a
    run from scratch, the bias of the classifier starts at ``-log(K - 1)``, so that each sigmoid starts near ``1 / K``.
    FocalLoss gives the sigmoid focal loss of its paper. ``ignore_index`` and reductions keep their meaning. With class
    weights, an image has the weight of its labels, by their shares.

    Cost: a few operations on the logits. Use it in long runs with strong mixing. Monitor an accuracy, not the
    validation loss, which stays the module's own softmax cross entropy. ECE and predicted probabilities that apply a
    softmax to the logits were not trained as such: use sigmoids, or calibrate. It does not go with
    KnowledgeDistillation and GeneralizedCrossEntropy, which need a softmax.

    Args:
        target_threshold: share above which a label counts as present, in [0, 0.5). 0 counts both labels of every mixed
            image. 0.2 is timm's recipe. None keeps the shares as soft targets.
        sum_classes: whether to sum the losses of the classes. The gradient then has the size of cross entropy's, so
            learning rates stay. False takes the mean, as timm by default: gradients are K times smaller, which only
            optimizers such as LAMB and Adam compensate.
        prior_bias: whether the bias of the classifier starts at ``-log(K - 1)``. Resumed runs, loaded weights and runs
            with FixRes, Freeze or Unfreeze keep their bias.
        layers: names or patterns of the layers that give the logits, such as ``["model.fc"]``. Their bias is also set
            after loading weights, for a new classifier on a pretrained network. None takes what ``get_classifier`` of
            timm's models returns, or the last linear layer, or where there is none the last convolution.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if the classifier or its bias is not found; in the first training step, if
            its size is not the number of classes, no cross entropy used the target, or the module's loss is binary
            already or gets log-probabilities.

    Example:
        ``- {class_path: BinaryCrossEntropy, init_args: {target_threshold: 0.2}}``
    """

    def __init__(
        self,
        target_threshold: float | None = 0.2,
        sum_classes: bool = True,
        prior_bias: bool = True,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.target_threshold: float | None = number(
            self, "target_threshold", target_threshold, "[0, 0.5)", "0.2 is usual.", or_none="soft targets"
        )
        self.sum_classes: bool = flag(self, "sum_classes", sum_classes)
        self.prior_bias: bool = flag(self, "prior_bias", prior_bias)
        fix = "Name modules by patterns, as ['*.fc']."
        self.layers: list[str] | None = texts(self, "layers", layers, fix, or_none="a search")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the creation of the optimizers."""
        self.biases = {}
        if self.prior_bias:
            super().setup(trainer, pl_module, stage)

    def select(self, pl_module: LightningModule, trained: set[Tensor], found: Any) -> None:
        """Select the biases of the layers that give the logits.

        Raises:
            RuntimeError: if there are none.
        """
        check_shapes(pl_module, "BinaryCrossEntropy")
        unfit = []
        for name, layer in self._classifiers(pl_module).items():
            bias = own_parameter(layer, "bias")
            if bias is None or bias not in trained or bias.size(0) < 2:
                unfit.append(name)
            else:
                self.biases[f"{name}.bias" if name else "bias"] = bias.size(0)
        if unfit or not self.biases:
            raise RuntimeError(
                f"BinaryCrossEntropy(prior_bias=True): {' and '.join(unfit) or 'the classifier'} of "
                f"{type(pl_module).__name__} has no trained bias of two or more classes. Name the layers that give the "
                "logits, as layers=['*.fc'], or set prior_bias=False."
            )

    def _classifiers(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        if self.layers is None:
            try:
                return find_classifier(pl_module)
            except RuntimeError:
                return {}
        candidates = {name: part for name, part in pl_module.named_modules() if has_matrix(part)}
        missed = [pattern for pattern in self.layers if not fnmatch.filter(candidates, pattern)]
        if missed:
            raise RuntimeError(
                f"BinaryCrossEntropy(layers={self.layers}): {type(pl_module).__name__} has no linear layer or "
                f"convolution like {missed}. The last one is {next(reversed(candidates), 'missing')!r}."
            )
        matched = {name for pattern in self.layers for name in fnmatch.filter(candidates, pattern)}
        return {name: part for name, part in candidates.items() if name in matched}

    def reason_to_keep(self, pl_module: LightningModule, trained: set[Tensor]) -> str:
        """Return why the bias stays as it is: weights were loaded, and no layer is named."""
        if self.layers is not None:
            return ""
        tuner = next((c for c in callbacks_of(pl_module.trainer) if isinstance(c, Trick) and c.fine_tunes), None)
        if tuner is None and not sign_of_training(pl_module, trained):
            return ""
        self.biases = {}
        reason = "since weights were loaded" if tuner is None else f"{type(tuner).__name__} starts from trained weights"
        return f"as it is, {reason}"

    def initialize(self, pl_module: LightningModule) -> str:
        """Set the biases."""
        for name, size in self.biases.items():
            pl_module.get_parameter(name).fill_(prior_logit(size))
        return ", ".join(f"{name} starts at {prior_logit(size):.2f}" for name, size in self.biases.items())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announce the loss and the bias."""
        over = "sum" if self.sum_classes else "mean"
        threshold = self.target_threshold
        labels = "soft targets" if threshold is None else f"labels with a share above {threshold:g}"
        bias = f"; bias: {self._effect}" if self.prior_bias else ""
        self.announce(f"{over} over classes of binary cross entropy, for {labels}{bias}")

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Replace the loss."""
        target.spec.multi_hot = partial(
            _checked_multi_hot, target_threshold=self.target_threshold, biases=dict(self.biases)
        )
        target.spec.sum_classes = self.sum_classes
        return inputs, target

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the mean number of positive targets of an image."""
        return {} if spec.mean_positives is None else {"binary_cross_entropy/positives": spec.mean_positives}


def _checked_multi_hot(
    shares: Tensor, num_classes: int, target_threshold: float | None, biases: dict[str, int]
) -> Tensor:
    """Return the targets, or raise if the biases that were set belong to layers for another number of classes.

    Raises:
        RuntimeError: if they do.
    """
    if biases and num_classes not in biases.values():
        found = ", ".join(f"{name} of size {size}" for name, size in biases.items())
        raise RuntimeError(
            f"BinaryCrossEntropy(prior_bias=True) found {found} as the bias of the classifier, and the loss has "
            f"{num_classes} classes. Name the layers that give the logits, as layers=['*.fc'], or set prior_bias=False."
        )
    return multi_hot(shares, target_threshold)
