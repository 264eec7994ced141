"""Weights that enter through ``weights=``: names of classes are compared, and a head for other classes starts anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_tricks import Classifier, Detector, Segmenter
from lit_tricks.models import load_weights

SMALL: dict[str, Any] = {"depth": 18, "width": 1 / 32, "small_input": True}
ANIMALS = ["ant", "bee", "cat"]
RENAMED = ["bee", "cat", "wasp"]
TURNED = ["bee", "ant", "cat"]
MORE = ["ant", "bee", "cat", "dog"]


def classifier(names: list[str] | None, count: int = 3, **arguments: Any) -> Classifier:
    return Classifier("resnet", count, SMALL, class_names=names, input_size=(1, 8, 8), **arguments)


def segmenter(names: list[str] | None, count: int = 3, **arguments: Any) -> Segmenter:
    return Segmenter("resnet", count, SMALL, aux_weight=0.5, class_names=names, input_size=(3, 32, 32), **arguments)


def detector(names: list[str] | None, count: int = 3, model: Any = "faster_rcnn", **arguments: Any) -> Detector:
    return Detector(
        model, count, backbone_args=SMALL, channels=8, head_width=8, min_size=32, max_size=64, class_names=names,
        **arguments,
    )  # fmt: skip


def retinanet(names: list[str] | None, count: int = 3, **arguments: Any) -> Detector:
    return detector(names, count, "retinanet", **arguments)


HEADS = {
    classifier: ["fc"],
    segmenter: ["aux.4", "decoder.body.layers.4"],
    detector: ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"],
    retinanet: ["head.classification_head.cls_logits"],
}
each = pytest.mark.parametrize("build", HEADS, ids=lambda build: build.__name__)


def saved(module: Any, path: Path, names: list[str] | None) -> str:
    settings = {**module.hparams, "class_names": names}
    content = {"state_dict": module.state_dict(), "hyper_parameters": settings, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, path)
    return str(path)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


@each
def test_the_same_names_keep_the_head(build: Any, tmp_path: Path) -> None:
    source = build(ANIMALS)
    found = build(ANIMALS, weights=saved(source, tmp_path / "x.ckpt", ANIMALS))
    for key, value in source.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


@each
def test_another_order_is_rejected_with_the_remedy(build: Any, tmp_path: Path) -> None:
    path = saved(build(ANIMALS), tmp_path / "x.ckpt", ANIMALS)
    with pytest.raises(ValueError, match=r"label 0 is 'ant' .*'bee' .*classes=\[\"ant\", \"bee\", \"cat\"\]"):
        build(TURNED, weights=path)


@each
@pytest.mark.parametrize(("names", "only"), [(RENAMED, ["ant", "wasp"]), (MORE, ["dog"]), (["ant", "bee"], ["cat"])])
def test_a_head_for_other_classes_starts_anew_and_the_log_names_them(
    build: Any, names: list[str], only: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(source := build(ANIMALS), tmp_path / "x.ckpt", ANIMALS)
    torch.manual_seed(5)
    fresh = build(names, len(names)).state_dict()
    torch.manual_seed(5)
    with caplog.at_level(logging.INFO, logger="lit_tricks"):
        found = build(names, len(names), weights=path).state_dict()
    heads = {f"model.{head}.{part}" for head in HEADS[build] for part in ("weight", "bias")}
    for key, value in found.items():
        assert torch.equal(value, (fresh if key in heads else source.state_dict())[key]), key
    assert all(name in logged(caplog) for name in only)
    assert all(head in logged(caplog) for head in HEADS[build])


@each
def test_without_names_on_one_side_the_number_decides(build: Any, tmp_path: Path) -> None:
    source = build(None)
    for theirs, ours in ((None, RENAMED), (RENAMED, None)):
        found = build(ours, weights=saved(source, tmp_path / "x.ckpt", theirs)).state_dict()
        assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())


def test_weights_among_the_arguments_of_the_network_are_compared_too(tmp_path: Path) -> None:
    path = saved(classifier(ANIMALS), tmp_path / "x.ckpt", ANIMALS)
    with pytest.raises(ValueError, match="another order"):
        Classifier("resnet", 3, SMALL | {"weights": path}, class_names=TURNED, input_size=(1, 8, 8))
    with pytest.raises(ValueError, match="twice"):
        Classifier("resnet", 3, SMALL | {"weights": path}, path, class_names=ANIMALS, input_size=(1, 8, 8))
    Segmenter("resnet", 3, SMALL | {"weights": saved(segmenter(None), tmp_path / "s.ckpt", None)}, aux_weight=0.5)


@pytest.mark.parametrize("header", [{"label_names": '["bee", "ant", "cat"]'}, {"label_names": "["}, {}, None])
def test_names_in_the_header_of_safetensors(header: Any, tmp_path: Path) -> None:
    source = classifier(None)
    save_file(source.model.state_dict(), tmp_path / "x.safetensors", header)
    if header and header["label_names"] != "[":
        with pytest.raises(ValueError, match="another order"):
            load_weights(source.model, str(tmp_path / "x.safetensors"), ANIMALS)
    else:
        load_weights(source.model, str(tmp_path / "x.safetensors"), ANIMALS)


@pytest.mark.parametrize("names", ["ant", 3, {"ant": 0}, [], None, [["ant"]]])
def test_odd_names_in_a_file_are_no_names(names: Any, tmp_path: Path) -> None:
    path = saved(source := classifier(None), tmp_path / "x.ckpt", names)
    if names == [["ant"]]:  # a list of another length: another number of names
        assert classifier(ANIMALS, weights=path)
    else:
        found = classifier(ANIMALS, weights=path)
        assert torch.equal(found.model.fc.weight, source.model.fc.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [None, [], "x", 3])
def test_a_file_whose_settings_are_not_a_dict_still_gives_its_weights(settings: Any, tmp_path: Path) -> None:
    source = classifier(None)
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": settings}, tmp_path / "x.pth")
    classifier(ANIMALS, weights=str(tmp_path / "x.pth"))


# ---------------------------------------------------------------------------------------------------------------------
# Modules without names, whose data has some


class Data(LightningDataModule):
    def __init__(self, classes: list[str]) -> None:
        super().__init__()
        self.classes = classes

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3), 4)

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a module that was given no names, trained on data that has names."""
    trainer = quiet()
    trainer.fit(classifier(None), datamodule=Data(ANIMALS))
    path = tmp_path_factory.mktemp("trained") / "x.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


