"""BibTeX of what a run used, from ``citations.bib``."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

__all__ = ["citations", "link_of"]

FILE = Path(__file__).with_name("citations.bib")


def citations(links: Collection[str] = (), methods: Collection[str] = ()) -> list[str]:
    """Return the entries of the file for links of papers, or for names of models, optimizers and data.

    Args:
        links: links in the first lines of the tricks' docstrings.
        methods: names, such as "resnet", "AdamW", "CIFAR10".

    Returns:
        Entries, each once, in the order of the file.
    """
    entries = re.findall(r"^@.*?^\}$", FILE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = []
    for entry in entries:
        of = re.findall(r"^  methods = \{(.*)\}$", entry, re.MULTILINE)
        names = {name.strip() for name in of[0].split(",")} if of else set()
        [url] = re.findall(r"^  url = \{(.*)\},?$", entry, re.MULTILINE)
        if url in links or not names.isdisjoint(methods):
            found.append(re.sub(r",\n  methods = .*", "", entry))
    return found


def link_of(docstring: str | None) -> str:
    """Return the link in the first line of a docstring, to the paper of what it describes; "" without any."""
    first = (docstring or "").strip().partition("\n")[0]
    match = re.search(r"\]\((http\S+?)\)\)?\.?$", first)
    return match[1] if match else ""
