"""A network as a folder of timm's: what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds it from.

One caveat: timm builds what its own functions have arguments for. Whether that is the network is seen by building it.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from lit_tricks.commands.exporting.file_formats import write_safetensors
from lit_tricks.commands.exporting.network import Exported
from lit_tricks.utils.blame import is_about_input

__all__ = ["FILES", "timm_arguments", "write_timm"]

FILES = ("config.json", "model.safetensors", "README.md")
OTHERS = "choose --format onnx, torch-export or safetensors, which take any network"
POOLS = ("avg", "max", "avgmax")
NORMS = {"group": "groupnorm", "layer": "groupnorm1"}
START = (
    "init",
    "zero_init_last",
    "weights",
    "num_classes",
    "in_chans",
)  # they only affect training, or are stored elsewhere


def write_timm(exported: Exported, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, and check that timm builds the same network from them.

    Raises:
        ValueError: if timm cannot build the network.
    """
    architecture, model_args = timm_arguments(exported.model, exported.model_args)
    network: Any = exported.network
    num_classes = len(exported.label_names)
    plain_stem = isinstance(getattr(network, "conv1", None), torch.nn.Conv2d)  # of our resnet, which timm did not build
    known = getattr(network, "pretrained_cfg", {"first_conv": "conv1" if plain_stem else "conv1.0", "classifier": "fc"})
    kept = {
        key: known[key] for key in ("fixed_input_size", "min_input_size", "first_conv", "classifier") if key in known
    }
    preprocessing = asdict(exported.preprocessing)
    exif = preprocessing.pop("exif")  # timm has no such field
    pretrained_cfg = preprocessing | kept | {"num_classes": num_classes, "pool_size": None}
    if exported.license != "unknown":
        pretrained_cfg["license"] = exported.license
    config = {
        "architecture": architecture, "num_classes": num_classes, "num_features": network.num_features,
        "label_names": exported.label_names, "model_args": model_args, "pretrained_cfg": pretrained_cfg, "exif": exif,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(exported, folder / "model.safetensors")
    try:
        rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        same_keys = rebuilt.state_dict().keys() == network.state_dict().keys()
    except Exception as error:  # timm's networks fail with any type
        if not is_about_input(error):
            raise
        reason = textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
        raise ValueError(f"timm cannot build this network ({reason}): {OTHERS}.") from error
    if not same_keys:
        raise ValueError(f"timm builds another network than this {architecture}: {OTHERS}.")
    try:
        exported.check(rebuilt, "timm's network", exact=True)
    except ValueError as error:
        raise ValueError(f"{error} It has no arguments for this one: {OTHERS}.") from None


def timm_arguments(model: Any, model_args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments for a model of this library.

    Args:
        model: name of the model, or its class.
        model_args: arguments of the model.

    Raises:
        ValueError: if timm has no such model; the message lists the reasons.
    """
    if not isinstance(model, str):
        name = model.get("class_path", "an object") if isinstance(model, dict) else "an object"
        raise ValueError(f"timm builds models by name, and the network of this checkpoint is {name}: {OTHERS}.")
    if model == "small_vgg":
        raise ValueError(f"timm has no {model}: {OTHERS}.")
    if model != "resnet":
        return model, model_args
    given: dict[str, Any] = {"depth": 50, "variant": "D", "width": 1.0, "small_input": False} | model_args
    depth, variant, width = given.pop("depth"), given.pop("variant"), given.pop("width")
    deep = variant in "CD"
    missing = []
    if given.pop("small_input"):
        missing.append("small_input: true (a stem that does not shrink the image)")
    if variant == "A" and depth >= 50:
        missing.append("variant: A (strides in the first convolution of a bottleneck)")
    if not deep and width != 1:
        missing.append(f"width: {width} with variant: {variant} (its stem has 64 channels)")
    found: dict[str, Any] = {}
    if variant == "C":
        found |= {"stem_type": "deep", "stem_width": 32}
    if width != 1:
        stem = round(32 * width)
        found |= {"stem_width": stem, "channels": [2 * stem * factor for factor in (1, 2, 4, 8)]}
    if (pool := given.pop("pool", "avg")) in POOLS:
        found |= {} if pool == "avg" else {"global_pool": pool}
    else:
        missing.append(f"pool: {pool}")
    if (norm := given.pop("norm", "batch")) in NORMS:
        found["norm_layer"] = NORMS[norm]
    elif norm != "batch":
        missing.append(f"norm: {norm}")
    for name, default in (("drop_rate", 0), ("drop_path_rate", 0), ("output_stride", 32)):
        if (value := given.pop(name, default)) != default:
            found[name] = value
    missing += [f"{key}: {value}" for key, value in given.items() if key not in START and value not in (None, False)]
    if missing:
        raise ValueError(f"timm's ResNet has no {' and no '.join(missing)}: {OTHERS}.")
    return f"resnet{depth}{'d' if variant == 'D' else ''}", found
