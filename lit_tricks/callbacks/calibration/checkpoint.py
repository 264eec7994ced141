"""Write a calibrated checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_tricks.callbacks.calibration.head import Scaling, scaled_state
from lit_tricks.utils.checkpoint_files import RUN, read_checkpoint, write_checkpoint
from lit_tricks.utils.log import log

__all__ = ["KEY", "RESULT", "calibrated", "describe", "write_calibrated"]

KEY = "temperature_scaling"  # of the fitted temperature in the checkpoints of a run
RESULT = "calibration"  # in a calibrated checkpoint


def describe(found: Mapping[str, Any]) -> str:
    """Return temperature and scores in words.

    Args:
        found: the result of ``Calibration.plain``.
    """
    temperatures, (before, after) = found["temperatures"], (found["before"], found["after"])
    what = f"temperature {temperatures[0]:.4g}"
    if len(temperatures) > 1:
        what = f"temperatures {min(temperatures):.4g} to {max(temperatures):.4g}"
    if len(temperatures) > 1 or found["changed"]:
        what += f", {found['changed']} of {found['samples']} predictions changed"
    if found.get("views", 1) > 1:
        what += f", for the mean over {found['views']} views"
    scores = ", ".join(
        f"{name} {before[key]:.4f} -> {after[key]:.4f}"
        for name, key in {"ECE": "ece", "NLL": "nll", "Brier": "brier"}.items()
    )
    return f"{what}: {scores}" + (f" ({found['note']})" if found["note"] else "")


def calibrated(content: Mapping[str, Any], found: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Return the content of a checkpoint with scaled weights, and without the state of its run.

    The state of a run has the weights of training, which an average or optimizer continues from. They are not scaled,
    so a run continues from the checkpoint that was calibrated.

    Args:
        content: content of the checkpoint. Its ``state_dict`` has the weights that are tested, such as an average.
        found: the result of ``Calibration.plain``.
        source: path of the checkpoint.

    Raises:
        KeyError: if the checkpoint lacks the layers.
    """
    states = content.get("callbacks", {}).values()
    is_average = any(isinstance(state, Mapping) and state.get("raw") for state in states)
    scaling = Scaling.of(found["temperatures"], found["offsets"])
    old: dict[str, Tensor] = content["state_dict"]
    is_buffer = found.get("is_buffer", False)
    state = scaled_state(old, found["layers"], scaling, is_buffer)
    buffers = {name: value for name, value in state.items() if is_buffer and value is not old.get(name)}
    kept = {key: value for key, value in content.items() if key not in (*RUN, KEY)}
    weights = "averaged" if is_average else "raw"
    result = {**found, "calibrated_from": str(source), "weights": weights, "buffers": buffers}
    return kept | {"state_dict": state, RESULT: result}


def write_calibrated(source: Path, path: Path) -> str:
    """Write a checkpoint of a run again, calibrated by the temperature in it.

    Returns:
        Temperature and scores, in words; "" if the checkpoint has no temperature.
    """
    content = read_checkpoint(source)
    found = content.get(KEY)
    has_layers = isinstance(found, Mapping) and (
        found.get("is_buffer") or all(f"{name}.weight" in content["state_dict"] for name in found["layers"])
    )
    if not isinstance(found, Mapping) or not has_layers:
        log.warning(
            "TemperatureScaling: %s was not saved right after a validation with it, and stays as it is. Use "
            "`lit-tricks calibrate --ckpt %s -o calibrated.ckpt`", source, source,
        )  # fmt: skip
        return ""
    write_checkpoint(calibrated(content, found, source), path)
    return describe(found)
