"""Calibrate a network: find the layer that scales its logits, fit the scaling, and check the arg max."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_tricks.callbacks.calibration.head import Head, Scaling, heads_of
from lit_tricks.callbacks.calibration.recorder import Recorder
from lit_tricks.callbacks.calibration.scaling import (
    BOUNDS,
    Scores,
    calibration_scores,
    fit_temperature,
    fit_vector_scaling,
    mean_of_views,
)
from lit_tricks.utils.modules import some_of

if TYPE_CHECKING:
    from lit_tricks._compat import Trainer

__all__ = ["Calibration", "calibrate_network", "find_head", "same_outputs", "scaled_logits"]

NUDGES = 8  # other factors near the best one that are tried, to either side
NUDGE = 2.0**-14  # relative distance


@dataclass
class Calibration:
    """The calibration of a network.

    Args:
        head: the layers that are scaled.
        scaling: factors and offsets of the logits.
        before: scores without the scaling.
        after: scores with the scaling, on the same samples.
        samples: number of images, or of pixels.
        changed: number of samples whose most probable class changes.
        outputs: outputs of the network for the images nearest to a tie, before the scaling.
        views: number of views of each image, whose mean is the prediction.
        note: what is unusual, or "".
    """

    head: Head
    scaling: Scaling
    before: Scores
    after: Scores
    samples: int
    changed: int
    outputs: Tensor
    views: int = 1
    note: str = ""

    @property
    def temperatures(self) -> list[float]:
        """Return one temperature, or one per class."""
        return [1 / factor for factor in self.scaling.factors]

    @property
    def mean_temperature(self) -> float:
        """Return the geometric mean of the temperatures."""
        return math.exp(sum(map(math.log, self.temperatures)) / len(self.temperatures))

    def plain(self) -> dict[str, Any]:
        """Return the content in plain values, for a checkpoint or a JSON file."""
        return {
            "temperatures": self.temperatures,
            "offsets": list(self.scaling.offsets),
            "layers": self.head.names,
            "is_buffer": self.head.is_buffer,
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "samples": self.samples,
            "changed": self.changed,
            "views": self.views,
            "note": self.note,
        }


def gathered(recorder: Recorder, trainer: Trainer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logits (N, K), labels (N,) and logits of views (V, N, K) of all processes, in their order."""
    own = [torch.cat(recorder.logits), torch.cat(recorder.labels)]
    if recorder.views:
        own.append(torch.cat(recorder.views, 1).transpose(0, 1))
    found = own
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, [each.numpy() for each in own])
        found = [torch.cat([torch.from_numpy(part[i]) for part in parts]) for i in range(len(own))]
    return found[0], found[1], found[2].transpose(0, 1) if len(found) > 2 else None


def scaled_logits(recorder: Recorder, trainer: Trainer, head: Head) -> tuple[Tensor, Tensor]:
    """Return the logits that a head scales, (N, K), or (V, N, K) if predictions are means over views; and labels (N,).

    Test-time augmentation averages probabilities after the scaling, unless the head follows the mean.

    Raises:
        RuntimeError: if the module changes the logits after the mean.
    """
    logits, labels, views = gathered(recorder, trainer)
    layer = getattr(recorder.averaging, "layer", None) or ""
    if views is None or not any(name == layer or name.startswith(f"{layer}." if layer else "") for name in head.names):
        return logits, labels
    expected, found = mean_of_views(views.double()), logits.double().log_softmax(1)
    if bool(((expected - found).abs() > 0.05 * (1 + expected.abs())).any()):
        raise RuntimeError(
            f"{recorder.who}: {type(recorder.pl_module).__name__} changes the logits after the mean over views of "
            f"{layer or 'forward'}. Let TestTimeAugment average the outputs of the whole network, without `layer`."
        )
    return views, labels


def find_head(recorder: Recorder, trainer: Trainer, classifier: str | None, kind: str) -> Head:
    """Return the layers whose scaling scales the logits, and changes no other output.

    The weights of each candidate are multiplied by powers of two, which is exact, and the network runs again on some
    images. The new logits must be the scaled logits.

    Args:
        recorder: outputs of a validation.
        trainer: the Trainer, whose processes agree on the layers.
        classifier: name of the layer, if known.
        kind: "temperature" or "vector".

    Raises:
        RuntimeError: if no layer does.
    """
    module, name = recorder.pl_module, type(recorder.pl_module).__name__
    if kind == "vector" and recorder.are_probabilities:
        raise RuntimeError(
            f"{recorder.who} scales each logit by another factor, and {name} outputs probabilities. Fit a "
            "temperature, or let `forward` return logits."
        )
    classes = recorder.logits[0].size(1)
    factors = (0.5,) if kind == "temperature" else tuple(2.0 ** (i % 3 - 1) for i in range(classes))
    offsets = tuple(float(i % 2) for i in range(classes))
    tried: list[str] = []
    for head in heads_of(module, classifier, classes):
        like = head.like
        logits = recorder.logs(recorder.rerun(like))
        # what follows the layer, such as a factor on its output, would also change offsets
        probe = Scaling(factors, offsets if kind == "vector" and head.has_bias else ())
        with head.scaled(probe):
            scaled = recorder.logs(recorder.rerun(like))
        expected = probe.applied(logits)
        if kind == "temperature":  # also of log-probabilities
            scaled, expected = scaled.double().log_softmax(1), expected.log_softmax(1)
        rounding = torch.finfo(like.dtype)
        most = max(float(logits.abs().amax()), float(max(probe.offsets, default=0)))
        # powers of two are exact, so weights of 16 bits round as little as the outputs themselves
        precision = rounding.eps * (64 * max(1.0, most) if rounding.bits >= 32 else 4 * most)
        fits = bool(((scaled - expected).abs().amax() <= precision).item())
        if trainer.strategy.reduce_boolean_decision(fits):
            return head
        tried.append(", ".join(head.names))
    what = f"not by {some_of(tried)}" if tried else f"as no linear layer or convolution has {classes} outputs"
    other = " Or fit one temperature." if kind == "vector" else ""
    named = "" if classifier is None else f"classifier={classifier!r}: "
    raise RuntimeError(
        f"{recorder.who}: {named}the logits of {name} are not scaled by the weights of one layer, {what}. Name the "
        'layer that gives them, as classifier="model.fc"; or pass the logits through lit_tricks.models.LogitScaling() '
        f"in `forward`. It can then be calibrated, and old checkpoints still load.{other}"
    )


