"""Load weights into a model: a file of timm or of this library, or a name that timm downloads.

One caveat: variants A and B of the ResNet (https://arxiv.org/abs/1812.01187) have the same keys and shapes, so this
module cannot distinguish them.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import adapt_input_conv

from lit_tricks.utils.arguments import path as as_path
from lit_tricks.utils.arguments import texts
from lit_tricks.utils.blame import is_about_input
from lit_tricks.utils.checkpoint_files import check_archive
from lit_tricks.utils.class_names import apart, names_of, require_same_classes
from lit_tricks.utils.files import open_regular
from lit_tricks.utils.finite import first_not_finite, not_finite
from lit_tricks.utils.log import log

__all__ = ["load_weights"]


# The averaged weights come first: they were saved because they are better.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
_FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".safetensors", ".tar", ".bin")


def load_weights(
    model: nn.Module, weights: str, class_names: Sequence[str] | None = None, classifiers: Sequence[str] = ()
) -> None:
    """Copy weights into a model, all of them or none.

    Two differences are bridged, each with a line in the logger ``lit_tricks``. If the classes differ in number or name,
    all classifiers keep their initialization. If the images have another number of channels than the 3 of the weights,
    timm's rule adapts the first convolution (sum for 1 channel, else repeat and scale).

    Args:
        model: the network to fill, in place.
        weights: path of a ``.pth``, ``.pt`` or ``.safetensors`` file as timm writes them, or of a Lightning ``.ckpt``
            whose module holds the network as ``self.model``; or a name with pretrained weights in timm, as "resnet50"
            or "resnet50d.ra2_in1k", which is downloaded and cached. Averaged weights are preferred where a file
            holds them. Files are read with ``weights_only=True``: nothing in them is executed.
        class_names: names of the model's classes by label. They are compared with the names in the file, if it has
            names: a checkpoint of this package, or its export to safetensors. None compares the number only.
        classifiers: names of the layers with outputs per class. By default those that timm lists, and the last one.

    Raises:
        FileNotFoundError: if ``weights`` looks like a file and none is there.
        ValueError: if it is neither a file nor a name known to timm; the nearest names are given. Or if the file has
            the same classes in another order.
        ConnectionError: if the download fails.
        RuntimeError: if the file cannot be read, or belongs to another architecture; the model is left as it was.

    Example:
        ``load_weights(resnet(50, "D", num_classes=10), "resnet50d.ra2_in1k")``
    """
    path = Path(as_path("load_weights", "weights", weights, "Give a file, or a name of timm.")).expanduser()
    class_names = texts("load_weights", "class_names", class_names, "Give one name per class.", "unknown names")
    theirs: list[str] | None = None
    if path.is_file():
        state, theirs = _read(path)
    elif path.suffix in _FILE_ENDINGS or len(path.parts) > 1:
        raise FileNotFoundError(f"weights={weights!r}: no such file (seen from {Path.cwd()}); correct the path")
    elif timm.is_model_pretrained(weights):
        state = _download(weights)
    else:
        known = nearest(weights, timm.list_pretrained())
        raise ValueError(f"weights={weights!r} is neither a file nor a name with pretrained weights in timm{known}")

    if name := first_not_finite(state):
        raise RuntimeError(not_finite(name, f"weights={weights!r}"))
    ours = names_of(class_names)
    if ours and theirs and sorted(ours) == sorted(theirs):
        require_same_classes(theirs, ours, f"weights={weights!r}", "the model")
    own = model.state_dict()
    state = _strip_prefixes(state, own)
    # The model is not touched before all of it is known to fit.
    _bridge_in_chans(model, state, weights)
    heads = classifiers or _classifiers(model, own)
    difference = apart(theirs, ours, "the weights", "the model") if ours and theirs else ""
    _bridge_classes(heads, own, state, weights, difference)
    _require_same(own, state, weights)
    model.load_state_dict(state)


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the known names that look most like ``name``, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """Return the tensors of a file, and the names of the classes if the file has them."""
    try:
        check_archive(path)
    except ValueError as error:
        raise RuntimeError(f"weights={str(path)!r}: {error}") from error
    names: list[str] | None = None
    try:
        if path.suffix == ".safetensors":
            open_regular(path).close()
            with safe_open(path, "pt") as file:
                names = _label_names(file.metadata())
            return load_file(path), names
        # timm's training script stores its arguments, a plain Namespace, with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors have no error of their own for a damaged file
        if isinstance(error, FileNotFoundError | PermissionError) or not is_about_input(error):
            raise
        raise RuntimeError(
            f"{path} is no readable checkpoint of tensors ({type(error).__name__}): copy it again. If it is whole, and "
            "holds pickled objects that you trust, save only its state_dict with torch.save and load that file"
        ) from error
    content = content if isinstance(content, dict) else {}
    nested = [content[key] for key in _NESTED if isinstance(content.get(key), dict)]
    state = {key: value for key, value in (nested or [content])[0].items() if isinstance(value, torch.Tensor)}
    if not state:
        raise RuntimeError(
            f"{path} holds no tensors at its top nor under {', '.join(_NESTED)}: save model.state_dict()"
        )
    return state, names_of(content)


def _label_names(metadata: dict[str, str] | None) -> list[str] | None:
    """Return the names of the classes that the export writes into the header of safetensors."""
    try:
        return names_of(json.loads((metadata or {}).get("label_names", "null")))
    except (ValueError, RecursionError):  # the header is of another program
        return None


def _download(name: str) -> dict[str, torch.Tensor]:
    """Return weights by name, through timm's own model, which downloads and renames them."""
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except OSError as error:
        raise ConnectionError(
            f"weights={name!r}: the download failed: {error} Fetch the file where there is a network and give its path"
        ) from error


