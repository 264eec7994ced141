"""The browser that shows pages in tests marked ``browser``."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

__all__ = ["FLAGS", "chromium", "needs_browser"]

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str:
    """Return the path of Chromium.

    Raises:
        FileNotFoundError: without it.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("chromium is not on the PATH: apt-get install chromium")


def needs_browser(test: Any) -> Any:
    """Mark a test, and skip it without Chromium unless ``LIT_TRICKS_BROWSER`` is set."""
    try:
        missing = not chromium()
    except FileNotFoundError:
        missing = not os.environ.get("LIT_TRICKS_BROWSER")
    return pytest.mark.browser(pytest.mark.skipif(missing, reason="chromium is not on the PATH")(test))
