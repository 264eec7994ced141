"""Sphinx extension: a page per trick and their overview, made from docstrings, contract, benchmark results and figures.

A trick without figure, entry in ``tricks.yaml``, measured effect and cost, or BibTeX fails the build with its name. An effect
that no benchmark measures needs a reason in ``not_measured``.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from effects import RESULTS, effect, entries
from helpers.tricks import CASES, TRICKS
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from trick_figures import FIGURES, Draw

from lit_tricks import callbacks
from lit_tricks.run.report.citations import citations, link_of
from lit_tricks.run.report.style import DARK, LIGHT, Theme, draw

REPOSITORY = "https://github.com/lit-tricks/lit-tricks"
GOALS = ("accuracy", "speed", "calibration", "small data", "imbalance", "sparsity", "reproduction")
BUDGETS = ("short", "medium", "long")
# The cases of the contract by subject, with the names that a page shows.
SUBJECTS = {
    "batch": {"list": "list", "tuple": "tuple", "dict": "dict", "NamedTuple": "NamedTuple"},
    "loss": {"functional loss": "`F.cross_entropy`", "criterion": "`nn.CrossEntropyLoss`"},
    "optimization": {"accumulation": "gradient accumulation", "manual optimization": "manual optimization"},
    "precision": {"bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"},
    "compilation": {"torch.compile": "`torch.compile`"},
    "several devices": {"DDP": "DDP", "FSDP2": "FSDP2"},
    "checkpoints": {"resume": "resume, bitwise equal to an uninterrupted run"},
}
SECTION = re.compile(r"^(Args|Raises|Example|Returns|References):$", re.MULTILINE)


def card_of(name: str) -> dict[str, Any]:
    """Return the parts of a trick's docstring: claim, link, body, advice, example."""
    text = inspect.getdoc(getattr(callbacks, name)) or ""
    prose, *sections = SECTION.split(text)
    parts = dict(zip(sections[::2], sections[1::2], strict=True))
    claim, *paragraphs = [part.replace("\n", " ") for part in prose.strip().split("\n\n")]
    example = re.search(r"``- (.+)``", parts.get("Example", ""))
    advice = next((part for part in paragraphs if part.startswith("Cost:")), "")
    return {
        "claim": claim,
        "link": link_of(text),
        "body": [part.replace("``", "`") for part in paragraphs if part != advice],
        "advice": advice.replace("``", "`"),
        "example": yaml.safe_load(example[1]) if example else {"class_path": name},
    }