def _strip_prefixes(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove what torch.compile, DDP and a LightningModule put before the keys of the network itself."""
    state = {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}
    if any(key in own for key in state):
        return state
    inner = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    return inner or state


def _bridge_in_chans(model: nn.Module, state: dict[str, torch.Tensor], weights: str) -> None:
    conv = next((item for item in model.named_modules() if isinstance(item[1], nn.Conv2d)), None)
    if conv is None:
        return
    key, want = f"{conv[0]}.weight", _shape(conv[1].weight)
    found = _shape(state.get(key))
    if found != want and found == (want[0], 3, *want[2:]):
        state[key] = adapt_input_conv(want[1], state[key])
        log.info("weights=%r: %s adapted from 3 to %d input channels", weights, key, want[1])


def _bridge_classes(
    heads: Iterable[str],
    own: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    weights: str,
    difference: str,
) -> None:
    for layer in dict.fromkeys(heads):
        want, found = (_shape(tensors.get(f"{layer}.weight")) for tensors in (own, state))
        if len(want) < 2 or len(found) < 2 or want[1:] != found[1:]:  # fewer than two dimensions are a norm
            continue
        if want[0] != found[0] or difference:
            state.update({key: own[key] for key in (f"{layer}.weight", f"{layer}.bias") if key in own and key in state})
            numbers = f"for {found[0]} classes there and {want[0]} here" if want[0] != found[0] else "for other classes"
            text = "weights=%r: classifier %r keeps its initialization, %s%s"
            log.info(text, weights, layer, numbers, f" ({difference})" if difference else "")


def _classifiers(model: nn.Module, own: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the layers that give logits: timm's classifiers, and the last layer."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = [known] if isinstance(known, str) else list(known)
    get_classifier = getattr(model, "get_classifier", None)
    heads = get_classifier() if callable(get_classifier) else ()
    heads = heads if isinstance(heads, tuple | list | nn.ModuleList) else (heads,)
    names += [name for name, part in model.named_modules() if any(part is head for head in heads)]
    return [*names, list(own)[-1].rpartition(".")[0]]


def _require_same(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor], weights: str) -> None:
    for key in [*own, *state]:
        if (key in state) != (key in own) and key.endswith("num_batches_tracked"):
            continue  # checkpoints from before torch 0.4.1 lack it, and frozen batch norm has no use for it
        want, found = own.get(key), state.get(key)
        if want is None or found is None or want.shape != found.shape:
            raise RuntimeError(
                f"weights={weights!r} is a checkpoint of another architecture: {key!r} is {_say(found)} in the "
                f"checkpoint and {_say(want)} in the model. Build the model with the arguments that the checkpoint was "
                "made with (name, depth, variant, width, ...), or choose other weights"
            )


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _say(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {_shape(tensor)}"