def calibrate_network(recorder: Recorder, trainer: Trainer, classifier: str | None, kind: str) -> Calibration:
    """Fit the scaling of a network to the recorded images of all processes.

    If the recorded predictions are means over views of an image, the temperature maximizes the likelihood of the mean,
    as a function of the temperature in each view.

    A temperature is accepted only if the scaled weights leave the most probable class of the images nearest to a tie as
    it is. Otherwise temperatures next to it are tried, and then the nearest power of two, which scales without
    rounding. For weights of 16 bits it is always a power of two.

    Args:
        recorder: outputs of a validation.
        trainer: the Trainer.
        classifier: name of the layer that gives the logits, if known.
        kind: "temperature" or "vector".

    Raises:
        RuntimeError: if no layer scales the logits.
        ValueError: if the data fits no scaling.
    """
    logits, labels, _ = gathered(recorder, trainer)
    if not bool(logits.isfinite().all()):
        raise ValueError("the logits are not all finite, so no temperature fits them.")
    if not len(labels):
        raise ValueError("no image has a label of a class.")
    head = find_head(recorder, trainer, classifier, kind)
    like = head.like
    if int(labels.min()) == int(labels.max()):
        raise ValueError(f"all {len(labels)} samples have the class {int(labels[0])}. A fit needs more classes.")
    outputs = recorder.rerun(like)
    logits, labels = scaled_logits(recorder, trainer, head)
    note = ""
    if kind == "vector":
        temperatures, offsets = fit_vector_scaling(logits, labels, head.has_bias)
        scaling = Scaling.of(temperatures.tolist(), offsets.tolist() if head.has_bias else ())
        note = "" if head.has_bias else "no offsets, as the layer has no bias"
    else:
        temperature = fit_temperature(logits, labels)
        if temperature in BOUNDS:
            note = f"temperature {temperature:g} is an end of its range, and the best one lies beyond it"
        factor = _exact_factor(head, recorder, trainer, 1 / temperature, outputs, logits, labels)
        scaling = Scaling((factor,))
        if abs(factor * temperature - 1) > 0.01:
            note = f"temperature {1 / factor:g}, a power of two, instead of {temperature:.4g}, which rounds the weights"
    before, after = Scaling((1.0,)).predicted(logits), scaling.predicted(logits)
    return Calibration(
        head,
        scaling,
        calibration_scores(before, labels),
        calibration_scores(after, labels),
        len(labels),
        int((after.argmax(1) != before.argmax(1)).sum()),
        outputs,
        len(logits) if logits.dim() == 3 else 1,
        note,
    )


def _exact_factor(
    head: Head, recorder: Recorder, trainer: Trainer, best: float, outputs: Tensor, logits: Tensor, labels: Tensor
) -> float:
    """Return the factor next to the best one that leaves the arg max of the recorded images as it is.

    Pixels have ties without number, so a dense target takes the factor with the fewest changes.
    """
    below = 2.0 ** math.floor(math.log2(best))
    powers = {
        factor: calibration_scores(Scaling((factor,)).predicted(logits), labels).nll for factor in (below, 2 * below)
    }
    power = min(powers, key=lambda factor: powers[factor])
    if head.is_half:
        return power
    like, classes = head.like, outputs.argmax(1)
    changes: dict[float, int] = {}
    for i in sorted(range(-NUDGES, NUDGES + 1), key=abs):
        factor = best * (1 + i * NUDGE)
        with head.scaled(Scaling((factor,))):
            changed = (recorder.rerun(like).argmax(1) != classes).sum()
        changes[factor] = int(trainer.strategy.reduce(changed.float(), reduce_op="sum"))
        if not changes[factor]:
            return factor
    return power if outputs.dim() == 2 else min(changes, key=lambda factor: changes[factor])


def same_outputs(calibration: Calibration, recorder: Recorder, trainer: Trainer) -> bool:
    """Return whether the network still is the calibrated network, by its outputs for some images."""
    now = recorder.rerun(calibration.head.like)
    before = calibration.outputs
    scale = float(before.float().abs().amax().clamp_min(1))
    same = bool(((now - before).abs().amax() <= 1e-3 * scale).item())
    return bool(trainer.strategy.broadcast(same))  # the first process has the statistics that are saved
