"""Drop path: skip whole residual branches at random in training, per image (Huang et al., 2016).

One caveat: drop path is a regularizer for deep networks and long runs. "ResNet strikes back" uses a rate of 0.05 for
ResNet-50, in 300 and 600 epochs.
"""

from __future__ import annotations

import fnmatch
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Generator, Tensor, nn

from lit_tricks.callbacks.base import Trick
from lit_tricks.utils.arguments import choice, number, texts
from lit_tricks.utils.batch import tensors_in
from lit_tricks.utils.residual import is_drop_path, residual_branches
from lit_tricks.utils.strength import RunStrength

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["DropPath", "drop_path", "drop_path_rates"]


def drop_path_rates(rate: float, branches: int, mode: Literal["linear", "constant"] = "linear") -> list[float]:
    """Return the rate of each residual branch: ``rate * l / L`` for branch l of L, or ``rate`` for all.

    Args:
        rate: rate of the last branch, in [0, 1).
        branches: number of branches, ``L``.
        mode: "linear" or "constant".

    Example:
        >>> drop_path_rates(0.4, 4)
        [0.1, 0.2, 0.30000000000000004, 0.4]
    """
    return [rate * (i + 1) / branches if mode == "linear" else rate for i in range(branches)]


def drop_path(x: Tensor, kept: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``x / (1 - rate)`` for the items that are kept, and 0 for the others. The expected value is ``x``.

    Args:
        x: output of a residual branch (N, ...).
        kept: booleans (N,), each true with probability ``1 - rate``.
        rate: probability that an item is dropped, in [0, 1). Compiled code is compiled again for another number, and
            not for another tensor of one element.

    Example:
        >>> drop_path(torch.ones(2, 3), torch.tensor([True, False]), rate=0.5)
        tensor([[2., 2., 2.],
                [0., 0., 0.]])
    """
    kept = kept.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
    if torch.finfo(x.dtype).bits >= 32:
        return x * (kept / (1 - rate))
    if isinstance(rate, Tensor):
        return (x * kept * (1 / (1 - rate.float().view(1)))).to(x.dtype)  # in 32 bits, rounded once
    out: Tensor = _Scaled.apply(x, kept, 1 / (1 - rate))
    return out


class _Scaled(torch.autograd.Function):
    """``x * kept * scale`` in 16 bits, rounded once: a factor in bfloat16 would be off by up to 0.4 %.

    Values of dropped items that are not finite become NaN, as in 32 bits, in timm and in torchvision. To select the
    items would need one more pass over x, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        """Scale or drop the branches of x, in one pass on a GPU, computed in 32 bits."""
        ctx.save_for_backward(kept)
        ctx.scale = scale
        if x.is_cuda:
            return torch.addcmul(x.new_zeros(()), x, kept, value=scale)
        return (x * kept).mul_(scale)  # the first is exact; on the CPU, addcmul is slow for what is broadcast

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Scale or drop the gradient in the same way, also in higher derivatives."""
        (kept,) = ctx.saved_tensors
        out: Tensor = _Scaled.apply(grad, kept, ctx.scale)
        return out, None, None


class DropPath(Trick):
    """Skip residual branches at random, per image ([Huang et al., 2016](https://arxiv.org/abs/1603.09382)).

    An image skips branch l of L with probability ``rate * l / L``. Otherwise the branch is scaled up, so that its mean
    is unchanged. Networks with drop-path layers (timm's ``DropPath``, torchvision's ``StochasticDepth``) use these
    layers, with the rates of this trick. In other networks the branches are found by tracing: a branch ends with a
    norm layer and is added to a shortcut, as in any ResNet. Within one step a layer drops the same images in every
    call, so activation checkpointing works.

    Cost: one pass over the output of each branch. Skipping saves no time. Use it for deep networks in long runs that
    overfit. Leave it out of short runs and shallow networks, which need every branch.

    Args:
        rate: probability of skipping the last branch, in [0, 1). 0 changes nothing. 0.05 to 0.2 are usual.
        mode: "linear" skips deeper branches more often. "constant" uses ``rate`` for all.
        layers: patterns of names of modules whose output is a branch, such as ``["*.bn3"]``. Give them if the branches
            are not found. A module without a shortcut around it loses its output when it is dropped.
        start: share of the run after which branches are skipped, in [0, ``end``). 0 is the first step.
        end: share of the run after which no branch is skipped, in (``start``, 1]. 1 is the end of the run.
        schedule: "constant" skips from ``start`` to ``end``. "rise" skips at rates that rise linearly from 0 at
            ``start`` to their full value at ``end``, and stay there. "fall" skips at full rates until ``start``, and at
            rates that fall to 0 at ``end``. Early drop path against underfitting is "fall"
            ([Liu et al., 2023](https://arxiv.org/abs/2303.01500)).

    Raises:
        ValueError: for an argument out of its range.
        RuntimeError: when the fit starts, if no branch is found; when training starts, if the rates vary and the length
            of the run is unknown; in the first training step with branches to skip, if no branch was computed.

    Example:
        ``- {class_path: DropPath, init_args: {rate: 0.05}}``
    """

    conflict_with_frozen = "drops branches of layers that FixRes holds in evaluation mode"

    _found: dict[str, nn.Module]
    _rates: list[float]  # of the branches, at full strength
    _now: float  # share of the rates in the current batch
    _varying: Tensor | None  # the rates of the current batch, if they vary
    _kept: dict[int, Tensor]  # which items take which branches, by the size of a batch; only while it is trained on

    def __init__(
        self,
        rate: float = 0.1,
        mode: Literal["linear", "constant"] = "linear",
        layers: Sequence[str] | None = None,
        start: float = 0.0,
        end: float = 1.0,
        schedule: Literal["constant", "rise", "fall"] = "constant",
    ) -> None:
        self.rate: float = number(self, "rate", rate, "[0, 1)", "Give a probability; 0.05 to 0.2 are usual.")
        self.mode: Literal["linear", "constant"] = choice(self, "mode", mode, ("linear", "constant"))
        self.layers: list[str] | None = texts(
            self, "layers", layers, "Name modules by patterns, as ['*.bn3'].", or_none="a search"
        )
        self.strength: RunStrength = RunStrength(self, start, end, schedule)
        self.start: float = self.strength.start
        self.end: float = self.strength.end
        self.schedule: Literal["constant", "rise", "fall"] = self.strength.schedule
        self._seeds, self._draws = Generator(), Generator()
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the branches before the module is sharded, and seed the random numbers of a new run."""
        if stage != "fit":
            return
        self._forget()
        self._found = self._find(pl_module)
        if trainer.global_step == 0:
            seed: int = trainer.strategy.broadcast(torch.initial_seed())
            self._seeds.manual_seed(seed ^ zlib.crc32(b"DropPath"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the layers, and announce the rates.

        Raises:
            RuntimeError: if there is no branch.
        """
        found = self._found or self._find(pl_module)  # or built meanwhile, in configure_model
        if not found:
            what = (
                f"layers like {self.layers}" if self.layers else "drop-path layers, nor branches that end with a norm"
            )
            raise RuntimeError(
                f"DropPath found no {what}, in {type(pl_module).__name__}. Name the modules whose output is added to a "
                "shortcut, as DropPath(layers=['*.bn2']), or remove DropPath."
            )
        self._rates = drop_path_rates(self.rate, len(found), self.mode)
        for i, (name, layer) in enumerate(found.items()):
            block = pl_module.get_submodule(name.rpartition(".")[0])
            # A forward hook runs too late to skip the computation of a drop-path layer.
            self.wrap(layer, "forward", partial(self._run, i, block, is_drop_path(name, layer)))
        self.announce(
            f"{len(found)} residual branches, skipped at rates of {self._rates[0]:.3g} to {self._rates[-1]:.3g}"
            f"{self.strength.shown()}"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the run in steps, if the rates vary.

        Raises:
            RuntimeError: if the length of the run is unknown, or no step would skip a branch.
        """
        self.strength.measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the branches that each image skips, and log the share of branches that are not skipped."""
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        self._draws.manual_seed(seed + trainer.global_rank)  # other images, other draws
        self._now = self.strength.now(trainer)
        if self.strength.varies:
            self._varying = (self._now * torch.tensor(self._rates)).to(pl_module.device, non_blocking=True)
        size = next((tensor.size(0) for _, tensor in tensors_in(batch)), 1)
        kept = self._draw(size)
        self._kept = {size: kept.to(pl_module.device, non_blocking=True)} if self._now else {}
        if self.should_log(trainer):
            pl_module.log("drop_path/kept", kept.float().mean())
            if self.strength.varies:
                pl_module.log("drop_path/rate", torch.tensor(self._now * self.rate))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop until the next batch.

        Raises:
            RuntimeError: if no layer ran in the first batch with branches to skip, or a batch makes another number of
                steps than assumed.
        """
        self._kept = {}
        self.strength.check(trainer)
        if self._now and not self._ran:
            raise RuntimeError(
                f"DropPath has no effect: in the first training step of {type(pl_module).__name__}, none of its layers "
                "ran in training mode. Name those that do, as DropPath(layers=['*.bn2']), or remove DropPath."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the generator of the seeds."""
        return {"seeds": self._seeds.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generator of the seeds."""
        self._seeds.set_state(state_dict["seeds"].cpu())

    def _find(self, module: nn.Module) -> dict[str, nn.Module]:
        if self.layers is None:
            return residual_branches(module)
        named = dict(module.named_modules())
        return {n: part for n, part in named.items() if n and any(fnmatch.fnmatch(n, p) for p in self.layers)}

    def _draw(self, size: int) -> Tensor:
        """Return whether each image takes each branch, (branches, size)."""
        taken = 1 - self._now * torch.tensor(self._rates, dtype=torch.float64)
        return torch.rand(len(taken), size, generator=self._draws, dtype=torch.float64) < taken[:, None]

    def _run(
        self, i: int, block: nn.Module, drops: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not self._kept or not block.training:  # a frozen norm layer evaluates in a block that trains
            return forward(*args, **kwargs)
        self._ran = True
        x = next(iter((*args, *kwargs.values()))) if drops else forward(*args, **kwargs)
        if not isinstance(x, Tensor):
            raise RuntimeError(
                f"DropPath can drop a tensor, not the {type(x).__name__} of a layer that `layers` names."
            )
        if x.size(0) not in self._kept:  # several crops of an image, or parts of the batch
            self._kept[x.size(0)] = self._draw(x.size(0)).to(x.device, non_blocking=True)
        rate = self._rates[i] if self._varying is None else self._varying[i]
        return drop_path(x, self._kept[x.size(0)][i], rate)

    def _forget(self) -> None:
        self._found = {}
        self._rates = []
        self._kept = {}
        self._now = 1.0
        self._varying = None
        self._ran = False

    def unwrap(self) -> None:
        """Also forget the branches of the fit."""
        super().unwrap()
        self._forget()
