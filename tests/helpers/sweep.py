"""Commands of a W&B agent for a sweep: the agent's own code makes the commands, the server's part is a product."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import yaml
from wandb import wandb_agent

__all__ = ["agent_commands"]


def agent_commands(sweep: Path) -> list[tuple[list[str], dict[str, str], dict[str, Any]]]:
    """Command, environment and parameters of each run of a grid."""
    config = yaml.safe_load(sweep.read_text())
    assert config["method"] == "grid"
    assert config.keys() <= {"name", "description", "project", "program", "method", "metric", "command", "parameters"}
    made = []
    names = list(config["parameters"])
    for number, values in enumerate(itertools.product(*(kind["values"] for kind in config["parameters"].values()))):
        parameters = dict(zip(names, values, strict=True))
        job = {"run_id": f"agent{number}", "program": config["program"]}
        job["args"] = {name: {"value": value} for name, value in parameters.items()}  # type: ignore[assignment]
        agent = SimpleNamespace(
            _in_jupyter=False,
            _sweep_command=list(config["command"]),
            _function=None,
            _forward_signals=False,
            _run_processes={},
        )
        with (
            mock.patch.dict(os.environ, {"WANDB_SWEEP_ID": "sweep0"}),
            mock.patch.object(wandb_agent, "AgentProcess") as process,
        ):
            wandb_agent.Agent._command_run(agent, job)  # type: ignore[arg-type]
            passed = process.call_args.kwargs
        made.append((passed["command"], passed["env"], parameters))
    return made
