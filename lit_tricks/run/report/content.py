"""The content of a report, for all its formats: sections of text, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_tricks.run.reading.mask_predictions import MaskPredictions
from lit_tricks.run.reading.predictions import IMBALANCE, Predictions
from lit_tricks.run.reading.run import Run
from lit_tricks.run.reading.scores import SCORES
from lit_tricks.run.report.curves import draw_panel, lacking, panels_of
from lit_tricks.run.report.figures import (
    MOST_CLASSES,
    ByRun,
    MasksByRun,
    draw_calibration,
    draw_confusion,
    draw_ious,
    draw_recalls,
    draw_time,
    draw_worst_masks,
    draw_wrong,
    worst_classes,
    worst_first,
)
from lit_tricks.run.report.style import DARK, LIGHT, draw, duration

__all__ = [
    "Image",
    "Picture",
    "Section",
    "Table",
    "cell",
    "report_sections",
    "results_table",
    "time_table",
    "tricks_table",
]

SPLITS = ("train", "val", "test")
WEIGHTS = {
    "best": "with the best checkpoint",
    "last": "with the weights of the last epoch",
    "given": "with the given checkpoint",
}
IMAGES = {"test": "test", "val": "validation"}
COLUMNS = ("loss", *SCORES, "ece")
CLOCKS = {
    "host": "Seconds of the main process, by the clock of the CPU. Where a GPU computes, most of its time is spent "
    "where the process waits for it.",
    "device": "Steps are divided by events in the stream of the GPU, in every 11th step: data is what it waits for.",
}


@dataclass
class Table:
    """A table: its caption, header and rows of text; the first column names the row."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    """A picture on light and on dark ground, PNG files, and what it shows, in words."""

    name: str
    alt: str
    light: bytes
    dark: bytes


@dataclass
class Image:
    """An image with a large loss: its pixels, and its caption."""

    pixels: Any
    alt: str
    caption: str


@dataclass
class Section:
    """A heading and its content, in this order."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)


def report_sections(runs: list[Run]) -> list[Section]:
    """Return all sections of a report on these runs; those for which no run has anything are left out."""
    sections = [_results(runs), _tricks(runs), _settings(runs), _curves(runs), _time(runs)]
    sections += [*_predictions(runs), *_masks(runs)]
    gaps = [f"{run.name}: no {part}. The reason: {why}." for run in runs for part, why in run.missing.items()]
    sections.append(Section("What is missing", gaps))
    return [s for s in sections if s.text or s.tables or s.pictures or s.images]


def results_table(runs: list[Run]) -> Table:
    """Return the metrics of the best checkpoint, by run and split."""
    names = {name for run in runs for found in run.metrics.values() for name in found}
    columns = [name for name in COLUMNS if name in names] + sorted(names - set(COLUMNS))
    rows = []
    for run in runs:
        for split in SPLITS:
            if found := run.metrics.get(split):
                label = f"{run.name}, {split}" if len(runs) > 1 else split
                label += " (calibrated)" if split in run.calibrated else ""
                rows.append([label, *(cell(name, found.get(name)) for name in columns)])
    return Table("Metrics at the best checkpoint", ["", *columns], rows)


def cell(name: str, value: float | None) -> str:
    """Return a metric as it is written: scores in per cent."""
    if value is None:
        return "-"
    return f"{value:.2%}" if name in SCORES else f"{value:.4f}"


def tricks_table(run: Run) -> Table:
    """Return the tricks of a run, with their effects, and the arguments that are set."""
    rows = [
        [
            name,
            trick["effect"] or "-",
            ", ".join(f"{k}={v}" for k, v in trick["arguments"].items() if v is not None) or "-",
        ]
        for name, trick in run.tricks.items()
    ]
    return Table(f"Tricks in force, {run.name}", ["trick", "effect", "arguments"], rows)


def time_table(runs: list[Run]) -> Table:
    """Time and part of the whole, by what it went into."""
    runs = [run for run in runs if run.seconds]
    parts = list(runs[0].seconds) if runs else []
    rows = []
    for part in parts:
        seconds = [(run.seconds.get(part, 0.0), sum(run.seconds.values()) or 1.0) for run in runs]
        rows.append([part, *(f"{duration(value)}, {value / whole:.0%}" for value, whole in seconds)])
    header = [run.name for run in runs] if len(runs) > 1 else ["time"]
    return Table("Time of the training", ["part", *header], rows)


def _results(runs: list[Run]) -> Section:
    section = Section("Results")
    for run in runs:
        if run.results:
            best = f"epoch {run.results.get('epoch', '?')}, {run.kind} weights"
            took = f", {duration(run.results['seconds'])} of training" if run.results.get("seconds") else ""
            peak = f", {run.results['peak_memory'] / 1e9:.2f} GB at most" if run.results.get("peak_memory") else ""
            section.text.append(f"{run.name}: {best}{took}{peak}.{_origin(run)}")
    table = results_table(runs)
    section.tables += [table] if table.rows else []
    return section


def _origin(run: Run) -> str:
    """Name the run that is resumed."""
    if not run.resumes:
        return ""
    step = f" at step {run.starts[-1]:g}" if run.starts else ""
    return f" It resumes {run.resumes}{step}."


