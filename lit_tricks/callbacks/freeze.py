"""Freezing: parts of a pretrained network are not trained, in the whole run or in its first part.

One caveat: frozen features only suit the new task if the old task also needed them. Unfreeze some of them later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lit_tricks.callbacks.finetuning.callback import Freezing, Stage
from lit_tricks.utils.arguments import choice, flag, invalid, number, texts

__all__ = ["Freeze"]


class Freeze(Freezing):
    """Freeze parts of a network, for the whole run or its first part ([Kornblith et al., 2019](https://arxiv.org/abs/1805.08974)).

    Frozen parameters have no gradient, so weight decay and momentum do not move them. Frozen modules stay in
    evaluation mode: BatchNorm uses its running statistics and does not update them, dropout does nothing, and calls of
    ``train()`` do not change this. The optimizer also has the frozen parameters. If the first layers of a network are
    frozen, a training step stores no activations there, and the backward pass ends before them.

    Cost: none, a step gets faster. With a frozen backbone, a step of a ResNet-50 takes 29 % of the time of a full step
    and stores no activations (CPU, 64 pixels, ``benchmarks/results/freezing.md``). Use it to train a new classifier on
    pretrained features, for small data sets, or for the first epochs of a fine-tuning. Leave it out if the network
    starts from random weights.

    Args:
        modules: what to freeze: names of modules or parameters, such as "model.layer1" or only "layer1"; patterns, such
            as "layer[123]"; or "backbone", which is the part of this name, or else everything except the classifier,
            or all heads.
        until: end of the freezing, above 0, counted in ``unit``. None freezes to the end of the run. At a small value
            only the first steps are frozen.
        train_bn: whether BatchNorm layers of frozen parts are trained and update their statistics, as the others. True
            helps if the new images differ much from the pretraining images, and needs batches of 16 or more images.
        unit: "epochs", or "run", in which 0.25 is a quarter of the run and 1 its end.

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if a part is not found, nothing is left to train, another callback freezes
            the same part, or the strategy keeps weights in other tensors; in the first step, if the loss depends on
            frozen parameters only.

    Example:
        ``- {class_path: Freeze, init_args: {modules: [backbone], until: 2}}``
    """

    def __init__(
        self,
        modules: Sequence[str] = ("backbone",),
        until: float | None = None,
        train_bn: bool = False,
        unit: Literal["epochs", "run"] = "epochs",
    ) -> None:
        fix = "Name parts of the network, such as ['layer1'], or write ['backbone']."
        self.modules: list[str] = texts(self, "modules", modules, fix)
        fix = "2 freezes the first two epochs."
        self.until: float | None = number(self, "until", until, "(0, 1e6]", fix, or_none="the whole run")
        self.train_bn: bool = flag(self, "train_bn", train_bn)
        self.unit: Literal["epochs", "run"] = choice(self, "unit", unit, ("epochs", "run"))
        if unit == "run" and self.until is not None and self.until > 1:
            raise invalid(self, "a share of the run is at most 1. Write unit='epochs' for epochs.", until=until)

    @property
    def state_key(self) -> str:
        """Return the name of the state in checkpoints: a run may have one per part."""
        return self.shown()

    def stages(self) -> list[Stage]:
        """Return the one part that is frozen."""
        return [Stage(self.modules, self.until)]

    def shown(self) -> str:
        """Return the call, for messages."""
        return f"Freeze(modules={self.modules})"
