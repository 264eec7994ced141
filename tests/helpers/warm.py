"""Start Python processes in a tenth of a second: each is a fork of a server that has imported torch and Lightning.

A new interpreter takes seconds for these imports. A platform without fork starts a new interpreter.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["PRELOAD", "Process", "popen", "run", "server", "start"]

PRELOAD = [
    "pytest",  # a child imports the main module of its parent
    "lightning.pytorch.cli",
    "lit_tricks.cli.app",
    "lit_tricks.data",
    "matplotlib.pyplot",
    "pytorch_lightning",
    "sklearn.datasets",
    "timm",
    "torch.distributed.fsdp",
    "torchvision.transforms.v2",
]


def server() -> ForkServerContext:
    """Return the context of the server, which is running. Its processes compute with one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()
    return context


class Process:
    """A fork of the server, with the part of the interface of ``subprocess.Popen`` that tests need."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    words: Sequence[str], out: Path, err: Path | None = None, env: Mapping[str, str] | None = None
) -> Process | subprocess.Popen[bytes]:
    """Start ``python WORDS`` in its own session, in the working directory of this process.

    Args:
        words: arguments of the interpreter: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.
        out: file to which the standard output is appended.
        err: file to which the standard error is appended, ``out`` by default.
        env: the environment, by default the one of this process.
    """
    env, err = dict(os.environ if env is None else env), out if err is None else err
    if not hasattr(os, "fork"):
        with out.open("ab") as output, err.open("ab") as errors:
            command = [sys.executable, *words]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=env)
    process = server().Process(target=_child, args=(list(words), env, os.getcwd(), out.resolve(), err.resolve()))
    process.start()
    return Process(process)


def run(
    words: Sequence[str], folder: Path, env: Mapping[str, str] | None = None, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` to its end, with its output in two files of the folder, ``stdout`` and ``stderr``."""
    out, err = folder / "stdout", folder / "stderr"
    for file in (out, err):
        file.write_bytes(b"")
    process = start(words, out, err, env)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(list(words), code, out.read_text(), err.read_text())


def popen(command: Sequence[str], stdout: Any, env: Mapping[str, str], **kwargs: Any) -> Any:
    """Stand in for ``subprocess.Popen`` where the library starts Python with its output in a file."""
    assert command[0] == sys.executable
    return start(command[1:], Path(stdout.name), env=env)


def _child(words: list[str], env: dict[str, str], folder: str, out: Path, err: Path) -> None:
    """Become ``python WORDS``."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, path in enumerate((Path(os.devnull), out, err)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]  # its temporary folder would be shared with other forks, and go with the first
    try:
        _interpret(words)
    finally:
        atexit._run_exitfuncs()  # type: ignore[attr-defined]  # a fork ends without them


def _interpret(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [os.getcwd()]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[:0] = words, [str(Path(first).parent)]
        runpy.run_path(first, run_name="__main__")
