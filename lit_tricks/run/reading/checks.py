"""Check the content of the files of a run. A file with other content is damaged."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["check_config", "check_results", "check_tricks", "numbered"]

CLOCKS = ("host", "device")
WEIGHTS = ("raw", "averaged")
MOST_CLASSES = 100_000  # that are numbered where names are missing


def check_results(content: dict[str, Any]) -> None:
    """Raise ValueError unless ``results.json`` holds metrics, times and sizes as ``report_fit`` writes them."""
    _require(content, "best_checkpoint", str | None)
    _require(content, "epoch", int | None)
    for key in ("seconds", "cpu_seconds", "peak_memory"):
        _require_number(content.get(key), key)
    for kind in WEIGHTS:
        for split, metrics in _dict(content.get(kind) or {}, kind).items():
            for name, value in _dict(metrics, f"{kind}/{split}").items():
                _require_number(value, f"{kind}/{split}/{name}", least=-math.inf)
    time = content.get("time")
    if time is not None:
        clock = _dict(time, "time").get("clock")
        if clock not in CLOCKS:
            raise ValueError(f"time/clock={clock!r} is not one of {', '.join(CLOCKS)}")
        for part, seconds in _dict(time.get("seconds"), "time/seconds").items():
            _require_number(seconds, f"time/seconds/{part}", optional=False)


def check_tricks(content: dict[str, Any]) -> None:
    """Raise ValueError unless ``tricks.json`` holds the arguments and the effect of each trick."""
    for name, trick in content.items():
        _dict(_dict(trick, name).get("arguments"), f"{name}/arguments")
        _require(trick, "effect", str | None)


def check_config(content: dict[str, Any]) -> None:
    """Raise ValueError unless ``config.yaml`` holds settings of a model, data and a Trainer."""
    for part in ("model", "data"):
        settings = _dict(content.get(part) or {}, part)
        _require(settings, "class_path", str | None)
        arguments = _dict(settings.get("init_args") or {}, f"{part}/init_args")
        optimizer = arguments.get("optimizer")
        if isinstance(optimizer, dict):
            _dict(optimizer.get("init_args") or {}, f"{part}/optimizer")
    _dict(content.get("trainer") or {}, "trainer")
    _require(content, "ckpt_path", str | None)


def _dict(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is not an object with names, but of type {type(value).__name__}")
    return value


def _require(content: dict[str, Any], name: str, kind: Any) -> None:
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.60} is of type {type(value).__name__}")


def _require_number(value: Any, name: str, least: float = 0, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name}={value!r:.60} is not a number of at least {least:g}")


def numbered(names: list[str], known: int) -> list[str]:
    """Return names for this many classes: the given ones, or numbers.

    Raises:
        ValueError: if there are more classes than names, and too many to number.
    """
    if len(names) >= known:
        return names
    if known > MOST_CLASSES:
        raise ValueError(f"there are {known:,} classes, and {len(names)} names")
    return [str(number) for number in range(known)]
