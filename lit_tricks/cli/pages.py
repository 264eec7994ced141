"""The layout of help: a page of 80 columns with a usage, a description, and options in groups."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["Option", "page"]

WIDTH = 80
LEFT = 30  # columns of the flags


@dataclass(frozen=True)
class Option:
    """An option as it is on a page of help.

    Args:
        flag: with its value, such as "--out DIR"; or the name of a positional argument.
        text: what it is for.
    """

    flag: str
    text: str


def page(usage: str, description: str, groups: Mapping[str, Iterable[Option]], closing: str = "") -> str:
    """Return a page of help.

    Args:
        usage: the command with its arguments.
        description: paragraphs, separated by empty lines. Indented lines stay as they are.
        groups: options by the heading of their group. Empty groups are left out.
        closing: paragraphs at the end.
    """
    lines = [_filled(f"usage: {usage}", indent=" " * len("usage: ")), "", *_paragraphs(description)]
    for heading, options in groups.items():
        rows = [line for option in options for line in _rows(option)]
        lines += ["", f"{heading}:", *rows] if rows else []
    if closing:
        lines += ["", *_paragraphs(closing)]
    return "\n".join(lines)


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.strip("\n").split("\n\n")):
        if number:
            yield ""
        yield paragraph if paragraph.startswith("  ") else _filled(paragraph)


def _rows(option: Option) -> Iterator[str]:
    lines = textwrap.wrap(option.text, WIDTH - LEFT, break_on_hyphens=False)
    flag = f"  {option.flag}"
    if lines and len(flag) <= LEFT - 2:
        flag = f"{flag:{LEFT}}{lines.pop(0)}"
    yield from (flag, *(" " * LEFT + line for line in lines))


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