def slug(name: str) -> str:
    """Return the name of a trick's page."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def usage(name: str, example: dict[str, Any], config: str) -> Iterator[str]:
    """Yield one line of use in Python, YAML and as a flag. A trick can be added once, so ``config`` has it not yet."""
    arguments = example.get("init_args", {})
    call = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    flags = " ".join(
        [
            f"--trainer.callbacks+={name}",
            *(
                f"--trainer.callbacks.{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
                for key, value in arguments.items()
            ),
        ]
    )
    entry = f"- class_path: {name}" + "".join(
        ["\n      init_args:", *(f"\n        {key}: {json.dumps(value)}" for key, value in arguments.items())]
        if arguments
        else []
    )
    yield "::::{tab-set}\n:::{tab-item} Python\n```python\n"
    yield f"from lightning import Trainer\nfrom lit_tricks import {name}\n\ntrainer = Trainer(callbacks=[{call}])\n```\n:::\n"
    yield f":::{{tab-item}} YAML\n```yaml\ntrainer:\n  callbacks+:\n    {entry}\n```\n:::\n"
    yield f":::{{tab-item}} Flag\n```text\nlit-tricks fit --config {config} {flags}\n```\n:::\n::::\n"


def costs() -> dict[str, str]:
    """Return sentences with the share of a ResNet-50 step on a CPU by trick."""
    text = (RESULTS / "tricks.md").read_text()
    [(batch, side)] = re.findall(r"\(batch of (\d+) at (\d+) x \d+", text)
    step = f"a training step of ResNet-50 with {batch} images of {side} pixels on a CPU"
    table = f"[table]({REPOSITORY}/blob/main/benchmarks/results/tricks.md)"
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    return {name: f"{time} ms, {share} % of {step} ({table}, `benchmarks/tricks.py`)." for name, time, share in rows}


@lru_cache(1)
def memory() -> dict[str, str]:
    """Return sentences with the tensors that a trick keeps between steps, by trick."""
    text = (RESULTS / "tricks.md").read_text()
    [weights] = re.findall(r"weights, which take (\d+) MB", text)
    found = {}
    for name, number in re.findall(r"^\| (\w+) \|.*\| (-?\d+) \|$", text, re.MULTILINE):
        kept = f"{abs(int(number))} MB {'less' if int(number) < 0 else 'more'}" if int(number) else "no more"
        table = f"[table]({REPOSITORY}/blob/main/benchmarks/results/tricks.md)"
        found[name] = f"a ResNet-50, whose weights take {weights} MB, keeps {kept} between steps ({table})."
    return found


def cost_of(name: str, entry: dict[str, Any], cost: dict[str, str]) -> str:
    """Return the cost of a trick as text.

    Raises:
        ExtensionError: without a measurement.
    """
    if "cost" in entry:
        return str(entry["cost"])
    if name not in cost:
        raise ExtensionError(
            f"{name} has no measurement: add it to benchmarks/tricks.py, or `cost` to docs/tricks.yaml"
        )
    return cost[name]


def measured(name: str, entry: dict[str, Any], cost: dict[str, str]) -> Iterator[str]:
    """Yield the measured effect on accuracy and cost.

    Raises:
        ExtensionError: without a measured effect, or a reason for its absence, or without a measured cost.
    """
    if len({"evidence", "measured", "not_measured"} & entry.keys()) != 1:
        raise ExtensionError(
            f"{name} has no measured effect: add one of `evidence`, `measured` and `not_measured` to docs/tricks.yaml"
        )
    if "evidence" in entry:
        found, other = effect(entry), entry["evidence"].get("instead_of")
        without = f"with {other} instead" if other else "without"
        yield f"| setting | top-1 {without} | top-1 with | change, 95 % interval | seeds |\n|---|---|---|---|---|\n"
        yield f"| ResNet-18-D of width 0.25, CIFAR-10 images, 30 epochs at 24 px, tested at {found['size']} px "
        yield f"| {found['before']:.2f} | {found['after']:.2f} | {found['change']:+.2f} ± {found['reach']:.2f} "
        yield f"| {found['seeds']} |\n\n"
        yield "Top-1 in per cent (higher is better), paired by seed. All other tricks are the same in both columns: the "
        yield "table lists them. An interval that contains 0 shows no effect at this budget. "
        yield f"([table]({REPOSITORY}/blob/main/benchmarks/results/evidence.md), `benchmarks/evidence.py`)\n\n"
    elif "measured" in entry:
        yield f"{entry['measured']}\n\n"
    else:
        yield f"**Not measured here.** {entry['not_measured']}\n\n"
    yield f"Cost: {cost_of(name, entry, cost)}\n"
    if name in memory():
        yield f"\nMemory{entry.get('memory', '')}: {memory()[name]}\n"


def behavior(name: str) -> Iterator[str]:
    """Yield the contract row as a table, a line per subject.

    Raises:
        ExtensionError: if a case of the contract has no subject.
    """
    if missing := set(CASES) - {case for cases in SUBJECTS.values() for case in cases}:
        raise ExtensionError(f"SUBJECTS in docs/_ext/trick_pages.py lacks {', '.join(sorted(missing))}")
    rejected = TRICKS[name].rejected
    yield "| | works with | raises an error with |\n|---|---|---|\n"
    for subject, cases in SUBJECTS.items():
        works, raises = (
            ", ".join(text for case, text in cases.items() if (case in rejected) == wanted) for wanted in (False, True)
        )
        yield f"| {subject} | {works or '-'} | {raises or '-'} |\n"
    yield "\nA test checks each case. The error message explains the conflict and its fix.\n"


def plain_figure(name: str, function: Draw, theme: Theme) -> Figure:
    """Draw a figure, and raise if an axis shows TeX, which the style does not render: log scales label ticks so."""
    figure = function(theme)
    for axes in figure.axes:
        labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        if formulas := [label.get_text() for label in labels if "$" in label.get_text()]:
            raise ExtensionError(f"{name}: its figure shows {formulas[0]!r}: set a plain formatter of the axis")
    return figure


def page(name: str, entry: dict[str, Any], cost: dict[str, str], images: Path) -> str:
    """Return the page of a trick, and draw its figure.

    Raises:
        ExtensionError: without figure or BibTeX.
    """
    card = card_of(name)
    if name not in FIGURES:
        raise ExtensionError(f"{name} has no figure: add one to docs/_ext/trick_figures.py")
    bibtex = citations([card["link"]])
    if not bibtex:
        raise ExtensionError(f"{name} has no BibTeX: add {card['link']} to lit_tricks/run/report/citations.bib")
    function, caption = FIGURES[name]
    for theme, kind in ((LIGHT, "light"), (DARK, "dark")):
        (images / f"{slug(name)}_{kind}.png").write_bytes(draw(partial(plain_figure, name, function), theme=theme))
    out = [
        f"# {name}\n\n{card['claim']}\n\n",
        *usage(name, card["example"], entry.get("config", "digits_backbone")),
        "\n",
    ]
    for kind in ("light", "dark"):
        out.append(f"```{{image}} images/{slug(name)}_{kind}.png\n:class: only-{kind}\n:alt: {caption}\n```\n\n")
    out.append(f"*{caption}*\n\n" + "\n\n".join(card["body"]) + "\n\n## Measured effect\n\n")
    out += [*measured(name, entry, cost), f"\n## In the literature\n\n{entry['literature']}\n\n"]
    out.append("## Suggested values\n\n| argument | start with | change it |\n|---|---|---|\n")
    out += [f"| `{argument}` | {value} | {when} |\n" for argument, value, when in entry["values"]]
    out.append(f"\n## Cost and advice\n\n{card['advice']}\n\n## Combinations\n\nStacks with: {entry['stacks']}\n\n")
    others = ", ".join(f"[{other}]({slug(other)}.md)" for other in entry["conflicts"])
    out.append(f"Conflicts with: {others or 'no trick of this library'}.\n\n## Precision, devices, resume\n\n")
    out += [*behavior(name), f"\n## How it works inside\n\n{entry['inside']}"]
    if "readme" in entry:
        folder = f"{REPOSITORY}/tree/main/lit_tricks/callbacks/{entry['readme']}"
        out.append(f" The [{entry['readme']} package]({folder}) explains the mechanism.")
    out.append("\n\n## Citation\n\n```bibtex\n" + "\n\n".join(bibtex) + "\n```\n\n## API\n\n")
    out.append(f"```{{eval-rst}}\n.. autoclass:: lit_tricks.callbacks.{name}\n   :no-members:\n```\n")
    return "".join(out)


def tag(kind: str, name: str) -> str:
    """Return the class of the cards with this goal or budget, which ``filter.js`` finds."""
    return f"{kind}-{name.replace(' ', '-')}"


def card_grid(known: dict[str, Any]) -> Iterator[str]:
    """Yield the cards of all tricks, and the place of the buttons that filter them.

    Raises:
        ExtensionError: for a goal or budget that has no button.
    """
    yield "Choose a goal, a budget, or both. Short runs have fewer than 60 epochs of ImageNet or a similar number of steps, "
    yield 'medium runs up to 240 epochs.\n\n```{raw} html\n<div class="trick-filter" '
    yield f'data-goal="{" ".join(tag("goal", goal) for goal in GOALS)}" '
    yield f'data-budget="{" ".join(tag("budget", budget) for budget in BUDGETS)}"></div>\n```\n\n'
    yield "::::{grid} 1 2 3 3\n:gutter: 2\n\n"
    for name, entry in known.items():
        for found, allowed in ((entry["goals"], GOALS), (entry["budgets"], BUDGETS)):
            if unknown := set(found) - set(allowed):
                raise ExtensionError(f"{name}: docs/tricks.yaml has {unknown.pop()!r}. Use one of {', '.join(allowed)}")
        tags = [
            *(tag("goal", goal) for goal in entry["goals"]),
            *(tag("budget", budget) for budget in entry["budgets"]),
        ]
        claim = re.sub(r" \(\[.*$", "", card_of(name)["claim"])
        yield f":::{{grid-item-card}} {name}\n:link: {slug(name)}\n:link-type: doc\n"
        yield f":class-card: trick-card {' '.join(tags)}\n\n{claim}.\n\n"
        yield " ".join(f"{{bdg-secondary}}`{goal}`" for goal in entry["goals"])
        yield " " + " ".join(f"{{bdg-secondary-line}}`{budget}`" for budget in entry["budgets"]) + "\n:::\n"
    yield "::::\n\n"


def evidence_tables(known: dict[str, Any], cost: dict[str, str]) -> Iterator[str]:
    """Yield the measured effects of all tricks: of the common benchmark, of other benchmarks, and what is not measured."""
    yield "## Measured effects\n\nResNet-18-D of width 0.25 on CIFAR-10 images, 30 epochs, tested at 32 pixels, paired by seed "
    yield f"([table]({REPOSITORY}/blob/main/benchmarks/results/evidence.md), `benchmarks/evidence.py`). Top-1 is in per cent, and "
    yield "higher is better. An interval that contains 0 shows no effect at this budget.\n\n"
    yield "| trick | without | with | change, 95 % interval | cost |\n|---|---|---|---|---|\n"
    for name in (name for name, entry in known.items() if "evidence" in entry):
        found = effect(known[name])
        yield f"| [{name}]({slug(name)}.md) | {found['before']:.2f} | {found['after']:.2f} "
        share = re.sub(r".* ms, ([\d.]+ %) of .*", r"\1 of a ResNet-50 step on a CPU", cost_of(name, known[name], cost))
        yield f"| {found['change']:+.2f} ± {found['reach']:.2f} | {share} |\n"
    yield "\nOther benchmarks:\n\n| trick | result |\n|---|---|\n"
    for name, entry in known.items():
        if "measured" in entry:
            yield f"| [{name}]({slug(name)}.md) | {entry['measured']} |\n"
    names = ", ".join(f"[{name}]({slug(name)}.md)" for name, entry in known.items() if "not_measured" in entry)
    yield f"\nNot measured here, for the reason on the trick's page: {names}.\n\n"


def overview(known: dict[str, Any], cost: dict[str, str]) -> str:
    """Return the page with a card per trick, the measured effects, and the recipes by budget."""
    out = ["# Tricks\n\n", *card_grid(known), *evidence_tables(known, cost), "## Recipes by budget\n\n"]
    out.append(
        "```{include} ../recipes.md\n:start-after: <!-- budgets: start -->\n:end-before: <!-- budgets: end -->\n```\n\n"
    )
    out.append(
        "[Recipes](../recipes.md) has the configurations, and explains the strength of a trick over the run.\n\n"
    )
    out.append("```{toctree}\n:hidden:\n\n" + "\n".join(map(slug, known)) + "\n```\n")
    return "".join(out)


def generate(app: Sphinx) -> None:
    """Write the pages below ``docs/tricks``.

    Raises:
        ExtensionError: if ``tricks.yaml`` lacks a trick, or names one that does not exist.
    """
    known = entries()
    for name in sorted(set(callbacks.__all__) ^ set(known)):
        raise ExtensionError(f"{name} is in only one of docs/tricks.yaml and lit_tricks.callbacks")
    folder = Path(app.srcdir, "tricks")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cost = costs()
    pages = {slug(name): page(name, entry, cost, folder / "images") for name, entry in known.items()}
    for file, text in (pages | {"index": overview(known, cost)}).items():
        path = folder / f"{file}.md"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def prepare(app: Sphinx, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Convert Markdown links of docstrings to reStructuredText.

    Pages introduce modules themselves. The page of a trick has the prose of its class above, so only fields remain.
    """
    if what == "module":
        lines.clear()
    if what == "class" and app.env.docname.startswith("tricks/"):
        first = next(
            (i for i, line in enumerate(lines) if line.startswith((":param", ":raises", ".. rubric"))), len(lines)
        )
        del lines[:first]
    lines[:] = [re.sub(r"\[([^\]]+)\]\((\S+?)\)", r"`\1 <\2>`__", line) for line in lines]


def setup(app: Sphinx) -> dict[str, Any]:
    """Generate the pages before Sphinx reads its sources."""
    app.connect("config-inited", lambda app, _config: generate(app))
    app.connect("autodoc-process-docstring", prepare)
    return {"parallel_read_safe": True}