def quiet(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0, **arguments,
    )  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*not have.*predict")


@pytest.mark.parametrize("way", ["loaded", "ckpt_path", "resumed", "weights"])
def test_names_of_the_data_are_kept_and_compared(way: str, trained: str) -> None:
    def meet(data: Data) -> None:
        if way == "loaded":
            quiet().test(Classifier.load_from_checkpoint(trained, model="resnet"), datamodule=data, verbose=False)
        elif way == "ckpt_path":
            quiet().validate(classifier(None), datamodule=data, ckpt_path=trained, verbose=False)
        elif way == "resumed":
            trainer = quiet()
            trainer.fit_loop.max_epochs = 2
            trainer.fit(classifier(None), datamodule=data, ckpt_path=trained)
        else:
            classifier(data.classes, weights=trained)

    meet(Data(ANIMALS))
    for classes, word in ((TURNED, "another order"), (RENAMED, "wasp")):
        if way == "weights" and classes == RENAMED:
            continue  # a transfer
        with pytest.raises(ValueError, match=word):
            meet(Data(classes))


def test_a_network_without_known_heads_compares_its_last_layer(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    other = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    torch.save({"state_dict": net.state_dict(), "hyper_parameters": {"class_names": ANIMALS}}, tmp_path / "x.pt")
    before = other[1].weight.detach().clone()
    load_weights(other, str(tmp_path / "x.pt"), RENAMED)
    assert torch.equal(other[1].weight, before)
    load_weights(other, str(tmp_path / "x.pt"))
    assert torch.equal(other[1].weight, net[1].weight)
