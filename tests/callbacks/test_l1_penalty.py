"""The numbers of L1Penalty, against the loss with the penalty written out, and where it acts in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.fits import differences, log_lines, make_trainer, run, weights_of
from helpers.modules import eval_loader, lightning, module_class, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import L1Penalty
from lit_tricks.callbacks.l1_penalty import add_l1_gradient, sparsity

STRENGTH = 0.01


def test_gradient_is_that_of_the_sum_of_absolute_values():
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.tensor([[0.0, -2.0]], dtype=torch.float64)]
    for weight in weights:
        weight.requires_grad_()
    loss = sum((weight**3).sum() for weight in weights) + STRENGTH * sum(weight.abs().sum() for weight in weights)
    expected = torch.autograd.grad(loss, weights)
    gradients = [3 * weight.detach() ** 2 for weight in weights]
    add_l1_gradient([weight.detach() for weight in weights], gradients, STRENGTH)
    torch.testing.assert_close(gradients, list(expected))


def test_a_weight_oscillates_around_0():
    """The caveat: from 0.5, 1000 steps of 0.1 x 0.03 end within 0.003 of 0, and not there."""
    w = torch.tensor([0.5, 0.4999], dtype=torch.float64)
    for _ in range(1000):
        gradient = [torch.zeros_like(w)]
        add_l1_gradient([w], gradient, 0.03)
        w -= 0.1 * gradient[0]
    assert (w.abs() <= 0.003 + 1e-9).all()
    assert w.any()


def test_sparsity_is_the_share_of_small_weights():
    weights = [torch.tensor([[0.0, 0.09, -0.09]]), torch.tensor([[0.1, -5.0]])]
    assert sparsity(weights, 0.1).item() == pytest.approx(3 / 5)
    assert sparsity([torch.zeros(0)], 0.1).item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# In a fit


class Penalized(module_class("lightning")):
    """With the penalty of its two weights in its loss."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if not self.training:
            return loss
        return loss + STRENGTH * (self.net[0][0].weight.abs().sum() + self.net[1].weight.abs().sum())


def fit(module: Any, *tricks: Any, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    make_trainer(*tricks, **kwargs).fit(module, train_loader(), eval_loader())
    return weights_of(module)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "64-true"},
    ],
    ids=["plain", "accumulation", "clipping", "clipping by value", "64-true"],
)
def test_trains_as_a_module_with_the_penalty_in_its_loss(how):
    of = module_class("lightning")
    found, expected = fit(of(), L1Penalty(STRENGTH), **how), fit(Penalized(), **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert differences(found, fit(of(), **how))


def test_two_optimizers_are_both_penalized():
    of = module_class("lightning")
    found, expected = fit(of(manual=True), L1Penalty(STRENGTH)), fit(Penalized(manual=True))
    torch.testing.assert_close(found["net.1.weight"], expected["net.1.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_are_penalized_right(fused):
    """A fused optimizer takes them scaled; the first steps overflow, and are skipped."""

    def optimizers(module: Any) -> Any:
        return torch.optim.SGD(module.parameters(), lr=0.1, fused=fused)

    of = module_class("lightning")
    found = fit(of(optimizers=optimizers), L1Penalty(STRENGTH), precision="16-mixed")
    expected = fit(Penalized(optimizers=optimizers), precision="16-mixed")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
    plain = fit(of(optimizers=optimizers), precision="16-mixed")
    assert (found["net.1.weight"] - plain["net.1.weight"]).abs().max() > 5e-3


def test_weights_alone_pay():
    seen: dict[str, Tensor] = {}

    class Seer(lightning().Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    class Zero(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleList(
                [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm([2, 3]), nn.Embedding(3, 2), nn.GRU(2, 2)]
            )
            self.scale = nn.Parameter(torch.ones(2))
            self.example_input_array = None
            for parameter in self.parameters():
                nn.init.constant_(parameter, -0.5)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * sum(parameter.sum() for parameter in self.parameters())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fit(Zero(), L1Penalty(STRENGTH), Seer(), max_steps=1)
    paid = {name for name, gradient in seen.items() if gradient.any()}
    assert paid == {"net.0.weight", "net.3.weight", "net.4.weight_ih_l0", "net.4.weight_hh_l0"}
    assert all(torch.equal(seen[name], torch.full_like(seen[name], -STRENGTH)) for name in paid)


def test_strength_0_changes_nothing():
    assert not differences(run(L1Penalty(0.0)).weights, run().weights)


def test_weights_become_small():
    logged = run(L1Penalty(0.3, threshold=0.05), max_epochs=10).logged
    shares = [row["l1_penalty/sparsity"] for row in logged.values() if "l1_penalty/sparsity" in row]
    assert shares[0] < 0.5 < shares[-1]


def test_says_what_it_does():
    with log_lines() as records:
        run(L1Penalty(STRENGTH), max_epochs=1)
    assert records[0].getMessage() == "L1Penalty: 0.01 x |w| on 2 tensors (84 weights)"


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"threshold": 0.0}, "threshold=0.0"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        L1Penalty(**arguments)


def test_missing_effect_is_an_error():
    def biases(module: Any) -> Any:
        return torch.optim.SGD([module.net[1].bias], lr=0.1)

    with pytest.raises(RuntimeError, match=r"L1Penalty has no effect: .*Classifier"):
        run(L1Penalty(), optimizers=biases)

    class Raw(module_class("lightning")):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer._on_before_step()
                optimizer.optimizer.step()
                optimizer._on_after_step()

    with pytest.raises(RuntimeError, match=r"has no effect.*self.optimizers\(\)"):
        fit(Raw(manual=True), L1Penalty())


def test_rejects_sparse_gradients():
    class Sparse(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 1, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.table(batch[1]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.table.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"L1Penalty .*sparse gradients"):
        fit(Sparse(), L1Penalty())
