"""The store of averaged weights: on real networks against other implementations, and in two processes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fits import differences
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lit_tricks.callbacks.averaging.power_law import power_ema_exponent
from lit_tricks.callbacks.averaging.store import AveragedWeights

timm = pytest.importorskip("timm")
NETWORKS = {
    "ResNet": lambda: timm.create_model("resnet10t", num_classes=5),
    "Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        window_size=7,
        embed_dim=24,
        depths=(2, 1),
        num_heads=(2, 4),
        num_classes=5,
    ),
}
DECAY = 0.9


def network(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name]()


def train(model: nn.Module, steps: int = 5) -> Any:
    """Train on noise, yield after each step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        image, label = torch.randn(4, 3, 56, 56, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()
        yield image


def averages_of(weights: AveragedWeights) -> dict[str, torch.Tensor]:
    return dict(zip(weights.names, weights._average, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_recurrence_and_agrees_with_torch_and_timm(name):
    model = network(name)
    weights = AveragedWeights(model)
    exact = {key: value.double() for key, value in averages_of(weights).items()}
    theirs = {
        "timm": timm.utils.ModelEmaV3(model, decay=DECAY),
        "torch": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    }
    theirs["torch"].n_averaged += 1  # or the first update would copy
    for _ in train(model):
        weights.update(1 - DECAY)
        theirs["timm"].update(model)
        theirs["torch"].update_parameters(model)
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        exact = {key: DECAY * value + (1 - DECAY) * now[key].detach().double() for key, value in exact.items()}
    averages = averages_of(weights)
    params = [key for key, _ in model.named_parameters()]
    assert sorted(averages) == sorted([*params, *(key for key in now if "running_" in key)])
    exact = {key: exact[key] for key in averages}
    torch.testing.assert_close({k: v.double() for k, v in averages.items()}, exact, rtol=1e-6, atol=1e-6)
    for other in theirs.values():
        others = dict([*other.module.named_parameters(), *other.module.named_buffers()])
        params = [key for key, _ in model.named_parameters()]
        for key in params if isinstance(other, AveragedModel) else set(other.module.state_dict()) & set(averages):
            torch.testing.assert_close(averages[key], others[key].detach(), rtol=1e-5, atol=1e-6)


def test_a_model_that_stands_still_keeps_its_outputs():  # other averages change the index buffers of a Swin
    model, image = network("Swin").eval(), torch.randn(2, 3, 56, 56)
    indices = [name for name, value in model.named_buffers() if not value.is_floating_point()]
    assert indices
    before, output = dict(model.named_buffers()), model(image)
    weights = AveragedWeights(model)
    for _ in range(20):
        weights.update(1e-4)
    with weights.showing(True):
        assert torch.equal(model(image), output)
        assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_swap_shows_the_average_and_brings_the_weights_back_bit_by_bit():
    model = network("ResNet")
    weights = AveragedWeights(model)
    image = list(train(model))[-1]
    weights.update(0.3)
    raw, average = deepcopy(model.state_dict()), deepcopy(averages_of(weights))
    pointers = {param.data_ptr() for param in model.parameters()}
    with torch.inference_mode(), weights.showing(True), weights.showing(True):
        shown = model.state_dict()
        assert all(torch.equal(shown[key], value) for key, value in average.items())
        model.eval()(image)
    assert not differences(dict(model.state_dict()), dict(raw))
    assert not differences(averages_of(weights), average)
    assert {param.data_ptr() for param in model.parameters()} == pointers
    for _ in train(model.train(), steps=1):  # autograd and optimizer continue
        pass


def test_an_update_allocates_nothing():
    model = network("ResNet")
    weights = AveragedWeights(model)
    weights.update(0.1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        weights.update(0.1)
    assert sum(abs(event.self_cpu_memory_usage) for event in profile.events()) == 0
    names = [event.name for event in profile.events() if event.name.startswith("aten::_foreach")]
    assert names == ["aten::_foreach_lerp_"]


def test_channels_last_stays_channels_last():
    model = network("ResNet").to(memory_format=torch.channels_last)
    weights = AveragedWeights(model)
    strides = {key: value.stride() for key, value in model.named_parameters()}
    with weights.showing(True):
        assert {key: value.stride() for key, value in model.named_parameters()} == strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_is_precise_whatever_the_type_of_the_weights(dtype):
    model = nn.Linear(50, 50).to(dtype)
    weights = AveragedWeights(model)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in averages_of(weights).values()} == {wanted}
    exact = model.weight.detach().double().clone()
    for _ in range(100):
        with torch.no_grad():
            model.weight.add_(torch.randn(50, 50).to(dtype) / 100)
        weights.update(1e-3)
        exact += 1e-3 * (model.weight.detach().double() - exact)
        weights.swap(True)
        weights.swap(False)
    torch.testing.assert_close(averages_of(weights)["weight"].double(), exact, rtol=1e-6, atol=1e-6)


def test_tied_weights_count_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    weights = AveragedWeights(model)
    assert weights.names == ["0.weight", "0.bias", "1.bias"]
    with weights.showing(True):
        assert model[1].weight is model[0].weight


def test_state_and_restore_are_inverse():
    model = network("ResNet")
    weights = AveragedWeights(model)
    list(train(model))
    weights.update(0.3)
    for shown in (True, False):
        state = deepcopy(weights.state(shown, set(model.state_dict())))
        with weights.showing(shown):
            beside = deepcopy(model.state_dict())
        other = network("ResNet")
        copy = AveragedWeights(other)
        other.load_state_dict(beside)
        copy.restore(state)
        assert not differences(dict(other.state_dict()), dict(model.state_dict()))
        assert not differences(averages_of(copy), averages_of(weights))


def test_the_state_of_another_network_is_an_error_with_a_remedy():
    state = {"raw": {}, "average": {"weight": torch.zeros(4, 4)}}
    with pytest.raises(RuntimeError, match=r"average of 'weight'.*Resume with the network of that run"):
        AveragedWeights(nn.Sequential(nn.Linear(4, 4))).restore(state)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def is_trained(name: str) -> bool:
    """Not one of BatchNorm's statistics, which each process has for itself."""
    return name.endswith(("weight", "bias"))


def average(history: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    found = {name: value.double() for name, value in history[0].items()}
    for t, weights in enumerate(history[1:], start=1):
        d = min(decay, 1 - (1 + t) ** (-2 / 3))
        found = {name: d * found[name] + (1 - d) * value.double() for name, value in weights.items()}
    return found


def assert_close(
    actual: dict[str, Any], expected: dict[str, Any], only_trained: bool = False, bf16: bool = False
) -> None:
    tolerance = {"rtol": 0.01, "atol": 1e-3} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in actual.items():
        if value.is_floating_point() and (is_trained(name) or not only_trained):
            torch.testing.assert_close(value.double(), expected[name].double(), **tolerance)


CASES = ["DDP", "FSDP2, whole", "FSDP2, in shards", "FSDP2, bf16-true, whole", "FSDP2, bf16-true, in shards"]
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_two_processes_train_as_without(case, weights_ranks):
    for rank in weights_ranks:
        full, plain = rank[case]["full"], rank[case]["plain"]
        assert not differences(full["trained"], plain["trained"])


@each_case
def test_two_processes_end_with_one_average(case, weights_ranks):
    """Compare the weights, and the buffers of the first process, which DDP broadcasts."""
    bf16 = "bf16" in case
    first = weights_ranks[0][case]["full"]
    for rank in weights_ranks:
        full = rank[case]["full"]
        assert not differences(full["weights"], first["weights"])
        assert_close(full["weights"], average(first["trained"], 0.8), bf16=bf16)
        for epoch, validated in enumerate(full["validated"], start=1):
            assert_close(validated, average(first["trained"][: 4 * epoch], 0.8), bf16=bf16)
            assert not differences(validated, first["validated"][epoch - 1])


@each_case
def test_two_processes_resume_bitwise(case, weights_ranks):
    for rank in weights_ranks:
        full = rank[case]["full"]
        assert len(rank[case]["resumed"]) == 4
        for path, resumed in rank[case]["resumed"].items():
            assert not differences(
                *({k: v for k, v in x["weights"].items() if is_trained(k)} for x in (full, resumed))
            ), path
            for left, right in zip(resumed["shadows"], full["shadows"], strict=True):
                assert not differences(*({k: v for k, v in x.items() if is_trained(k)} for x in (left, right))), path


@each_case
def test_one_process_writes_whole_snapshots_and_resumes_them_bitwise(case, weights_ranks):
    first, other = (rank[case]["full"] for rank in weights_ranks)
    assert [first["writes"], other["writes"]] == [[False, False, True], [False, False, False]]
    assert list(first["snapshots"]) == ["12.pt", "3.pt", "6.pt", "9.pt"]
    last = first["snapshots"]["12.pt"]
    for length, means, exponents in zip(last["lengths"], last["averages"], last["exponents"], strict=True):
        power = power_ema_exponent(length) + 1
        shares = [((step + 1) / 12) ** power - (step / 12) ** power for step in range(12)]
        for name, mean in means.items():
            values = [share * trained[name].double() for share, trained in zip(shares, first["trained"], strict=True)]
            torch.testing.assert_close(mean.double() * 2.0 ** exponents[name], sum(values), rtol=1e-3, atol=1e-3)
    for path, resumed in weights_ranks[0][case]["resumed"].items():
        trained = [
            {
                name: [{n: v for n, v in a.items() if is_trained(n)} for a in each["averages"]]
                for name, each in of.items()
            }
            for of in (resumed["snapshots"], first["snapshots"])
        ]
        assert not differences(*trained), path


@pytest.mark.parametrize("case", [case for case in CASES if "shards" not in case])
def test_two_processes_write_the_average_and_the_weights(case, weights_ranks):
    bf16, history = "bf16" in case, weights_ranks[0][case]["full"]["trained"]
    for checkpoint in weights_ranks[0][case]["checkpoints"].values():
        done = history[: checkpoint["global_step"]]
        assert_close(checkpoint["state_dict"], average(done, 0.8), bf16=bf16)
        assert not differences(
            checkpoint["callbacks"]["EMA"]["raw"], {k: done[-1][k] for k in checkpoint["callbacks"]["EMA"]["raw"]}
        )
        assert_close(checkpoint["callbacks"]["EMA(aside)"]["average"], average(done, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["DDP", "FSDP2"])
def test_two_processes_have_one_spectral_norm_and_resume_bitwise(case, weights_ranks):
    first = weights_ranks[0][f"spectral {case}"]
    for number, rank in enumerate(weights_ranks):
        found = rank[f"spectral {case}"]
        assert found["norms"] == pytest.approx([1, 1], abs=1e-3)
        names = [name for name in found["full"] if is_trained(name) or name.endswith(("original", "_orig", "_u", "_v"))]
        for resumed in found["resumed"]:
            assert not differences(*({name: x[name] for name in names} for x in (resumed, found["full"])))
        assert not differences(*({name: x["full"][name] for name in names} for x in (first, found)))
        assert float(found["full"]["state"]) == 12 * (1 if case == "DDP" else 1 + number)  # DDP spreads the first one's
