"""Set-up of the client tests: a missing package is a skip, or in CI, which sets LIT_TRICKS_CLIENTS=1, a failure."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("_clients")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and os.environ.get("LIT_TRICKS_CLIENTS") == "1":
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def client_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all fits of a process, since their Trainers are compared, and each names its folder."""
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module", autouse=True)
def _in_an_empty_folder(client_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(client_folder)  # some clients write where they stand
        yield
