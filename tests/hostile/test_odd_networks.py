"""Every trick on networks with odd but legal parts: it trains them, or stops with its own error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers.fits import make_trainer
from helpers.tricks import TRICKS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset


class Base(nn.Module):
    """Convolution, batch norm, and a classifier of four classes, with one part exchanged."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        found: dict[str, nn.Module] = {
            "conv": nn.Conv2d(3, 4, 3, padding=1),
            "norm": nn.BatchNorm2d(4),
            "act": nn.ReLU(),
            "middle": nn.Identity(),
            "pool": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "head": nn.Linear(4, 4),
        }
        for name, part in (found | parts).items():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> Tensor:
        for part in self.children():
            images = part(images)
        return images


class With(nn.Module):
    """Something to keep, and the identity."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        for name, thing in things.items():
            if isinstance(thing, nn.Parameter) or thing is None:
                self.register_parameter(name, thing)
            elif isinstance(thing, nn.Module):
                self.add_module(name, thing)
            else:
                self.register_buffer(name, *(thing if isinstance(thing, tuple) else (thing,)))

    def forward(self, maps: Tensor) -> Tensor:
        return maps


class Growing(With):
    """A buffer whose shape follows the batches, as a cache of positions does."""

    def forward(self, maps: Tensor) -> Tensor:
        self.cache = torch.cat([self.cache, torch.zeros(1)])[-7:]
        return maps


class Codebook(With):
    """A codebook that is trained by its own averages, as a VQ-VAE has it."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.sums.mul_(0.9).add_(0.1 * maps.mean())
                self.counts.add_(1)
        return maps + self.sums.mean() * 0


class Scaled(With):
    """A module with a parameter of shape ()."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight

    def forward(self, maps: Tensor) -> Tensor:
        return self.second(self.first(maps))


class Sequence(nn.Module):
    """Recurrent layers and attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, maps: Tensor) -> Tensor:
        pixels = maps.flatten(2).movedim(1, -1)
        pixels = self.lstm(pixels)[0]
        pixels = self.attention(pixels, pixels, pixels)[0]
        return pixels.movedim(-1, 1).unflatten(2, maps.shape[2:])


def repeated() -> nn.Module:
    block = nn.Conv2d(4, 4, 1)
    return nn.Sequential(block, nn.ReLU(), block)


def frozen() -> nn.Module:
    return nn.Conv2d(4, 4, 1).requires_grad_(False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm without scale": lambda: Base(norm=nn.BatchNorm2d(4, affine=False)),
    "batch norm without statistics": lambda: Base(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "batch norm of a cumulative mean": lambda: Base(norm=nn.BatchNorm2d(4, momentum=None)),
    "instance norm with statistics": lambda: Base(norm=nn.InstanceNorm2d(4, track_running_stats=True)),
    "group norm without scale": lambda: Base(norm=nn.GroupNorm(2, 4, affine=False)),
    "layer norm without bias": lambda: Base(norm=nn.LayerNorm([4, 8, 8], bias=False)),
    "RMS norm": lambda: Base(norm=nn.RMSNorm([4, 8, 8])),
    "no norm": lambda: Base(norm=nn.Identity()),
    "weight norm": lambda: Base(conv=parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))),
    "weight norm, hook": lambda: Base(conv=torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1))),
    "orthogonal": lambda: Base(head=parametrizations.orthogonal(nn.Linear(4, 4))),
    "spectral norm of weight norm": lambda: Base(
        conv=parametrizations.spectral_norm(parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)))
    ),
    "a part that is None": lambda: Base(middle=With(bias=None, cache=(None,))),
    "integer buffers": lambda: Base(middle=With(index=torch.arange(5), mask=torch.ones(3, dtype=torch.bool))),
    "buffers of 8 and 16 bits": lambda: Base(
        middle=With(a=torch.ones(3, dtype=torch.float16), b=torch.ones(3, dtype=torch.int8))
    ),
    "complex buffer": lambda: Base(middle=With(phases=torch.ones(3, dtype=torch.complex64))),
    "rotary cache": lambda: Base(middle=With(cos=(torch.ones(6), False), sin=(torch.zeros(6), False))),
    "empty buffer": lambda: Base(middle=With(cache=torch.zeros(0, 3))),
    "infinite buffer": lambda: Base(middle=With(mask=torch.full((3, 3), -torch.inf))),
    "codebook": lambda: Base(middle=Codebook(sums=torch.zeros(3, 4), counts=torch.zeros(3))),
    "parameter without a dimension": lambda: Base(middle=Scaled(scale=nn.Parameter(torch.tensor(1.0)))),
    "empty parameter": lambda: Base(middle=With(extra=nn.Parameter(torch.zeros(0)))),
    "unused parameter": lambda: Base(middle=With(extra=nn.Parameter(torch.ones(3)))),
    "integer parameter": lambda: Base(
        middle=With(codes=nn.Parameter(torch.arange(3), requires_grad=False))
    ),
    "parameters in lists": lambda: Base(
        middle=With(many=nn.ParameterList([torch.ones(2)]), named=nn.ParameterDict({"a": torch.ones(2)}))
    ),
    "frozen part": lambda: Base(middle=frozen()),
    "tied weights": lambda: Base(middle=Tied()),
    "a layer that is used twice": lambda: Base(middle=repeated()),
    "recurrent layers and attention": lambda: Base(middle=Sequence()),
    "transposed and grouped convolutions": lambda: Base(
        middle=nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4))
    ),
    "dropout of channels": lambda: Base(middle=nn.Dropout2d(0.1)),
    "circular padding": lambda: Base(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
}  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, 0.05, momentum=0.9, weight_decay=1e-3)


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 4), 4)


# What a trick rejects, by a word of the message
PARAMETRIZED = ("weight norm", "weight norm, hook", "spectral norm of weight norm")
NO_BATCH_NORM = (
    "batch norm without statistics", "instance norm with statistics", "group norm without scale",
    "layer norm without bias", "RMS norm", "no norm",
)  # fmt: skip
REJECTED: dict[tuple[str, str], str] = {
    **{("ChannelsLast", name): "parametrized" for name in PARAMETRIZED},
    **{("XavierInit", name): "parametrized" for name in (*PARAMETRIZED, "orthogonal")},
    **{("FixRes", name): "BatchNorm" for name in NO_BATCH_NORM},
}
WEIGHTS = ("ChannelsLast", "EMA", "FixRes", "L1Penalty", "NoBiasDecay", "PreciseBN", "SWA", "XavierInit")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("trick", WEIGHTS)
def test_a_trick_trains_an_odd_network_or_stops_by_name(trick: str, network: str) -> None:
    torch.manual_seed(0)
    module = Module(NETWORKS[network]())
    trainer = make_trainer(TRICKS[trick].make(), max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    before = {name: value.dtype for name, value in module.state_dict().items()}
    message = REJECTED.get((trick, network))
    with pytest.raises(RuntimeError, match=f"^{trick}.*{message}") if message else contextlib.nullcontext():
        trainer.fit(module, batches(), batches())
    if message is None:
        after = module.state_dict()
        assert {name: value.dtype for name, value in after.items()} == before
        assert all(value.isfinite().all() for name, value in after.items() if "mask" not in name)
        assert trainer.global_step == 3
