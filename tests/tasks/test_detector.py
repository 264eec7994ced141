"""The Detector: its losses against the formulas and torchvision's own models, its metrics, checkpoints and errors."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import checkpoint, cli, done, metrics, results, workplace
from helpers.detector_distributed import found_and_wanted
from helpers.detectors import FEW, detector, trainer
from helpers.launch import two_processes
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, sigmoid_focal_loss

from lit_tricks import Classifier, Detector
from lit_tricks.data import DigitDetection
from lit_tricks.data.synthetic.digit_scenes import DigitScenes
from lit_tricks.models.detectors import box_loss
from lit_tricks.run.preview import BOX, preview_of
from lit_tricks.tasks.detection import _AveragePrecision

MODELS = ("faster_rcnn", "retinanet")
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def batch() -> Batch:
    """Images of three sizes; the second has no objects."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, *size, generator=generator) for size in ((64, 64), (48, 64), (80, 60))]
    boxes = [[(4.0, 6.0, 20.0, 30.0), (30.0, 30.0, 46.0, 60.0)], [], [(10.0, 12.0, 30.0, 44.0)]]
    labels = [[1, 10], [], [4]]
    targets = [
        {"boxes": torch.tensor(b).reshape(-1, 4), "labels": torch.tensor(each, dtype=torch.int64)}
        for b, each in zip(boxes, labels, strict=True)
    ]
    return images, targets


