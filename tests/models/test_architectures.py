import argparse
import logging
import math
import re
from pathlib import Path

import lightning
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

import lit_tricks
from lit_tricks.models import create_model, load_weights, resnet

VARIANTS = ("A", "B", "C", "D")
TINY = {"depth": 18, "width": 1 / 32, "num_classes": 10}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor, batch-norm statistics as well, its own values, so that no two of them can be confused."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            low, high = (-0.2, 0.2) if name.endswith(("bias", "running_mean")) else (0.5, 1.5)
            tensor.uniform_(low, high, generator=generator)
        else:
            tensor.zero_()
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(own[key], value, rtol=0, atol=0, msg=key)


# --- the network ------------------------------------------------------------------------------------------------------


# fvcore compiles a loss of its own when imported, and traces the model, both with what torch 2.9 began to deprecate.
@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("variant", "parameters", "giga"),
    [("A", 25.557, 3.88), ("B", 25.557, 4.11), ("C", 25.576, 4.35), ("D", 25.576, 4.35)],
)
def test_size_is_that_of_table_5(variant, parameters, giga):
    from fvcore.nn import FlopCountAnalysis

    model = resnet(50, variant).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.0005)
    # It has no counter for activations, pooling and additions, and says so for each: they are no multiply-adds.
    counter = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
    assert counter.total() / 1e9 == pytest.approx(giga, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "depth", "variant"),
    [
        ("resnet18", 18, "A"),
        ("resnet18", 18, "B"),
        ("resnet18d", 18, "D"),
        ("resnet34", 34, "B"),
        ("resnet34d", 34, "D"),
        ("resnet50", 50, "B"),
        ("resnet50c", 50, "C"),
        ("resnet50d", 50, "D"),
        ("resnet101", 101, "B"),
        ("resnet101c", 101, "C"),
        ("resnet101d", 101, "D"),
        ("resnet152", 152, "B"),
        ("resnet152c", 152, "C"),
        ("resnet152d", 152, "D"),
    ],
)
def test_weights_of_timm_give_the_outputs_of_timm(name, depth, variant):
    with torch.device("meta"):  # saves drawing weights that are replaced
        theirs, ours = timm.create_model(name), resnet(depth, variant)
    theirs, ours = randomize(theirs.to_empty(device="cpu")), ours.to_empty(device="cpu").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.slow
@torch.inference_mode()
def test_b_is_the_resnet_of_torchvision():
    theirs = randomize(torchvision.models.resnet50())
    ours = resnet(50, "B").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))


@torch.inference_mode()
@pytest.mark.parametrize(("variant", "first", "second"), [("A", 2, 1), ("B", 1, 2)])
def test_stride_of_the_bottleneck(variant, first, second):
    model = randomize(resnet(50, variant, width=0.125))
    for layer, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2), (model.layer4, 2)):
        for block, scale in ((layer[0], stride), (layer[1], 1)):
            x = images(2, block.conv1.in_channels, 8, 8).relu()
            y = F.conv2d(x, block.conv1.weight, stride=min(first, scale))
            y = F.conv2d(block.bn1(y).relu(), block.conv2.weight, stride=min(second, scale), padding=1)
            y = block.bn3(F.conv2d(block.bn2(y).relu(), block.conv3.weight))
            shortcut = x
            if block.downsample is not None:
                shortcut = block.downsample[1](F.conv2d(x, block.downsample[0].weight, stride=scale))
            torch.testing.assert_close(block(x.clone()), (y + shortcut).relu())


@torch.inference_mode()
def test_shortcut_of_d_averages_only_the_pixels_that_are_there():
    shortcut = randomize(resnet(50, "D", width=0.125)).layer2[0].downsample
    x = images(1, 32, 5, 5)
    # An odd side leaves a last row and column of half a window.
    pooled = torch.stack(
        [torch.stack([x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in (0, 2, 4)], -1) for i in (0, 2, 4)], -2
    )
    torch.testing.assert_close(shortcut(x), shortcut[2](F.conv2d(pooled, shortcut[1].weight)))


@torch.inference_mode()
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [176, 208, 232, 240])
def test_sizes_whose_half_is_odd_somewhere(depth, variant, size):
    model = resnet(depth, variant, 7, width=1 / 32).eval()
    assert model.forward_features(images(1, 3, size, size)).shape[2:] == (math.ceil(size / 32),) * 2
    assert model(images(2, 3, size, size)).shape == (2, 7)


