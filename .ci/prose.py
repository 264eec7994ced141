"""Check the wording of all tracked text files: a phrase of PHRASES may only become rarer.

``python .ci/prose.py`` fails where a phrase occurs more often than ``.ci/prose.json`` allows, and prints file and line.
``python .ci/prose.py --update`` lowers the stored counts after a rewrite. It never raises them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
COUNTS = Path(__file__).with_suffix(".json")
# The pattern, and what to write instead.
PHRASES = {
    r"can not": "cannot",
    r"in (?:the )?place of": "instead of",
    r"besides?": "also, or: next to",
    r"(?:that|those) of": "the noun itself",
    r"puts? (?:it |them )?back": "restore",
    r"who(?:so)?ever": "a named subject",
    r"whatever": "any",
    r"but for": "except",
    r"alone": "only",
    r"refus\w+": "reject, or: raise an error",
    r"complains?": "raise an error",
    r"(?:go|goes|went|going|gone) on": "continue, or: resume",
    r"lets? go": "replace",
    r"rivals?": "conflicting callback",
    r"says?|said": "log, report or state",
    r"tells?|told": "log, report or pass",
    r"knows?": "has, or: is given",
    r"asks?|asked": "request, or: need",
    r"sees|saw|see that": "check, or: receive",
    r"stands?": "is",
    r"looks? (?:at|into|for)": "check, read or search",
    r"of its own": "its own",
    r"than that": "than the noun itself",
    r"(?:as|so) far as": "if, or: where",
    r"wherever|whichever": "where, or: any",
    r"on each image|for (?:each|every) (?:image|class)": "per image, per class",
    r'"""(?:What|Whether|Of|Those|Which|Where|How|Nothing|None|Say|Tell|Be) .*': "an imperative verb and its object",
}


def occurrences(text: str) -> list[tuple[str, int]]:
    """Return each phrase that occurs in the text, with the number of its line. Stored images are no text."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if len(line) < 2000]
    patterns = {phrase: re.compile(rf"(?<!\w)(?:{phrase})(?!\w)", re.IGNORECASE) for phrase in PHRASES}
    return [
        (phrase, number)
        for phrase, pattern in patterns.items()
        for number, line in lines
        for _ in pattern.finditer(line)
    ]


def tracked() -> dict[str, str]:
    """Return the content of all tracked text files by name, without the files of this check."""
    names = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    texts = {}
    for name in filter(None, names):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".svg", ".jsonl"} and path.parent.name != ".ci":
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def check(texts: dict[str, str], allowed: dict[str, dict[str, int]]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Return one line of text per phrase that became more frequent, and the counts by phrase and file.

    The limit of a phrase is its total, so a sentence can move to another file. The lines are in the files
    that have more than before.
    """
    found: dict[str, dict[str, list[int]]] = {phrase: {} for phrase in PHRASES}
    for name, text in texts.items():
        for phrase, number in occurrences(text):
            found[phrase].setdefault(name, []).append(number)
    messages = []
    for phrase, files in found.items():
        before = Counter(allowed.get(phrase, {}))
        total = sum(len(lines) for lines in files.values())
        if total > before.total():
            new = [f"{name}:{line}" for name, lines in files.items() if len(lines) > before[name] for line in lines]
            messages.append(f"{' '.join(new)}: {phrase!r} ({total}, was {before.total()}). Write: {PHRASES[phrase]}")
    return messages, {phrase: {name: len(lines) for name, lines in files.items()} for phrase, files in found.items()}


def main(arguments: list[str]) -> int:
    messages, counts = check(tracked(), json.loads(COUNTS.read_text(encoding="utf-8")))
    if messages:
        print(*messages, sep="\n", file=sys.stderr)
        return 1
    if arguments == ["--update"]:
        COUNTS.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for phrase, files in sorted(counts.items(), key=lambda item: -sum(item[1].values())):
        print(f"{sum(files.values()):5d} {phrase}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