# Losses, by their formulas


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 0.5, 3.0])
def test_smooth_l1_is_the_formula(beta: float) -> None:
    deltas, targets = (
        torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    expected = 0.0
    for x in np.abs((deltas - targets).numpy()).ravel():
        expected += 0.5 * x * x / beta if x < beta else x - 0.5 * beta
    assert box_loss(deltas, targets, beta).item() == pytest.approx(expected, rel=1e-12)


def test_focal_loss_is_the_formula() -> None:
    """The loss of RetinaNet: alpha 0.25, gamma 2, over all anchors, per image, over the number of those that match."""
    logits = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(40, 3, dtype=torch.float64)
    target[3, 1] = target[7, 2] = 1
    expected = 0.0
    for z, y in zip(logits.numpy().ravel(), target.numpy().ravel(), strict=True):
        p = 1 / (1 + np.exp(-z))
        expected -= 0.25 * (1 - p) ** 2 * np.log(p) if y else 0.75 * p**2 * np.log(1 - p)
    assert sigmoid_focal_loss(logits, target, reduction="sum").item() == pytest.approx(expected, rel=1e-12)
    head = detector("retinanet", num_classes=3).double().model.get_submodule("head.classification_head")
    matched = torch.full((40,), -1)
    matched[3], matched[7], matched[9] = 0, 1, -2  # the last overlaps a little, and is left out
    found = head.compute_loss([{"labels": torch.tensor([1, 2])}], {"cls_logits": logits[None]}, [matched])  # type: ignore[operator]
    ignored = sigmoid_focal_loss(logits[9], target[9], reduction="sum").item()
    assert found.item() == pytest.approx((expected - ignored) / 2, rel=1e-12)


# Models, against torchvision's own, built of the same parts by hand


class Parts(torch.nn.Module):
    """Backbone and pyramid as torchvision wants them."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = backbone.body, backbone.fpn, 8

    def forward(self, images: Tensor) -> Any:
        net = self.body.net
        x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
        maps = []
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            maps.append(x)
        return self.fpn({str(i): each for i, each in enumerate(maps[-len(self.body.strides) :])})


def reference(module: Detector) -> Any:
    parts: Any = Parts(module.model.backbone)
    common = {"min_size": 64, "max_size": 64, "image_mean": [0.0], "image_std": [1.0]}
    if isinstance(module.model, FasterRCNN):
        anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
        pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
        heads = {"box_head": TwoMLPHead(8 * 49, 16), "box_predictor": FastRCNNPredictor(16, 11)}
        net: Any = FasterRCNN(parts, rpn_anchor_generator=anchors, box_roi_pool=pool, **heads, **common, **FEW)
    else:
        sizes = tuple(tuple(x * 2 ** (i / 3) for i in range(3)) for x in (32, 64, 128, 256, 512))
        net = RetinaNet(parts, 10, anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5), **common)
    net.load_state_dict(module.model.state_dict())
    return net


@pytest.mark.parametrize("beta", [None, "torchvision's"])
@pytest.mark.parametrize("model", MODELS)
def test_losses_gradients_and_boxes_are_those_of_torchvision(model: str, beta: str | None) -> None:
    number = None if beta is None else {"faster_rcnn": 1 / 9, "retinanet": 0.0}[model]
    module = detector(model, beta=number)
    with torch.no_grad():  # scores high enough that there is something to compare
        for name, parameter in module.model.named_parameters():
            if "bbox" not in name and name.endswith(("cls_score.weight", "cls_logits.weight", "cls_logits.bias")):
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    theirs, (images, targets) = reference(module), batch()
    offset = 0 if model == "faster_rcnn" else 1
    labels_of_theirs = [target | {"labels": target["labels"] - offset} for target in targets]
    torch.manual_seed(3)
    found = module.losses(images, targets)
    torch.manual_seed(3)
    expected = theirs(images, labels_of_theirs)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    ours = torch.autograd.grad(sum(found.values()), list(module.model.parameters()), allow_unused=True)
    for mine, other in zip(
        ours, torch.autograd.grad(sum(expected.values()), list(theirs.parameters()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(mine, other)
    module.eval(), theirs.eval()
    with torch.no_grad():
        pairs = list(zip(module(images), theirs(images), strict=True))
    assert sum(len(mine["boxes"]) for mine, _ in pairs) > 20
    for mine, other in pairs:
        torch.testing.assert_close(mine["boxes"], other["boxes"])
        torch.testing.assert_close(mine["scores"], other["scores"])
        assert torch.equal(mine["labels"], other["labels"] + offset)
        assert mine["labels"].min() >= 1
        assert mine["labels"].max() <= 10


@pytest.mark.parametrize("model", MODELS)
def test_beta_changes_the_loss_of_boxes_alone(model: str) -> None:
    found = []
    for beta in (0.0, 0.2, 5.0):
        module = detector(model, beta=beta)
        torch.manual_seed(0)
        found.append({name: loss.item() for name, loss in module.losses(*batch()).items()})
    for name in found[0]:
        values = [each[name] for each in found]
        if "box_reg" in name or "bbox" in name:
            assert values[0] > values[1] > values[2] > 0
        else:
            assert values == pytest.approx([values[0]] * 3)


@pytest.mark.parametrize("model", MODELS)
def test_images_are_not_normalised_again(model: str) -> None:
    module = detector(model).eval()
    image = 100 + 50 * torch.randn(1, 64, 64)
    seen: list[Tensor] = []
    module.model.get_submodule("backbone").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        module([image])
    assert torch.equal(seen[0], image[None])


@pytest.mark.parametrize("model", MODELS)
def test_boxes_are_in_the_pixels_of_the_image(model: str) -> None:
    """Boxes of an image of twice the size are twice as large, as images are resized to one size."""
    module = detector(model, model_args={"box_score_thresh": 0.0} if model == "faster_rcnn" else {"score_thresh": 0.0})
    small = torch.nn.functional.interpolate(torch.randn(1, 1, 8, 8), (64, 64))[0]
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    with torch.no_grad():
        one, two = module.eval()([small])[0], module([large])[0]
    overlap = box_iou(2 * one["boxes"][:5], two["boxes"]).max(1).values
    assert (overlap > 0.9).all()
    assert two["boxes"].max() <= 128


# Metrics


def test_average_precision_of_a_case_by_hand() -> None:
    """Two classes. Of the first, two objects: found with IoU 1 and, behind a false alarm, with IoU 0.8.

    Precision at recall up to 1/2 is 1, and above it 2/3, at thresholds up to 0.75; over the 101 recalls of COCO that is
    (51 + 50 * 2/3) / 101. At 0.8, where the IoU counts still, and above, it is half of that: 51 / 101. The second class
    has one object, which is found, and a crowd, in which two boxes lie that do not count.
    """
    box, shifted = (0.0, 0.0, 100.0, 100.0), (0.0, 0.0, 100.0, 78.0)
    far = (300.0, 300.0, 340.0, 340.0)
    found = [
        {"boxes": torch.tensor([box, far]), "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.8])},
        {"boxes": torch.tensor([shifted]), "labels": torch.tensor([1]), "scores": torch.tensor([0.7])},
        {
            "boxes": torch.tensor([box, far, far]),
            "labels": torch.tensor([2, 2, 2]),
            "scores": torch.tensor([0.5, 0.9, 0.8]),
        },
    ]
    crowd = torch.tensor([box, (200.0, 200.0, 400.0, 400.0)])
    wanted = [
        {"boxes": torch.tensor([box]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([box]), "labels": torch.tensor([1])},
        {"boxes": crowd, "labels": torch.tensor([2, 2]), "iscrowd": torch.tensor([0, 1])},
    ]
    metric = _AveragePrecision()
    metric.update(found[:1], wanted[:1])
    metric.update(found[1:], wanted[1:])
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result["map50"] == pytest.approx((both + 1) / 2, abs=1e-6)
    assert result["map75"] == pytest.approx((both + 1) / 2, abs=1e-6)
    assert result["map"] == pytest.approx((0.6 * both + 0.4 * one + 1) / 2, abs=1e-6)  # IoU 0.78: six thresholds of ten


def test_nothing_to_find_and_nothing_found_is_no_error() -> None:
    metric = _AveragePrecision()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    metric.update([empty | {"scores": torch.zeros(0)}], [empty])
    assert all(value == 0 for value in metric.compute().values())


@pytest.mark.parametrize("model", MODELS)
def test_a_loss_is_the_sum_of_its_parts(model: str) -> None:
    run, module = trainer(limit_train_batches=2), detector(model)
    run.fit(module, DigitDetection(batch_size=4))
    found = {name: value.item() for name, value in run.callback_metrics.items()}
    parts = [
        value for name, value in found.items() if name.startswith("train/loss_") and name[11:] not in ("step", "epoch")
    ]
    assert len(parts) == (4 if model == "faster_rcnn" else 2)
    assert found["train/loss_epoch"] == pytest.approx(sum(parts), rel=1e-5)
    epoch = {name for name in found if name not in ("train/loss", "train/loss_step")}
    expected = {name for name in module.epoch_metrics() if not name.startswith(("raw/", "test/"))}
    assert epoch == expected


def test_without_pycocotools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lit_tricks.tasks.detection.find_spec", lambda name: None if name == "pycocotools" else find(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"lit-tricks\[detection\]"):
        trainer().fit(detector(), DigitDetection())
    module = detector().eval()
    assert len(module.predict_step([torch.zeros(1, 64, 64)])) == 1  # to predict, it needs none


def test_two_processes_count_all_images(tmp_path: Path) -> None:
    """Four images in one and three in the other; and DDP trains the same weights in both."""
    [one, two] = two_processes(["detector_distributed"], tmp_path)["detector_distributed"]
    metric = _AveragePrecision()
    pairs = found_and_wanted()
    metric.update(*map(list, zip(*pairs, strict=True)))
    expected = {name: value.item() for name, value in metric.compute().items()}
    assert 0 < expected["map75"] < expected["map50"] <= 1
    assert one["precision"] == two["precision"] == pytest.approx(expected)
    assert one["metrics"]["val/map50"] == two["metrics"]["val/map50"]
    batch_norm = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in one["weights"] if not name.endswith(batch_norm)]
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in names)
    before = detector().state_dict()
    assert not any(torch.equal(one["weights"][name], before[name]) for name in names if name.endswith("conv1.weight"))


# Training


def test_detector_learns_one_scene() -> None:
    """Until it finds all of its objects, and nothing else with as much confidence."""
    torch.manual_seed(0)
    module = detector(backbone_args={"depth": 18, "width": 0.125}, channels=32, head_width=64)
    image, target = DigitDetection(scale=(1.0, 1.0)).train_dataloader().dataset[3]
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack(list(module.losses([image] * 2, [target] * 2).values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        [found] = module.eval()([image])
    sure = found["scores"] > 0.5
    overlap, which = box_iou(target["boxes"], found["boxes"][sure]).max(1)
    assert (overlap > 0.6).all()
    assert torch.equal(found["labels"][sure][which], target["labels"])


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_without_any_object_trains(model: str) -> None:
    module = detector(model)
    images = batch()[0]
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 3
    losses = module.losses(images, empty)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("channels", [16, 64, 256])
def test_the_heads_of_retinanet_let_a_signal_through_at_any_width(channels: int) -> None:
    """As torchvision's do at the 256 channels that its standard deviation is made for; at 16 they would lose it."""
    torch.manual_seed(0)
    maps = torch.randn(4, 256, 16, 16)
    expected = RetinaNetHead(256, 9, 3).regression_head.conv(maps).std().item()
    net: Any = detector("retinanet", channels=channels).model
    for head in (net.head.regression_head, net.head.classification_head):
        assert head.conv(maps[:, :channels]).std().item() / expected == pytest.approx(1, abs=0.5)
    if channels == 16:
        assert RetinaNetHead(16, 9, 3).regression_head.conv(maps[:, :16]).std() / expected < 0.05


def test_a_backbone_starts_from_a_classifier(tmp_path: Path) -> None:
    classifier = Classifier("resnet", 7, {"depth": 18, "width": 0.03125}, input_size=(1, 64, 64))
    run = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    run.strategy.connect(classifier)
    classifier.trainer = run
    run.save_checkpoint(tmp_path / "classifier.ckpt")
    module = detector(weights=str(tmp_path / "classifier.ckpt"), freeze=["conv1", "bn1", "layer1"])
    expected = classifier.model.state_dict()
    found = module.model.get_submodule("backbone.body.net").state_dict()
    assert found.keys() == {name for name in expected if not name.startswith("fc.")}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    trainer().fit(module, DigitDetection(batch_size=4))
    after = module.model.get_submodule("backbone.body.net").state_dict()
    still = {name for name in after if torch.equal(after[name], expected[name])}
    frozen = {name for name in after if name.startswith(("conv1.", "bn1.", "layer1."))}
    assert frozen <= still
    assert not any(name.startswith("layer2.") and "conv" in name for name in still)


def test_layer_decay_slows_the_backbone() -> None:
    module = detector(layer_decay=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    rate_of = {p: group["lr"] for group in module.configure_optimizers().param_groups for p in group["params"]}
    names = dict(module.named_parameters())
    assert rate_of[names["model.rpn.head.cls_logits.weight"]] == 1
    assert rate_of[names["model.backbone.body.net.layer4.1.conv2.weight"]] == 0.5
    assert rate_of[names["model.backbone.body.net.conv1.0.weight"]] < 0.01


def test_timm_models_are_backbones() -> None:
    module = detector(backbone="resnet18", backbone_args={})
    assert sum(module.losses(*batch()).values()) > 0
    module = detector("retinanet", backbone="mobilenetv3_small_050", backbone_args={})
    assert sum(module.losses(*batch()).values()) > 0


def test_draws_depend_on_epoch_and_batch_only() -> None:
    """And leaves the random state of the process as it is."""
    module = detector()
    run = trainer(max_epochs=1, limit_train_batches=1)
    run.fit(module, DigitDetection(batch_size=4))
    found = []
    module.train()
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for batch_idx in (5, 6, 5):
        before = torch.get_rng_state()
        found.append(module.training_step(batch(), batch_idx).item())
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert found[0] == found[2] != found[1]


# Where it was stopped


class Seen(Callback):
    """Notes the batches of the training, their boxes too, and saves a checkpoint after each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.batches: list[tuple[int, list[bytes]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        images, targets = batch
        parts = [*images, *(part for target in targets for part in (target["boxes"], target["labels"]))]
        self.batches.append((trainer.current_epoch, [part.numpy().tobytes() for part in parts]))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.folder:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def seen_in_fit(model: str, workers: int, seed: int, path: Path | None = None, folder: Path | None = None) -> Any:
    module, seen = detector(model), Seen(folder)
    seed_everything(seed, verbose=False)
    data = DigitDetection(batch_size=2, num_workers=workers)
    trainer(seen, max_epochs=2, limit_train_batches=3).fit(module, data, ckpt_path=path, weights_only=True)
    return seen.batches, module.state_dict()


@pytest.mark.parametrize(("model", "workers"), [("faster_rcnn", 0), ("faster_rcnn", 2), ("retinanet", 0)])
def test_a_run_that_was_stopped_in_an_epoch_goes_on_as_if_it_was_not(model: str, workers: int, tmp_path: Path) -> None:
    """With the batches that were left, and the draws of the stopped run, whatever seed the new one has."""
    batches, weights = seen_in_fit(model, workers, 1, folder=tmp_path)
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1]
    assert len({tuple(parts) for _, parts in batches}) == 6
    for step, seed in ((1, 1), (2, 2), (4, 2)):
        rest, found = seen_in_fit(model, workers, seed, tmp_path / f"{step}.ckpt")
        assert rest == batches[step:], step
        assert [name for name in weights if not torch.equal(found[name], weights[name])] == [], (step, seed)


# Errors

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "yolo"}, "model='yolo' is unknown: write 'faster_rcnn' or 'retinanet'"),
    "argument": (
        {"model_args": {"rpn_nms_tresh": 1}},
        "'rpn_nms_tresh' is no .*; did you mean 'rpn_nms",
    ),
    "argument of ours": ({"model_args": {"image_mean": [0]}}, "'image_mean' is no argument of FasterRCNN"),
    "classes": ({"num_classes": 0}, "num_classes=0"),
    "names": ({"class_names": ["a"]}, r"class_names=\['a'\], num_classes=10"),
    "beta": ({"beta": -1.0}, "beta=-1.0"),
    "min_size": ({"min_size": 0}, r"min_size=\[0\]"),
    "max_size": ({"min_size": [64, 128]}, r"min_size=\[64, 128\].* to 64"),
    "anchor_scale": ({"anchor_scale": 0.0}, "anchor_scale=0.0"),
    "channels": ({"channels": 0}, "channels=0"),
    "levels": ({"levels": 0}, "levels=0"),
    "backbone": ({"backbone": "resnt18"}, "'resnt18' is neither .* did you mean"),
    "maps of one size": (
        {"backbone": "mixer_s32_224", "backbone_args": {}, "input_size": (3, 224, 224)},
        r"MlpMixer have strides \[32, 32, 32, 32\], .* must rise",
    ),
    "freeze": ({"freeze": ["layer9"]}, "freeze='layer9' is no part of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_rejected_by_name(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        detector(**arguments)


def test_a_single_class_is_something_to_find() -> None:
    assert detector(num_classes=1).model.get_submodule("roi_heads.box_predictor.cls_score").out_features == 2  # type: ignore[union-attr]


def test_other_classes_than_the_data_has() -> None:
    with pytest.raises(ValueError, match=r"num_classes=4 .*10 classes"):
        trainer().fit(detector(num_classes=4), DigitDetection())


@pytest.mark.parametrize("label", [0, 11])
@pytest.mark.parametrize("model", MODELS)
def test_labels_of_no_class(model: str, label: int) -> None:
    images, targets = batch()
    targets[2]["labels"][0] = label
    with pytest.raises(ValueError, match=r"labels .*from 1 to 10"):
        detector(model).training_step((images, targets), 0)


def test_half_precision_is_rejected() -> None:
    with pytest.raises(RuntimeError, match=r"bf16-true .*bf16-mixed"):
        trainer(precision="bf16-true").fit(detector(), DigitDetection())


@pytest.mark.parametrize("model", MODELS)
def test_mixed_precision_trains(model: str) -> None:
    module, run = detector(model), trainer(precision="bf16-mixed")
    run.fit(module, DigitDetection(batch_size=4))
    assert torch.isfinite(run.callback_metrics["train/loss"])


def test_forward_in_training_mode_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"call eval\(\) before"):
        detector()([torch.zeros(1, 64, 64)])


# The command line

TINY = """
trainer: {max_epochs: 2, limit_train_batches: 3, limit_val_batches: 2, limit_test_batches: 2, num_sanity_val_steps: 0,
  enable_progress_bar: false, enable_model_summary: false, log_every_n_steps: 1}
model:
  init_args: {backbone_args: {depth: 18, width: 0.03125}, channels: 8, head_width: 16}
"""
FIT = ("fit", "--config=detect_digits", "--config=small.yaml", "--name=small")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with workplace(tmp_path):
        Path("small.yaml").write_text(TINY)
        yield tmp_path


@pytest.mark.slow
def test_a_fit_is_resumed_tested_and_predicts(folder: Path) -> None:
    done(*FIT)
    scores = results("runs/small/v0")["raw"]
    assert scores["test"].keys() == {"map", "map50", "map75"}
    assert {"train/loss_box_reg", "val/map50"} <= set().union(*metrics("runs/small/v0"))

    # a run that continues ends with the bits of one that was not stopped
    done(*FIT, "--trainer.max_epochs=1", "--trainer.callbacks=[]")
    half = "runs/small/v1/checkpoints/last.ckpt"
    done(*FIT, "--trainer.callbacks=[]", f"--ckpt_path={half}")
    done(*FIT, "--trainer.callbacks=[]")
    resumed, whole = (checkpoint(f"runs/small/v{i}/checkpoints/last.ckpt")["state_dict"] for i in (2, 3))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    path = "runs/small/v0/checkpoints/best.ckpt"
    assert "map50" in done("test", f"--ckpt_path={path}", "--trainer.limit_test_batches=2").out

    for i, scene in enumerate(DigitScenes("test")[i][0] for i in range(3)):
        Path("images").mkdir(exist_ok=True)
        scene.resize((64 + 16 * i, 64)).save(f"images/{i}.png")
    outcome = done("predict", f"--ckpt_path={path}", "--images=images", "--output=found.csv", "--trainer.logger=false")
    with open("found.csv", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    assert header == ["file", "label", "score", "x0", "y0", "x1", "y1", "error"]
    assert f"{len(rows)} objects in 3 images written to found.csv" in outcome.log
    module = Detector.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    assert module.class_names == [str(digit) for digit in range(10)]
    data = DigitDetection()
    for i in range(3):
        with torch.no_grad():
            [found] = module([data.eval_transform(Image.open(f"images/{i}.png"))])
        mine = [row for row in rows if row[0] == f"images/{i}.png"]
        assert [row[1] for row in mine] == [str(label - 1) for label in found["labels"].tolist()]
        boxes = np.array([row[3:7] for row in mine], dtype=float).reshape(-1, 4)
        np.testing.assert_allclose(boxes, found["boxes"].numpy(), atol=0.02)


def test_average_of_a_detector_estimates_batchnorm(folder: Path) -> None:
    done(*FIT, "--trainer.max_epochs=1")
    best, last = (f"runs/small/v0/checkpoints/{name}.ckpt" for name in ("best", "last"))
    done("average", best, last, "-o", "soup.ckpt", "--config=detect_digits", "--num-samples=16")
    soup = checkpoint("soup.ckpt")["state_dict"]
    mean = "model.backbone.body.net.bn1.running_mean"
    assert not torch.equal(soup[mean], checkpoint(last)["state_dict"][mean])
    assert len(Detector.load_from_checkpoint("soup.ckpt", weights_only=True).eval()([torch.zeros(1, 64, 64)])) == 1
    outcome = cli("resolution", "--ckpt", last, "--sizes", "32")
    assert "is of a Detector, and this is for classifiers of whole images" in outcome.err, outcome


def test_the_preview_draws_boxes(folder: Path) -> None:
    data = DigitDetection(scale=(1.0, 1.0))
    images, targets = next(iter(data.val_dataloader()))
    large = torch.nn.functional.pad(images[0], (0, 30))
    images, targets = [*images[:3], large], [*targets[:3], targets[0]]
    found = preview_of((images, targets), data, 4)
    assert found.images.shape == (4, 64, 94, 3)
    for picture, target in zip(found.images, targets, strict=True):
        edges = (picture == np.array(BOX, np.uint8)).all(2)
        rectangles = np.zeros_like(edges)
        for x0, y0, x1, y1 in target["boxes"].int().tolist():
            rectangles[[y0, y1 - 1], x0:x1] = rectangles[y0:y1, x0] = rectangles[y0:y1, x1 - 1] = True
        assert np.array_equal(edges, rectangles)
    assert found.titles()[0].split(", ") == [str(digit - 1) for digit in dict.fromkeys(targets[0]["labels"].tolist())]


def test_bad_flags_of_the_command_line(folder: Path) -> None:
    for words, message in (
        (("--model.model=yolo",), "yolo"),
        (("--model.beta=-1",), "beta=-1.0"),
        (("--model.num_classes=3",), "num_classes=3 disagrees with the data, which has 10"),
        (("--trainer.callbacks+=LabelSmoothing",), "LabelSmoothing works on a label of each image, or of each pixel"),
    ):
        outcome = cli(*FIT, *words)
        assert outcome.code != 0
        assert message in outcome.err.replace("\n", " "), outcome