@torch.inference_mode()
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("size", "sides"), [(32, [32, 32, 16, 8, 4]), (8, [8, 8, 4, 2, 1])])
def test_small_input_keeps_the_size_up_to_the_second_stage(depth, variant, size, sides):
    model = resnet(depth, variant, 7, small_input=True, width=1 / 32)
    x = images(2, 3, size, size)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[2] for m in maps] == sides
    assert [info["reduction"] for info in model.feature_info] == [size // side for side in sides]
    assert model(x).isfinite().all()  # in training mode, where batch norm needs more than one value per channel


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_input_stem(variant):
    stem = resnet(50, variant, small_input=True).conv1
    convs = [m for m in stem.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == ([64] if variant in "AB" else [32, 32, 64])
    assert {(m.kernel_size, m.stride, m.padding, m.bias) for m in convs} == {((3, 3), (1, 1), (1, 1), None)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("small_input", [False, True])
@pytest.mark.parametrize("width", [0.25, 2.0])
def test_width_multiplies_every_channel(variant, small_input, width):
    with torch.device("meta"):
        full, other = (resnet(50, variant, 10, small_input=small_input, width=w) for w in (1.0, width))
    count = 0
    for (name, a), b in zip(full.named_modules(), other.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert b.out_channels == a.out_channels * width, name
            assert b.in_channels == (3 if a.in_channels == 3 else a.in_channels * width), name
            assert (b.kernel_size, b.stride) == (a.kernel_size, a.stride), name
            count += 1
    assert count == (53 if variant in "AB" else 55)
    assert (other.fc.in_features, other.fc.out_features) == (2048 * width, 10)


def test_in_chans_sets_input_channels():
    assert resnet(**TINY, in_chans=5)(images(2, 5, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("zero", [False, True])
def test_init_of_timm_is_drawn_as_timm_draws_it(zero):
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18d", zero_init_last=zero)
    torch.manual_seed(3)
    assert_same(resnet(18, "D", zero_init_last=zero), theirs.state_dict())


@pytest.mark.parametrize("small_input", [False, True])
def test_init_of_the_plain_stem_is_kaiming_over_the_fan_out(small_input):
    weight = resnet(18, "B", small_input=small_input).conv1.weight
    std = math.sqrt(2 / (64 * weight[0, 0].numel()))
    assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert weight.abs().max() > 2.5 * std  # a uniform draw of this deviation ends at 1.73


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("init", ["timm", "xavier"])
def test_zero_init_last_touches_the_last_norm_of_every_block_alone(depth, variant, init):
    model = resnet(depth, variant, 10, width=1 / 32, init=init, zero_init_last=True)
    last = r"layer\d\.\d+\.bn2" if depth == 18 else r"layer\d\.\d+\.bn3"
    found = {name: m.weight.mean().item() for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert found == {name: 0.0 if re.fullmatch(last, name) else 1.0 for name in found}
    assert list(found.values()).count(0.0) == (8 if depth == 18 else 16)


def test_gamma_is_one_unless_asked():
    norms = [m for m in resnet(**TINY).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


@pytest.mark.parametrize("variant", ["B", "D"])
def test_xavier_is_uniform_within_its_bound(variant):
    torch.manual_seed(0)
    model = resnet(50, variant, 100, width=0.5, init="xavier")
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            outputs, inputs, *kernel = m.weight.shape
            bound = math.sqrt(6 / ((inputs + outputs) * math.prod(kernel)))
            assert bound * 0.97 < m.weight.abs().max() <= bound, name
            assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert m.bias is None or not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert not m.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "depth must be one of 18, 34, 50, 101, 152"),
        ({"variant": "d"}, "variant must be one of 'A', 'B', 'C', 'D'"),
        ({"variant": "AB"}, "variant='AB'"),
        ({"init": "msra"}, "init must be one of 'timm', 'xavier'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 10.0}, "num_classes=10.0"),
        ({"in_chans": -1}, "in_chans=-1"),
        ({"width": 0.3}, "width=0.3 would give the stem 9.6 channels: choose a multiple of 1/32"),
        ({"width": 0.0}, "width=0.0"),
        ({"width": -1.0}, "width=-1.0"),
        ({"width": math.nan}, "width=nan"),
        ({"width": math.inf}, "width=inf"),
    ],
)
def test_wrong_argument_is_rejected_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resnet(**arguments)


# --- weights ----------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.teacher = resnet(**TINY)


def save_lightning(model: nn.Module, path: Path) -> None:
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Module(model))
    trainer.save_checkpoint(path)


FILES = {
    "plain.pth": lambda model, path: torch.save(model.state_dict(), path),
    "timm.pth.tar": lambda model, path: torch.save(
        {"state_dict": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path
    ),
    "nested.pt": lambda model, path: torch.save({"model": model.state_dict(), "optimizer": {"lr": 0.1}}, path),
    "averaged.pth": lambda model, path: torch.save(
        {"state_dict": resnet(**TINY).state_dict(), "state_dict_ema": model.state_dict()}, path
    ),
    "ddp.pth": lambda model, path: torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, path),
    "compiled.pth": lambda model, path: torch.save({f"_orig_mod.{k}": v for k, v in model.state_dict().items()}, path),
    "old.pth": lambda model, path: torch.save(
        {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, path
    ),
    "model.safetensors": lambda model, path: save_file(model.state_dict(), path),
}


@pytest.mark.parametrize("name", FILES)
def test_load_every_kind_of_file(name, tmp_path):
    source, target = randomize(resnet(**TINY)), resnet(**TINY)
    FILES[name](source, tmp_path / name)
    load_weights(target, str(tmp_path / name))
    assert_same(target, source.state_dict())


@pytest.mark.parametrize("compiled", [False, True])
def test_load_a_checkpoint_of_lightning(compiled, tmp_path):
    source, target = randomize(resnet(**TINY)), resnet(**TINY)
    save_lightning(source, tmp_path / "last.ckpt")
    if compiled:  # the keys that a compiled network gives
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k.replace("model.", "model._orig_mod."): v for k, v in state.items()}
        torch.save(checkpoint, tmp_path / "last.ckpt")
    load_weights(target, str(tmp_path / "last.ckpt"))
    assert_same(target, source.state_dict())


def test_a_network_that_calls_its_own_part_model_keeps_its_keys(tmp_path):
    source, target = (nn.ModuleDict({"model": nn.Linear(3, 3), "fc": nn.Linear(3, 2)}) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    assert_same(target, source.state_dict())


def test_weights_argument_of_both_builders(tmp_path):
    source = randomize(resnet(**TINY))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    assert_same(resnet(**TINY, weights=str(tmp_path / "w.pth")), source.state_dict())
    assert_same(create_model("resnet", **TINY, weights=str(tmp_path / "w.pth")), source.state_dict())
    foreign = randomize(timm.create_model("mobilenetv1_100", num_classes=10))
    torch.save(foreign.state_dict(), tmp_path / "m.pth")
    assert_same(create_model("mobilenetv1_100", 10, weights=str(tmp_path / "m.pth")), foreign.state_dict())


def test_other_number_of_classes_keeps_the_classifier(tmp_path, caplog):
    source, target = randomize(resnet(**TINY)), resnet(**{**TINY, "num_classes": 3})
    fresh = copy_of(target)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        load_weights(target, str(tmp_path / "w.pth"))
    assert_same(target, {**source.state_dict(), "fc.weight": fresh["fc.weight"], "fc.bias": fresh["fc.bias"]})
    [record] = [r for r in caplog.records if r.name == "lit_tricks"]
    assert record.levelno == logging.INFO
    assert "classifier 'fc' keeps its initialization, for 10 classes there and 3 here" in record.getMessage()


def test_full_load_says_nothing(tmp_path, caplog):
    torch.save(resnet(**TINY).state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        load_weights(resnet(**TINY), str(tmp_path / "w.pth"))
    assert not [r for r in caplog.records if r.name == "lit_tricks"]


@pytest.mark.parametrize("variant", ["B", "D"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_number_of_channels_adapts_the_first_convolution(variant, in_chans, tmp_path, caplog):
    source = randomize(resnet(**TINY, variant=variant))
    target = resnet(**TINY, variant=variant, in_chans=in_chans)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        load_weights(target, str(tmp_path / "w.pth"))
    assert f"adapted from 3 to {in_chans} input channels" in caplog.text
    key = "conv1.weight" if variant == "B" else "conv1.0.weight"
    colors = source.state_dict()[key]
    # One channel sees the sum, four see red, green, blue and red again at the same total.
    expected = colors.sum(1, keepdim=True) if in_chans == 1 else colors[:, [0, 1, 2, 0]] * 0.75
    assert_same(target, {**source.state_dict(), key: expected})


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, {"depth": 34},
         "'layer1.2.conv1.weight' is absent in the checkpoint and of shape (2, 2, 3, 3) in the model"),
        ({"depth": 34}, {},
         "'layer1.2.conv1.weight' is of shape (2, 2, 3, 3) in the checkpoint and absent in the model"),
        ({"variant": "B"}, {"variant": "B", "small_input": True},
         "'conv1.weight' is of shape (2, 3, 7, 7) in the checkpoint and of shape (2, 3, 3, 3) in the model"),
        ({"variant": "B"}, {"variant": "B", "small_input": True, "in_chans": 1},
         "'conv1.weight' is of shape (2, 3, 7, 7) in the checkpoint and of shape (2, 1, 3, 3) in the model"),
        ({"in_chans": 4}, {}, "'conv1.0.weight' is of shape (1, 4, 3, 3) in the checkpoint"),
        ({"width": 1 / 16, "num_classes": 3}, {}, "'conv1.0.weight' is of shape (2, 3, 3, 3) in the checkpoint"),
    ],
)  # fmt: skip
def test_another_architecture_leaves_the_model_untouched(source, target, message, tmp_path):
    torch.save(resnet(**{**TINY, **source}).state_dict(), tmp_path / "w.pth")
    model = randomize(resnet(**{**TINY, **target}))
    before = copy_of(model)
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        load_weights(model, str(tmp_path / "w.pth"))
    assert "checkpoint of another architecture" in str(caught.value)
    assert "w.pth" in str(caught.value)
    assert_same(model, before)


def test_a_last_norm_is_no_classifier(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).state_dict(), tmp_path / "w.pth")
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[1] = nn.LayerNorm(5)
    with pytest.raises(RuntimeError, match=r"'1.weight' .*\(3,\)"):
        load_weights(model, str(tmp_path / "w.pth"))


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_nothing_in_a_file_is_executed(tmp_path):
    exploit = Exploit()
    exploit.path = str(tmp_path / "executed")
    torch.save({"state_dict": resnet(**TINY).state_dict(), "more": exploit}, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"w\.pth is no readable checkpoint"):
        load_weights(resnet(**TINY), str(tmp_path / "w.pth"))
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # the file would have done it
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04cut"])
def test_damaged_weights_are_rejected_by_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"{re.escape(name)} is no readable checkpoint"):
        load_weights(resnet(**TINY), str(tmp_path / name))


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {}}])
def test_file_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match=r"w\.pth holds no tensors"):
        load_weights(resnet(**TINY), str(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["gone.pth", "gone.ckpt", "folder/gone", "gone.safetensors"])
def test_missing_weights_are_rejected_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"weights='{name}'.*{tmp_path.name}"):
        load_weights(resnet(**TINY), name)


