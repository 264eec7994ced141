"""Create a model by name: a network of this package, or any timm model."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
import torch.nn as nn

from lit_tricks.models.resnet import require_positive, resnet
from lit_tricks.models.small_vgg import small_vgg
from lit_tricks.models.weights import load_weights, nearest
from lit_tricks.utils.arguments import path, text

__all__ = ["NETWORKS", "create_model"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {"resnet": resnet, "small_vgg": small_vgg}


def create_model(
    name: str, num_classes: int, *, in_chans: int = 3, weights: str | None = None, **model_args: Any
) -> nn.Module:
    """Build a classifier by name, mapping images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

    Args:
        name: "resnet" or "small_vgg" for the functions of this package, or any model of timm without a tag, as
            "inception_v3" and "mobilenetv1_100", the other two of [Bag of Tricks](https://arxiv.org/abs/1812.01187).
        num_classes: number of logits, at least 1.
        in_chans: channels of the images, at least 1.
        weights: file or timm name of weights to start from, see `load_weights`; None starts at random.
        **model_args: further arguments of the model, such as ``depth=50, variant="D"`` or ``drop_path_rate=0.1``.

    Raises:
        ValueError: for an unknown name or argument (the message names the nearest valid one), or a value out of range.
        FileNotFoundError: if ``weights`` is a file that does not exist.
        RuntimeError: if ``weights`` belongs to another architecture.

    Example:
        ``create_model("resnet", 10, depth=18, variant="D", small_input=True)``
    """
    name = text("create_model", "name", name, 'Give "resnet", or a name of timm.')
    weights = path("create_model", "weights", weights, "Give a file, or a name of timm.", "a random start")
    require_positive("create_model", num_classes=num_classes, in_chans=in_chans)
    if name in NETWORKS:
        valid = list(inspect.signature(NETWORKS[name]).parameters)
        for key in model_args:
            if key not in valid:
                known = nearest(key, valid) or f"; it takes {', '.join(valid)}"
                raise ValueError(f"{key!r} is no argument of model {name!r}{known}")
        return NETWORKS[name](num_classes=num_classes, in_chans=in_chans, weights=weights, **model_args)

    if "." in name and timm.is_model(name):
        raise ValueError(f"name={name!r} names weights: use name={name.split('.')[0]!r} with weights={name!r}")
    if not timm.is_model(name):
        known = nearest(name, [*NETWORKS, *timm.list_models()]) or "; timm.list_models() has all of timm's names"
        raise ValueError(f"name={name!r} is neither {', '.join(map(repr, NETWORKS))} nor a model of timm{known}")
    for key in ("pretrained", "checkpoint_path"):
        if key in model_args:
            raise ValueError(f"{key!r} goes past the checks of weights: use weights={name!r} or the path of a file")
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **model_args)
    except TypeError as error:
        # Only the TypeError of a call names an argument. Any other TypeError is a fault inside, and is raised
        # unchanged.
        found = re.search(r"argument '(\w+)'", str(error))
        if found is None or found[1] not in model_args:
            raise
        raise ValueError(f"{found[1]!r} is no argument of model {name!r}: {error}") from error
    if weights is not None:
        load_weights(model, weights)
    return model
