"""Names of other people's classes, files and metrics as text that no page, spreadsheet or terminal takes for more."""

from __future__ import annotations

import re

from lit_tricks.utils.files import text_cell

__all__ = ["code_block", "code_span", "escape_markdown", "row_cell"]

MARKS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\|`[]$*"}


def escape_markdown(text: str) -> str:
    """Return text on one line that Markdown shows as it is: without links, HTML, tables, code, math and emphasis."""
    return "".join(MARKS.get(character, character) for character in " ".join(text.splitlines()))


def code_span(text: str) -> str:
    """Return text as code within a line of Markdown."""
    text = " ".join(text.splitlines())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def code_block(text: str, language: str) -> list[str]:
    """Return the lines of a code block, with a fence that does not occur in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def row_cell(name: str) -> str:
    """Return the name of a row of an ablation as a cell of a CSV file. A sign before a plain word calls nothing."""
    return name if re.fullmatch(r"[+-] [\w./-]+", name) else text_cell(name)