@pytest.mark.parametrize("name", ["resnet50d.ra2_in1", "resnet50d.ra_in1k"])
def test_unknown_weights_name_the_nearest(name):
    with pytest.raises(ValueError, match=rf"weights='{name}' .*'resnet50d\.ra2_in1k'"):
        load_weights(resnet(**TINY), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18d.ra2_in1k", "resnet18d"])
def test_weights_by_name_come_from_the_hub_of_timm(name, monkeypatch, caplog):
    remote = randomize(timm.create_model("resnet18d"))
    requested = []

    def download(model_id, *args, **kwargs):
        requested.append(model_id)
        return copy_of(remote)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    target = resnet(18, "D", num_classes=10, in_chans=1)
    fresh = copy_of(target)
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        load_weights(target, name)
    assert requested == ["timm/resnet18d.ra2_in1k"]
    expected = {
        **remote.state_dict(),
        "conv1.0.weight": remote.state_dict()["conv1.0.weight"].sum(1, keepdim=True),
        "fc.weight": fresh["fc.weight"],
        "fc.bias": fresh["fc.bias"],
    }
    assert_same(target, expected)
    assert "for 1000 classes there and 10 here" in caplog.text


def test_weights_of_another_depth_by_name(monkeypatch):
    state = timm.create_model("resnet18d").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(state))
    with pytest.raises(RuntimeError, match=r"'layer1.2.conv1.weight' is absent"):
        resnet(34, "D", weights="resnet18d")


