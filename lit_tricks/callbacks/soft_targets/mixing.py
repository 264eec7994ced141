"""Base of MixUp and CutMix: choose the batches and the trick that mixes, and draw resumable random numbers."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Generator, Tensor

from lit_tricks._compat import callbacks_of, draw_dirichlet
from lit_tricks.callbacks.soft_targets.callback import LossTrick
from lit_tricks.callbacks.soft_targets.spec import LossSpec
from lit_tricks.callbacks.soft_targets.target import SoftTarget
from lit_tricks.utils.arguments import names, number
from lit_tricks.utils.batch import Path, describe
from lit_tricks.utils.log import log
from lit_tricks.utils.strength import RunStrength

if TYPE_CHECKING:
    from lit_tricks._compat import LightningModule, Trainer

__all__ = ["Mixing", "beta"]


def beta(alpha: float, size: int, generator: Generator) -> Tensor:
    """Draw from Beta(alpha, alpha). Return a tensor of shape (size,)."""
    # A Dirichlet distribution of two variables is a Beta distribution. torch.distributions.Beta takes no generator
    return draw_dirichlet(torch.full((size, 2), alpha, dtype=torch.float64), generator)[:, 0]


class Mixing(LossTrick):
    """Mixes each item of a training batch with a random partner of the same batch, with probability ``prob``.

    The strength of the run is a factor of this probability. It changes neither the partners nor the lambdas of the
    batches that are mixed.

    The random numbers of each batch have their own seed. The seeds come from a generator that is the same on all ranks.
    Checkpoints store its state. Each rank adds its number to the seed.
    """

    stage = 0

    def __init__(
        self,
        alpha: float,
        prob: float,
        inputs: Sequence[str | int] | None,
        start: float,
        end: float,
        schedule: Literal["constant", "rise", "fall"],
    ) -> None:
        # below 0.001 the draws underflow, and every lambda becomes 0.5
        self.alpha: float = number(self, "alpha", alpha, "[0.001, 1000]", "0.2 and 1 are usual.")
        self.prob: float = number(self, "prob", prob, "(0, 1]", "Give the share of the batches that are mixed.")
        fix = "Name the tensors of a batch, as ['image', 'depth'], or give their places, as [0, 1]."
        self.inputs: list[str] | None = names(self, "inputs", inputs, fix, or_none="all images")
        self.strength: RunStrength = RunStrength(self, start, end, schedule)
        self.start: float = self.strength.start
        self.end: float = self.strength.end
        self.schedule: Literal["constant", "rise", "fall"] = self.strength.schedule
        self._seeds, self._draws = Generator(), Generator()
        self.turn = False  # whether this trick mixes the current batch, and not the other one
        self._lambda = self._now = 1.0
        self._told = False

    @abstractmethod
    def mix(
        self, inputs: dict[Path, Tensor], target: SoftTarget, permutation: Tensor, generator: Generator
    ) -> tuple[dict[Path, Tensor], SoftTarget, float]:
        """Mix a batch with its permutation. Also return the mean share that an item keeps of itself."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Seed the random numbers of a new run. A continued or resumed run keeps its random numbers."""
        if stage == "fit" and trainer.global_step == 0:
            seed: int = trainer.strategy.broadcast(torch.initial_seed())
            self._seeds.manual_seed(seed ^ zlib.crc32(type(self).__name__.encode()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the trick, and announce it."""
        super().on_fit_start(trainer, pl_module)
        self._told = False
        mixers = [trick for trick in _mixers(trainer) if trick is not self]
        odds = self.prob / (self.prob + sum(mixer.prob for mixer in mixers)) if mixers else self.prob
        share = "each batch" if odds == 1 else f"{odds:.3g} of the batches"
        others = "".join(f", {type(mixer).__name__} the others" for mixer in mixers)
        course = self.strength.shown()
        self.announce(f"mixes {share} by Beta({self.alpha:g}, {self.alpha:g}){others}{course}")

    def chosen(self, tensors: dict[Path, Tensor], inputs: dict[Path, Tensor]) -> dict[Path, Tensor]:
        """Return the inputs to mix, and log once if several are mixed by default, or tensors are left as they are.

        Raises:
            RuntimeError: if ``inputs`` names something that is missing or cannot be mixed.
        """
        found = inputs if self.inputs is None else self._named(tensors)
        if not self._told and found:
            self._told = True
            items = next(iter(found.values())).size(0)
            left = {path: t for path, t in tensors.items() if path not in found and t.size(0) == items}
            if left or (self.inputs is None and len(found) > 1):
                listed = ", ".join(f"{_name(path)} ({describe(t)})" for path, t in left.items())
                kept = f" and leaves {listed} as it is" if left else ""
                rank_zero_only(log.info)(
                    f"{type(self).__name__}: mixes {', '.join(map(_name, found))}{kept}; `inputs` chooses what is mixed"
                )
        return found

    def _named(self, tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
        found: dict[Path, Tensor] = {}
        for name in self.inputs or ():
            chosen = {path: t for path, t in tensors.items() if str(name) in (_name(path), str(path[0]), str(path[-1]))}
            if not chosen or not all(t.is_floating_point() or t.dtype == torch.uint8 for t in chosen.values()):
                what = ", ".join(f"{_name(path)} ({describe(t)})" for path, t in tensors.items())
                raise RuntimeError(
                    f"{type(self).__name__}(inputs={self.inputs}): {name!r} is no tensor of floats or uint8 in the "
                    f"training batch, which has {what}."
                )
            found |= chosen
        return found

    def act(self, inputs: dict[Path, Tensor], target: SoftTarget) -> tuple[dict[Path, Tensor], SoftTarget]:
        """Draw the random numbers of the batch, and mix the batch if this trick is chosen."""
        assert self._trainer is not None
        if not inputs:
            raise RuntimeError(
                f"{type(self).__name__} found the target of the training batch, {describe(target)}, and no input to "
                f"mix: no tensor of floats or uint8 with {len(target)} items."
            )
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        self._draws.manual_seed(seed + self._trainer.global_rank)
        strengths = {trick: trick.strength.now(self._trainer) for trick in _mixers(self._trainer)}
        self._now = strengths[self]
        mixers = {trick: strength for trick, strength in strengths.items() if strength}
        if mixers and next(iter(mixers)) is self:
            self._draw_turns(mixers)
        self._lambda = 1.0
        if self.turn and self in mixers:
            permutation = torch.randperm(len(target), generator=self._draws).to(target.device, non_blocking=True)
            inputs, target, self._lambda = self.mix(inputs, target, permutation, self._draws)
        return inputs, target

    def _draw_turns(self, strengths: dict[Mixing, float]) -> None:
        """Choose the trick that mixes a batch: several tricks in proportion to ``prob``, a single one with ``prob``.

        The strengths are factors of ``prob``. Of several tricks, the largest strength is the share of mixed batches.
        """
        draw = float(torch.rand((), generator=self._draws, dtype=torch.float64))
        shares = {trick: trick.prob * strength for trick, strength in strengths.items()}
        if len(shares) > 1:
            draw *= sum(shares.values()) / max(strengths.values())
        for trick, share in shares.items():
            trick.turn = 0 <= draw < share
            draw -= share

    def quantities(self, spec: LossSpec) -> dict[str, Any]:
        """Return the share that items kept of themselves, 1 in a batch that was not mixed, and the varying strength."""
        name = type(self).__name__.lower()
        strength = {f"{name}/strength": self._now} if self.strength.varies else {}
        return {f"{name}/lambda": self._lambda} | strength

    def state_dict(self) -> dict[str, Any]:
        """Return the generator of the seeds."""
        return {"seeds": self._seeds.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generator of the seeds."""
        self._seeds.set_state(state_dict["seeds"].cpu())


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _mixers(trainer: Trainer) -> list[Mixing]:
    return sorted((c for c in callbacks_of(trainer) if isinstance(c, Mixing)), key=lambda trick: type(trick).__name__)
