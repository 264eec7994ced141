"""The numbers of DropPath, against the paper's formula, the branches that it finds and those it does not change."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers.fits import differences, log_lines, make_trainer, run, weights_of
from helpers.losses import loader_of
from helpers.modules import eval_loader, module_class, train_loader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_tricks.callbacks import DropPath
from lit_tricks.callbacks.drop_path import _Scaled, drop_path, drop_path_rates
from lit_tricks.utils.residual import residual_branches

# ---------------------------------------------------------------------------------------------------------------------
# Formulas


def test_rates_of_the_paper():
    """p_l = 1 - l / L (1 - p_L), of survival; p_L = 0.5 for ResNet-110, which has 54 blocks."""
    rates = drop_path_rates(0.5, 54)
    assert rates == pytest.approx([1 - (1 - n / 54 * (1 - 0.5)) for n in range(1, 55)])
    assert sum(1 - rate for rate in rates) == pytest.approx(40, abs=0.5)  # blocks that are left, section 3
    assert drop_path_rates(0.5, 3, "constant") == [0.5] * 3


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_mean_over_all_draws_is_the_branch(rate):
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    mean = torch.zeros_like(x)
    for draw in itertools.product([True, False], repeat=3):
        kept = torch.tensor(draw)
        chance = (1 - rate) ** int(kept.sum()) * rate ** int((~kept).sum())
        out = drop_path(x, kept, rate)
        assert not out[~kept].any()
        torch.testing.assert_close(out[kept], x[kept] / (1 - rate), rtol=1e-15, atol=0)
        mean += chance * out
    torch.testing.assert_close(mean, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.3])
def test_unbiased_in_low_precision(rate, dtype):
    trick = DropPath(rate, "constant")
    trick._rates, n = [rate, rate], 200_000
    kept = trick._draw(n)
    assert kept.shape == (2, n)
    for row in kept:
        assert (1 - row.double().mean()).item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / n) ** 0.5)
    x = torch.linspace(-4, 4, n).to(dtype)
    out = drop_path(x, kept[0], rate)
    assert out.dtype == dtype
    exact = x.double() / (1 - rate)  # to half a unit in the last place: no factor was rounded before
    assert torch.equal(out[kept[0]], exact.to(dtype)[kept[0]]) or dtype == torch.float32
    assert out.double().isfinite().all()
    one_pass = torch.addcmul(x.new_zeros(()), x, kept[0].to(dtype), value=1 / (1 - rate))  # that of a GPU
    assert torch.equal(one_pass, out) or dtype == torch.float32
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)  # no overflow in what is dropped
    assert not drop_path(largest, torch.tensor([False, False]), rate).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_in_low_precision(dtype, compiled):
    x = torch.randn(6, 3, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept, weight = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.randn_like(x)
    out = (torch.compile(drop_path, fullgraph=True, backend="aot_eager") if compiled else drop_path)(x, kept, 0.3)
    [grad] = torch.autograd.grad((out * weight).sum(), x)
    mask = kept.double().view(-1, 1, 1, 1)
    for found, of in ((out, x), (grad, weight)):
        assert torch.equal(found, (of.double() * mask / 0.7).to(dtype))
        assert found.stride() == x.stride()


def test_second_derivatives_are_exact():
    kept = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Scaled.apply(x, kept, 1.25), x)
    assert torch.autograd.gradgradcheck(lambda x: _Scaled.apply(x, kept, 1.25) ** 2, x)


# ---------------------------------------------------------------------------------------------------------------------
# Which branches


class Block(nn.Module):
    """A block of a foreign ResNet."""

    def __init__(self, channels: int = 4, gate: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.gate = nn.Conv2d(channels, channels, 1) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.gate:
            y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return torch.relu(x + y)


FOUND: dict[str, tuple[Any, int, str]] = {
    "timm ResNet": (lambda: timm.create_model("resnet18"), 8, "layer4.1.bn2"),
    "timm SE-ResNet": (lambda: timm.create_model("seresnet50"), 16, "layer4.2.se"),
    "timm ResNet with drop path": (lambda: timm.create_model("resnet18", drop_path_rate=0.1), 8, "layer4.1.drop_path"),
    "timm ViT": (lambda: timm.create_model("test_vit"), 12, "blocks.5.drop_path2"),
    "timm ConvNeXt": (lambda: timm.create_model("test_convnext"), 9, "stages.3.blocks.1.drop_path"),
    "torchvision ResNet": (torchvision.models.resnet18, 8, "layer4.1.bn2"),
    "torchvision Swin": (torchvision.models.swin_t, 12, "features.7.1.stochastic_depth"),
    "foreign": (lambda: nn.Sequential(Block(), Block()), 2, "1.norm"),
    "a gate in the code": (lambda: nn.Sequential(Block(gate=True)), 0, ""),  # half a branch is none
    "none": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0, ""),
}


@pytest.mark.parametrize("name", FOUND)
def test_finds_the_ends_of_residual_branches(name):
    make, count, last = FOUND[name]
    found = residual_branches(nn.ModuleDict({"net": make()}))
    assert len(found) == count
    assert not count or list(found)[-1] == f"net.{last}"


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


class Module(module_class("lightning")):
    """Two residual blocks, the second one maybe within a checkpoint of activations."""

    def __init__(self, blocks: Any = None, recompute: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Conv2d(1, 4, 3), blocks or nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 3)
        self.net, self.recompute = nn.Sequential(self.stem, self.blocks, self.head), recompute

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x.mean((2, 3)))


def fit(module: Any, *tricks: Any, loader: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trainer = make_trainer(*tricks, **({"max_epochs": 1} | kwargs))
    trainer.fit(module, train_loader() if loader is None else loader, eval_loader())
    return weights_of(module)


def test_trains_as_a_network_that_drops_by_itself():
    masks = []

    class Watched(DropPath):
        def _draw(self, size: int) -> Tensor:
            masks.append(super()._draw(size))
            return masks[-1]

    class Dropping(Block):
        number, batch = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            if self.training:
                mask = masks[self.batch][self.number].to(y) / (1 - (0.3, 0.6)[self.number])
                self.batch += 1
                y = y * mask.view(-1, 1, 1, 1)
            return torch.relu(x + y)

    found = fit(Module(), Watched(0.6))
    own = Module(nn.Sequential(Dropping(), Dropping()))
    own.load_state_dict(Module().state_dict())
    own.blocks[1].number = 1
    own.example_input_array = None
    torch.testing.assert_close(fit(own), found)
    assert torch.stack(masks).float().mean() < 0.9
    assert differences(found, fit(Module()))


def test_recomputed_activations_are_the_same():
    found, expected = fit(Module(recompute=True), DropPath(0.5)), fit(Module(), DropPath(0.5))
    for name in ("stem.weight", "blocks.1.conv.weight"):
        torch.testing.assert_close(found[name], expected[name])


def test_rate_0_changes_nothing():
    assert not differences(fit(Module(), DropPath(0.0)), fit(Module()))


@pytest.mark.parametrize("layer", ["timm", "torchvision"])
def test_layers_that_are_there_drop_at_the_rates_of_the_trick(layer):
    class WithLayer(Block):
        def __init__(self, own_rate: float) -> None:
            super().__init__()
            of = {"timm": timm.layers.DropPath, "torchvision": torchvision.ops.StochasticDepth}
            self.path = of[layer](own_rate, **({} if layer == "timm" else {"mode": "batch"}))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.path(self.norm(self.conv(x))))

    expected = fit(Module(), DropPath(0.6))
    module = Module(nn.Sequential(WithLayer(0.9), WithLayer(0.9)))
    module.load_state_dict(Module().state_dict())
    assert not differences(fit(module, DropPath(0.6), limit_val_batches=0), expected)
    assert "forward" not in vars(module.blocks[0].path)


def test_a_frozen_norm_drops_and_a_frozen_block_does_not():
    seen = []

    class Frozen(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.blocks[0].norm.eval()
            self.blocks[1].eval()
            seen.append([(block.norm(torch.ones(4, 4, 2, 2)) == 0).flatten(1).all(1).any() for block in self.blocks])
            return super().training_step(batch, batch_idx)

    fit(Frozen(), DropPath(0.9, "constant"))
    dropped = torch.tensor(seen)
    assert dropped[:, 0].any()
    assert not dropped[:, 1].any()


def test_several_sizes_in_a_step():
    class Crops(Module):
        def loss(self, batch: Any) -> Tensor:
            image, label = batch
            return sum(super(Crops, self).loss([image.repeat(k, 1, 1, 1), label.repeat(k)]) for k in (1, 2, 2))

    kept: list[Any] = []

    class Watched(DropPath):
        def on_train_batch_end(self, *args: Any) -> None:
            kept.append({size: mask.shape for size, mask in self._kept.items()})
            super().on_train_batch_end(*args)

    fit(Crops(), Watched(0.5))
    assert kept == [{4: (2, 4), 8: (2, 8)}] * 4


def test_ranks_and_batches_draw_for_themselves():
    draws = []
    for rank in (0, 1):
        trick, trainer = DropPath(0.5), SimpleNamespace(global_step=0, callbacks=[], global_rank=rank)
        trainer._logger_connector = SimpleNamespace(should_update_logs=False)
        trainer.strategy = SimpleNamespace(broadcast=lambda seed: seed)
        torch.manual_seed(5)
        trick.setup(trainer, Module(), "fit")
        trick._rates = [0.5]
        for _ in range(2):
            trick.on_train_batch_start(trainer, SimpleNamespace(device="cpu"), [torch.zeros(64, 1)], 0)
            draws.append(trick._kept[64])
    assert all(differences(first, second) for first, second in itertools.combinations(draws, 2))


def test_says_and_logs_what_it_does():
    with log_lines() as records:
        found = run(DropPath(0.5, layers=["net.0.1", "net.0.3"]), max_epochs=1)
    assert [record.getMessage() for record in records] == [
        "DropPath: 2 residual branches, skipped at rates of 0.25 to 0.5"
    ]
    assert {row["drop_path/kept"] for row in found.logged.values()} <= {k / 8 for k in range(9)}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"rate=1.0"),
        ({"rate": -0.1}, "rate=-0.1"),
        ({"mode": "cosine"}, "mode='cosine'"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": "*.bn2"}, "layers='.*'"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        DropPath(**arguments)


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (DropPath(), "DropPath found no drop-path layers, nor branches .* in Classifier. Name the modules"),
        (DropPath(layers=["*.bn9"]), r"DropPath found no layers like \['\*.bn9'\], in Classifier"),
    ],
)
def test_rejects_networks_without_branches(trick, message):
    with pytest.raises(RuntimeError, match=message):
        run(trick)


def test_rejects_layers_that_do_not_run_or_give_no_tensor():
    module = Module()
    module.unused = Block()
    with pytest.raises(RuntimeError, match=r"DropPath has no effect: .*Module"):
        fit(module, DropPath(layers=["unused.norm"]))

    trick = DropPath()
    trick._kept = {2: torch.ones(1, 2)}
    with pytest.raises(RuntimeError, match=r"DropPath .*tuple"):
        trick._run(0, nn.Identity(), False, lambda x: (x, x), torch.ones(2))


def test_a_batch_without_tensors_is_drawn_for_in_the_network():
    class Seeing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.ones(4, 1, 8, 8)).sum()

    fit(Seeing(), DropPath(0.5), loader=loader_of(["a", "b"], ["c", "d"]), limit_val_batches=0)