def test_failed_download_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise FileNotFoundError("cannot reach the hub.")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    with pytest.raises(ConnectionError, match=r"weights='resnet18d'.*hub.*path"):
        load_weights(resnet(18, "D"), "resnet18d")


# --- any model by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("inception_v3", 96, {}),
        ("mobilenetv1_100", 64, {"drop_rate": 0.1}),
        ("resnet", 32, {"depth": 18, "variant": "C", "small_input": True, "width": 0.25}),
    ],
)
def test_one_training_step(name, size, arguments):
    torch.manual_seed(0)
    model = create_model(name, 10, **arguments).train()
    before = copy_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(images(2, 3, size, size))
    assert logits.shape == (2, 10)
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    optimizer.step()
    unmoved = [key for key, p in model.named_parameters() if torch.equal(p, before[key])]
    assert not unmoved


def test_create_model_builds_ours_with_its_arguments():
    model = create_model("resnet", 7, in_chans=2, depth=50, variant="A", width=1 / 32)
    assert model.layer2[0].conv1.stride == (2, 2)
    assert model(images(2, 2, 64, 64)).shape == (2, 7)
    assert create_model("resnet18", 7, in_chans=2)(images(2, 2, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnt", {}, r"name='resnt' is neither 'resnet', 'small_vgg' nor a model of timm; did you mean 'resnet'"),
        ("mobilenet_v1_100", {}, r"did you mean .*'mobilenetv1_100'"),
        ("!", {}, r"timm.list_models\(\) has all"),
        ("resnet50d.ra2_in1k", {}, r"use name='resnet50d' with weights='resnet50d.ra2_in1k'"),
        ("resnet", {"varient": "D"}, r"'varient' is no argument of model 'resnet'; did you mean 'variant'"),
        ("resnet", {"q": 1}, r"'q' is no argument of model 'resnet'; it takes depth, variant, .*, init, weights$"),
        ("resnet", {"depth": 51}, r"depth=51"),
        ("resnet18", {"variant": "D"}, r"'variant' is no argument of model 'resnet18'"),
        ("mobilenetv1_100", {"depth": 50}, r"'depth' is no argument of model 'mobilenetv1_100'"),
        ("resnet18", {"pretrained": True}, r"'pretrained' .*: use weights='resnet18' or the path"),
        ("resnet18", {"checkpoint_path": "x"}, r"'checkpoint_path' .*: use weights='resnet18' or the path"),
        ("resnet", {"num_classes": 0}, r"num_classes=0"),
        ("resnet18", {"num_classes": 0}, r"num_classes=0"),
        ("resnet18", {"in_chans": 0}, r"in_chans=0"),
    ],
)
def test_create_model_rejects(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 10, **arguments})


def test_a_type_error_inside_a_model_is_not_renamed():
    with pytest.raises(TypeError, match="int"):
        create_model("resnet18", 10, channels=3)


def test_a_type_error_about_an_argument_of_nobody_is_not_renamed(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("inner() got an unexpected keyword argument 'momentum'")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(TypeError, match="momentum"):
        create_model("resnet18", 10, drop_rate=0.1)


def test_timm_is_imported_in_models_and_for_what_is_given_by_name_alone():
    root = Path(lit_tricks.__file__).parent
    pattern = re.compile(r"^\s*(import|from) timm\b", re.MULTILINE)
    found = {str(p.relative_to(root)) for p in root.rglob("*.py") if pattern.search(p.read_text("utf-8"))}
    elsewhere = {path for path in found if not path.startswith("models/")}
    # for models by name, within functions, and for what is written for timm
    assert elsewhere == {
        "callbacks/soft_targets/teacher.py",
        "cli/discovery.py",
        "cli/hints.py",
        "commands/sizes/subject.py",
        "commands/exporting/timm_folder.py",
        "utils/layers.py",
    }
    assert found > elsewhere