def _tricks(runs: list[Run]) -> Section:
    return Section("Tricks in force", tables=[tricks_table(run) for run in runs if run.tricks])


def _settings(runs: list[Run]) -> Section:
    """Return the settings that differ between the configurations of several runs."""
    flat = {run.name: dict(_flat(run.config)) for run in runs if run.config}
    keys = sorted({key for settings in flat.values() for key in settings} - {"name"})
    rows = []
    for key in keys:
        values = [str(settings.get(key, "-")) for settings in flat.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
    section = Section("What differs in the settings")
    if len(flat) > 1:
        section.text = [] if rows else ["Nothing: the runs have the same settings."]
        section.tables = [Table("Settings that differ", ["setting", *flat], rows)] if rows else []
    return section


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if path == "trainer.callbacks":  # the tricks have a table of their own; others by name
        names = [str(c.get("class_path", c)).rpartition(".")[2] for c in value or [] if isinstance(c, dict)]
        yield path, ", ".join(names) or "none"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _curves(runs: list[Run]) -> Section:
    section = Section("Learning curves")
    shown = {run.name: run.rows for run in runs if run.rows}
    titles = panels_of(list(shown.values()))
    if titles and len(shown) > 1:
        section.text.append(
            "Solid: validation. Dotted: training. Dashed: trained weights, validated in addition to an average."
        )
    starts = sorted({start for run in runs for start in run.starts})
    if starts:
        section.text.append("Vertical lines: steps at which a run was resumed. Earlier points are from the run before.")
    for title in titles:
        alt = f"{title} against the training step, of {', '.join(shown)}."
        section.pictures.append(_picture(title.lower().replace(" ", "_"), alt, draw_panel, title, shown, starts))
    section.text += [f"{title} was not logged." for title in lacking(titles) if shown]
    return section


def _time(runs: list[Run]) -> Section:
    timed = [run for run in runs if run.seconds]
    section = Section("Where the time went")
    if timed:
        section.text = [CLOCKS[clock] for clock in dict.fromkeys(run.results["time"]["clock"] for run in timed)]
        table = time_table(timed)
        section.tables = [table]
        alt = "Time of each part of the training. " + "; ".join(f"{row[0]}: {', '.join(row[1:])}" for row in table.rows)
        section.pictures = [
            _picture("time", f"{alt}.", draw_time, {run.name: run.seconds for run in timed}, [run.name for run in runs])
        ]
    return section


def _predictions(runs: list[Run]) -> Iterator[Section]:
    names = [run.name for run in runs]
    by_run: ByRun = {run.name: run.predictions for run in runs if run.predictions and len(run.predictions.label)}
    if not by_run:
        return
    several = len(by_run) > 1
    text = [
        f"{name}: {len(found.label):,} {IMAGES[found.split]} images, {WEIGHTS[found.weights]}."
        for name, found in by_run.items()
    ]
    yield Section("Mistakes", text, pictures=[*_confusions(by_run)])
    errors = ", ".join(f"{name} {found.calibration().error:.4f}" for name, found in by_run.items())
    alt = f"Reliability diagram: accuracy against confidence. Expected calibration error: {errors}."
    yield Section("Calibration", pictures=[_picture("reliability", alt, draw_calibration, by_run, names)])
    same = {name: found for name, found in by_run.items() if found.classes == next(iter(by_run.values())).classes}
    yield _classes(same, names)
    yield _frequencies(by_run)
    for name, found in by_run.items():
        images = [
            Image(
                pixels, f"{where}: {label}, taken for {predicted}", f"{label} → {predicted}, {sure:.0%} sure ({where})"
            )
            for pixels, label, predicted, _, sure, where in found.wrong()
        ]
        section = Section(f"Most wrong images, {name}" if several else "Most wrong images", images=images)
        if images:
            alt = f"Grid of the {len(images)} most wrong images of {name}."
            section.pictures = [_picture(_file("most_wrong", name, several), alt, draw_wrong, found)]
        elif found.wrong_image is None:
            section.text = ["No images were kept: the batches of the run hold none."]
        else:
            section.text = [f"None: {name} has all images right."]
        yield section


def _confusions(by_run: Mapping[str, Predictions | MaskPredictions]) -> Iterator[Picture]:
    several = len(by_run) > 1
    for name, found in by_run.items():
        frequent = found.confusion().mistakes()[:5]
        words = ", ".join(f"{found.classes[a]} as {found.classes[b]}: {n}" for a, b, n in frequent)
        many = len(found.classes) > MOST_CLASSES
        alt = f"{'Most frequent mistakes' if many else 'Confusion matrix'} of {name}. Most frequent: {words or 'none'}."
        if not many or frequent:
            yield _picture(_file("confusion", name, several), alt, draw_confusion, found, f", {name}" * several)


def _masks(runs: list[Run]) -> Iterator[Section]:
    """Return the sections on segmentations."""
    shown: MasksByRun = {run.name: run.masks for run in runs if run.masks and run.masks.pixels.any()}
    if not shown:
        return
    several = len(shown) > 1
    text = [
        f"{name}: {found.pixels.sum():,} pixels of {found.images:,} {IMAGES[found.split]} images, "
        f"{WEIGHTS[found.weights]}. Pixels that are to be ignored do not count."
        for name, found in shown.items()
    ]
    yield Section("Mistakes", text, pictures=[*_confusions(shown)])
    first = next(iter(shown.values()))
    yield _ious({name: found for name, found in shown.items() if found.classes == first.classes}, list(shown))
    for name, found in shown.items():
        title = "Images with the lowest IoU"
        section = Section(f"{title}, {name}" if several else title)
        if found.worst:
            section.text = ["The IoU of an image is the mean over the classes that occur in it, as mask or prediction."]
            words = ", ".join(f"{each.where} {each.iou:.1%}" for each in found.worst)
            alt = f"Images of {name} with the lowest IoU, their masks and what was predicted: {words}."
            section.pictures = [_picture(_file("worst_images", name, several), alt, draw_worst_masks, found)]
        else:
            section.text = ["None were kept: all images are right, or the batches of the run hold none."]
        yield section


def _ious(by_run: MasksByRun, names: list[str]) -> Section:
    """Return all classes, as their mean is what counts."""
    first = next(iter(by_run.values()))
    order = worst_first([found.ious() for found in by_run.values()])
    order += [label for label in range(len(first.classes)) if label not in order]  # that did not occur
    rows = []
    for label in order:
        row = [first.classes[label], f"{first.recalls()[1][label]:,}"]
        for found in by_run.values():
            values = (found.ious(), found.recalls()[0], found.precisions())
            row += [f"{each[label]:.1%}".replace("nan%", "-") for each in values]
        rows.append(row)
    heads = [f"{what}{f', {name}' if len(by_run) > 1 else ''}" for name in by_run for what in ("IoU", "found", "right")]
    text = [
        "IoU: intersection over union of the true and the predicted pixels of a class. mIoU: mean over classes with "
        "an IoU. Found: share of the class that was predicted as the class (recall). Right: share of the predictions "
        "of the class that are right (precision)."
    ]
    alt = "Lowest IoU: " + ", ".join(f"{row[0]} {row[2]}" for row in rows[:10]) + "."
    picture = _picture("classes", alt, draw_ious, by_run, names)
    return Section(
        "IoU of the classes", text, [Table("Classes, the worst first", ["class", "pixels", *heads], rows)], [picture]
    )


def _classes(by_run: ByRun, names: list[str]) -> Section:
    order = worst_classes(by_run)
    first = next(iter(by_run.values()))
    rows = []
    for label in order:
        row = [first.classes[label], f"{first.recalls()[1][label]}"]
        for found in by_run.values():
            row += [f"{found.recalls()[0][label]:.1%}", f"{found.precisions()[label]:.1%}".replace("nan%", "-")]
        rows.append(row)
    heads = [f"{what}{f', {name}' if len(by_run) > 1 else ''}" for name in by_run for what in ("found", "right")]
    text = [
        "Found: share of the class that was predicted as the class (recall). Right: share of the predictions of "
        "the class that are right (precision)."
    ]
    alt = "Worst classes: " + ", ".join(f"{row[0]} {row[2]}" for row in rows) + "."
    picture = _picture("classes", alt, draw_recalls, by_run, names)
    return Section("Worst classes", text, [Table("Worst classes", ["class", "images", *heads], rows)], [picture])


def _frequencies(predictions: Mapping[str, Predictions]) -> Section:
    """Return accuracy by class frequency, of runs whose classes are imbalanced."""
    found = {name: each for name, each in predictions.items() if each.is_imbalanced}
    section = Section("Accuracy by class frequency")
    rows = []
    for name, each in found.items():
        values = each.by_frequency()
        counts = each.frequencies[each.frequencies > 0]
        source = "evaluated" if each.train_counts is None else "training"
        section.text.append(f"{name}: {counts.min():,} to {counts.max():,} {source} images per class.")
        heads = {group: len(classes) for group, classes in each.groups().items()}
        shown = [cell("macro_f1", values.get(key)) for key in ("balanced_accuracy", "macro_f1")]
        shown += [f"{cell('macro_f1', values.get(f'{group}_recall'))} ({size})" for group, size in heads.items()]
        rows.append([name, *shown])
    if rows:
        section.text.append(
            f"Shown where a class has more than {IMBALANCE} times the images of another. Balanced accuracy: mean "
            "recall of the classes. Macro F1: mean of the classes' F1 scores. Head, middle, tail: mean recall of the "
            "most frequent, the other and the rarest third of the classes, with their number in brackets."
        )
        header = ["", "balanced accuracy", "macro F1", "head", "middle", "tail"]
        section.tables = [Table("Accuracy by class frequency", header, rows)]
    return section


def _file(what: str, name: str, several: bool) -> str:
    return f"{what}_{name.replace('/', '_')}" if several else what


def _picture(name: str, alt: str, function: Any, *args: Any) -> Picture:
    return Picture(name, alt, draw(function, *args, theme=LIGHT), draw(function, *args, theme=DARK))
