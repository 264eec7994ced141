"""Weights & Biases without a login, and what a run file of it holds."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2


def stranger(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Nobody is logged in here."""
    for name in os.environ:
        if name.startswith("WANDB") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")  # it writes to the terminal past pytest


def records(path: Path) -> list[Any]:
    """Records of a run file: LevelDB's log format, behind seven bytes of wandb's own.

    wandb 0.31 has no reader in Python any more, only a viewer; this one reads the files of all versions.
    """
    content, found, parts = path.read_bytes(), [], b""
    assert content[:4] == b":W&B"
    at = 7
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # padding at the end of a block
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            break  # W&B's process is still writing this record
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def items(updates: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


class Tracked:
    """Return what W&B recorded of the run in a folder."""

    def __init__(self, run: Path) -> None:
        (self.folder,) = run.glob("wandb/*run-*-*")
        (file,) = self.folder.glob("run-*.wandb")
        deadline = time.monotonic() + 30
        while True:  # W&B's process writes the last of it after the run has ended
            self.records = records(file)
            self.exits = [record.exit.exit_code for record in self.records if record.HasField("exit")]
            if self.exits or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        (self.run,) = [record.run for record in self.records if record.HasField("run")]
        self.config = items(self.run.config.update)
        for record in self.records:
            if record.HasField("config"):
                self.config |= items(record.config.update)
        self.history = [items(record.history.item) for record in self.records if record.HasField("history")]
        self.summary: dict[str, Any] = {}
        for record in self.records:
            if record.HasField("summary"):
                self.summary |= items(record.summary.update)
