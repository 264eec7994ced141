"""Compile: the number of graphs and who runs them; names, numbers and the module stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.fits import differences, log_lines, make_trainer, run, weights_of
from helpers.modules import eval_loader, module_class, network, train_loader
from torch import Tensor, nn

from lit_tricks.callbacks import Compile, DropPath, KnowledgeDistillation, MixUp

COMPILED: list[Any] = []  # graphs
CALLS: list[bool] = []  # of their code: whether gradients were on


@torch._dynamo.register_backend(name="lit_tricks_counting")
def counting(graph: Any, inputs: Any, **kwargs: Any) -> Any:
    COMPILED.append(graph)

    def call(*args: Any) -> Any:
        CALLS.append(torch.is_grad_enabled())
        return graph.forward(*args)

    return call


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    COMPILED.clear()
    CALLS.clear()
    yield
    torch._dynamo.reset()


def compile_(**arguments: Any) -> Compile:
    return Compile(backend="lit_tricks_counting", **arguments)


def test_one_graph_for_training_and_one_for_validation():
    found = run(compile_(), max_epochs=3)
    assert len(COMPILED) == 2
    assert sorted(CALLS) == [False] * 6 + [True] * 12
    assert not differences(found.weights, run(max_epochs=3).weights)


def test_the_fit_ends_with_the_module_as_it_was():
    module = module_class("lightning")()
    names = list(module.state_dict())
    before = set(vars(module.net))
    seen = []

    class Looking(MixUp):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append((list(pl_module.state_dict()), pl_module.net._compiled_call_impl is not None))

    make_trainer(compile_(), Looking(), max_epochs=1).fit(module, train_loader(), eval_loader())
    assert seen == [(names, True)] * 4
    assert set(vars(module.net)) == before
    assert module.net._compiled_call_impl is None
    calls = len(CALLS)
    module.net(torch.zeros(2, 1, 8, 8))
    assert len(CALLS) == calls


def test_checkpoint_loads_anywhere(tmp_path):
    done = run(compile_(), max_epochs=1)
    done.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    other = module_class("lightning")()
    other.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    assert not differences(weights_of(other), done.weights)
    resumed = run(ckpt_path=tmp_path / "x.ckpt", max_epochs=2)  # without the trick
    assert not differences(resumed.weights, run(compile_(), max_epochs=2).weights)


@pytest.mark.parametrize("order", [1, -1])
def test_beside_what_others_put_around_layers(order):
    def tricks() -> list[Any]:
        return [DropPath(0.5, layers=["net.0.1"]), KnowledgeDistillation(network()), MixUp(alpha=1.0)]

    torch.manual_seed(0)
    plain = tricks()
    torch.manual_seed(0)
    both = [compile_(), *tricks()][::order]
    found, expected = run(*both, enable_model_summary=True), run(*plain)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert len(CALLS) >= 18


class Parts(module_class("lightning")):
    """Networks in a list, a metric without weights, and a loss that is a module."""

    def __init__(self) -> None:
        super().__init__(criterion=True)
        torch.manual_seed(0)
        self.body, self.head = network()
        self.net = nn.ModuleList([self.body, self.head])
        del self.body, self.head
        self.scale = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.net[1](self.scale(self.net[0](image)))


@pytest.mark.parametrize(
    ("layers", "names"), [(None, "net.0, net.1"), (["net.1"], "net.1"), (["net.0.?"], "net.0.0, net.0.1, net.0.2")]
)
def test_layers_by_pattern_are_compiled(layers, names):
    with log_lines() as records:
        module = Parts()
        trainer = make_trainer(compile_(layers=layers), max_epochs=1)
        trainer.fit(module, train_loader(), eval_loader())
    assert records[0].getMessage().startswith(f"Compile: {names}")
    assert trainer.logger.metrics[0]["compile/layers"] == records[0].getMessage().count("net.")
    assert "compiled" not in str(vars(module).keys())


def test_arguments_go_to_torch(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: given.append(kwargs) or function)
    run(Compile("max-autotune", dynamic=False, fullgraph=True), max_epochs=1)
    assert given == [{"mode": "max-autotune", "backend": "inductor", "dynamic": False, "fullgraph": True}]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode='fast'"),
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": "net"}, "layers='net'"),
        ({"backend": ""}, "backend=''"),
    ],
)
def test_wrong_arguments_are_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compile(**arguments)


def test_rejects_what_is_compiled_already():
    for how in ("in place", "wrapped"):
        module = module_class("lightning")()
        if how == "in place":
            module.net[0].compile(backend="eager")
        else:
            module.net[0] = torch.compile(module.net[0], backend="eager")
        with pytest.raises(RuntimeError, match=r"Compile: Classifier.*compiled already"):
            make_trainer(compile_()).fit(module, train_loader(), eval_loader())
        assert module.net._compiled_call_impl is None


def test_rejects_layers_that_are_not_there_or_not_called():
    with pytest.raises(RuntimeError, match=r"Compile .*\['model'\]"):
        run(compile_(layers=["model"]))

    class Unused(module_class("lightning")):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 2)

    with pytest.raises(RuntimeError, match=r"Compile has no effect: .*Unused"):
        make_trainer(compile_(layers=["other"])).fit(Unused(), train_loader(), eval_loader())
