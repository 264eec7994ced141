"""Tables that name image files and their labels: CSV, JSON lines, and folders with Hugging Face's metadata."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lit_tricks.data.io.formats import is_image
from lit_tricks.data.splits import NAMES, split_folder
from lit_tricks.utils.arguments import invalid
from lit_tricks.utils.files import printable, read_regular

__all__ = ["AUTO", "METADATA", "Entry", "ImageList", "is_table", "read_list", "table_files"]

AUTO = "auto"
METADATA = ("metadata.csv", "metadata.jsonl")
LINES = (".jsonl", ".ndjson")
ENDINGS = (".csv", ".tsv", ".txt", *LINES)
DELIMITERS = ",;\t|"
MOST_HEADER = 10_000  # characters
SHOWN = 5  # names in a message

# Names of columns, the best first. Case, spaces and hyphens do not matter.
FILES = ("file_name", "filename", "file", "file_path", "filepath", "path", "image_path", "image_file", "image", "img")
LABELS = ("class_name", "label_name", "label", "class", "category", "target", "labels", "class_label")
SPLIT_COLUMNS = ("split", "subset", "partition")
SPLIT_OF = {name: split for split, names in NAMES.items() for name in names} | {"training": "train", "testing": "test"}


class Entry(NamedTuple):
    """An image of a table.

    Args:
        file: path below the root.
        label: name of its class.
        split: "train", "val" or "test"; None if the table has no split.
        place: of the row, for messages.
    """

    file: str
    label: str
    split: str | None
    place: str


@dataclass
class ImageList:
    """The images of a table, each once.

    Args:
        root: folder that the paths are relative to.
        entries: in the order of the rows.
        columns: names of the columns that were read.
        repeated: number of rows that repeat another one.
        problems: what is wrong with rows, where it is collected instead of raised.
    """

    root: str
    entries: list[Entry] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    repeated: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """The labels, sorted; whole numbers by their value."""
        names = {entry.label for entry in self.entries}
        are_numbers = all(name.isascii() and name.isdecimal() for name in names)
        return sorted(names, key=lambda name: (int(name), name) if are_numbers else (0, name))

    @property
    def splits(self) -> set[str]:
        """The splits that have images. Images of no split are training images."""
        return {entry.split or "train" for entry in self.entries}

    def of(self, split: str) -> list[Entry]:
        """Return the images of a split in the order of ``ImageFolder``: by class, folder and name."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        mine = (entry for entry in self.entries if (entry.split or "train") == split)
        return sorted(mine, key=lambda entry: (label_of[entry.label], *os.path.split(entry.file)))


def is_table(path: str) -> bool:
    """Return whether a path is a table, and no folder of class folders."""
    if not os.path.isdir(path):
        return os.path.lexists(path)
    folders = (path, *(split_folder(path, split) for split in NAMES))
    return any(os.path.lexists(os.path.join(folder, name)) for folder in folders for name in METADATA)


def table_files(table: str) -> dict[str | None, str]:
    """Return the files that hold a table, by split; None is for a file with all splits.

    Args:
        table: a file, or a folder with ``metadata.csv`` or ``metadata.jsonl`` in it or in the folders of its splits.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a folder has both kinds of metadata, or the ending of a file is unknown.
    """
    if os.path.isdir(table):
        found = {split: _metadata(split_folder(table, split), table) for split in NAMES}
        files: dict[str | None, str] = {split: file for split, file in found.items() if file}
        if not files and (file := _metadata(table, table)):
            files = {None: file}
        if not files:
            raise FileNotFoundError(
                f"ImageTable(table={table!r}): this folder has no {' or '.join(METADATA)}, and its split folders have "
                "none. Give a CSV file of file names and labels."
            )
        return files
    if not os.path.lexists(table):
        raise FileNotFoundError(f"ImageTable(table={table!r}): there is no such file. Give a CSV file or a folder.")
    if os.path.splitext(table)[1].lower() not in ENDINGS:
        raise invalid("ImageTable", f"the file must end in {' '.join(ENDINGS)}. Save it as CSV.", table=table)
    return {None: table}


def read_list(
    table: str,
    root: str | None = None,
    file_column: str = AUTO,
    label_column: str = AUTO,
    split_column: str | None = AUTO,
    collect: bool = False,
) -> ImageList:
    """Read a table.

    Args:
        table: see ``table_files``.
        root: folder that file names are relative to; None is the folder of the table.
        file_column: name of the column with the file names; "auto" finds it.
        label_column: name of the column with the labels; "auto" finds it.
        split_column: name of the column with the splits; "auto" takes one that has a usual name; None takes none.
        collect: whether faults of rows are collected in ``problems`` instead of raised.

    Raises:
        OSError: if the table is missing, or is no regular file.
        ValueError: if the table is not UTF-8, lacks a column, or has a row that is wrong; the message names the line.
    """
    files = table_files(table)
    root = root or (table if os.path.isdir(table) else os.path.dirname(table) or ".")
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"ImageTable(root={root!r}): there is no such folder. It holds the images of {table!r}."
        )
    found = ImageList(root)
    reader = _Reader(table, found, collect)
    for split, file in files.items():
        reader.read(file, split, (file_column, label_column, split_column))
    if not found.entries and not found.problems:
        raise invalid("ImageTable", "the table has no rows. Add one line per image.", table=table)
    _split_by_folder(found)
    return found


def _metadata(folder: str, table: str) -> str | None:
    """Return the metadata file of a folder."""
    found = [name for name in METADATA if os.path.lexists(os.path.join(folder, name))]
    if len(found) > 1:
        raise invalid("ImageTable", f"{folder!r} has {' and '.join(found)}. Keep one of them.", table=table)
    return os.path.join(folder, found[0]) if found else None


def _split_by_folder(found: ImageList) -> None:
    """Take the splits from the first folder of all paths, where all of these are names of splits, train among them."""
    tops = {entry.file.partition(os.sep)[0] if os.sep in entry.file else "" for entry in found.entries}
    has_splits = any(entry.split for entry in found.entries)
    if has_splits or not {"train"} < {SPLIT_OF.get(top.lower(), "") for top in tops} <= NAMES.keys():
        return
    found.entries = [entry._replace(split=SPLIT_OF[entry.file.partition(os.sep)[0].lower()]) for entry in found.entries]


class _Reader:
    """Adds the rows of files to a list.

    Args:
        table: as it was given, for messages.
        found: the list.
        collect: see ``read_list``.
    """

    def __init__(self, table: str, found: ImageList, collect: bool) -> None:
        self.table, self.found, self.collect = table, found, collect
        self.known: dict[str, Entry] = {}
        self.base = os.path.abspath(found.root)

    def read(self, file: str, split: str | None, columns: Sequence[str | None]) -> None:
        """Add the rows of a file, whose paths are relative to the root, or to the folder of a split's metadata."""
        text = self._text(file)
        is_lines = file.lower().endswith(LINES)
        rows = self._objects(file, text) if is_lines else self._cells(file, text)
        names: tuple[str, str, str | None] | None = None
        below = os.path.relpath(os.path.dirname(os.path.abspath(file)), self.base) if split else ""
        for place, row in rows:
            if names is None:
                names = self._columns(file, row, columns)
                self.found.columns = [name for name in names if name]
            try:
                self._add(self._entry(place, row, names, split, below))
            except ValueError as error:
                if not self.collect:
                    raise
                self.found.problems.append(str(error).partition("): ")[2] or str(error))

    def _text(self, file: str) -> str:
        data = read_regular(file)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise self._wrong(f"{_at(file, line)}: the text is not UTF-8. Save the table as CSV in UTF-8.") from None

    def _cells(self, file: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the rows of a CSV file, each with its place."""
        first = io.StringIO(text.lstrip(), newline="").readline(MOST_HEADER)
        delimiter = max(DELIMITERS, key=first.count)
        stream = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            for row in stream:
                if not any(cell.strip() for cell in row):
                    continue
                if not header:
                    header = [cell.strip() for cell in row]
                    self._check_header(file, header)
                    continue
                place = _at(file, stream.line_num)
                if len(row) != len(header):
                    message = f"{place} has {len(row)} cells, and the header {len(header)}. Quote cells with commas."
                    if not self.collect:
                        raise self._wrong(message)
                    self.found.problems.append(message)
                    continue
                yield place, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise self._wrong(f"{_at(file, stream.line_num)}: {error}. Repair the quotes of the table.") from error

    def _check_header(self, file: str, header: list[str]) -> None:
        if any(map(is_image, header)):
            raise self._wrong(f"{_at(file, 1)} has no names of columns. Add a first line: file,label")
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise self._wrong(f"{_at(file, 1)} has several columns {repeated[0]!r}. Rename them.")

    def _objects(self, file: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Give the rows of a file with a JSON object in each line, each with its place."""
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            place = _at(file, number)
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                message = f"{place} is no JSON object. Write one object in each line."
                if not self.collect:
                    raise self._wrong(message)
                self.found.problems.append(message)
                continue
            yield place, row

    def _columns(self, file: str, row: Mapping[str, Any], given: Sequence[str | None]) -> tuple[str, str, str | None]:
        """Return the names of the columns with files, labels and splits."""
        file_column, label_column, split_column = given
        for name, value in zip(("file_column", "label_column", "split_column"), given, strict=True):
            if value not in (None, AUTO) and value not in row:
                columns = ", ".join(map(repr, row))
                raise invalid("ImageTable", f"{file!r} has no such column. Its columns are {columns}.", **{name: value})
        if file_column == AUTO:
            like_files = [name for name, cell in row.items() if isinstance(cell, str) and is_image(cell)]
            file_column = _named(row, FILES) or (like_files[0] if len(like_files) == 1 else None)
        rest = [name for name in row if name != file_column]
        if split_column == AUTO:
            split_column = _named(rest, SPLIT_COLUMNS)
        if label_column == AUTO:
            rest = [name for name in rest if name != split_column]
            label_column = _named(rest, LABELS) or (rest[0] if len(rest) == 1 else None)
        for what, flag, column in (
            ("file names", "file_column", file_column),
            ("labels", "label_column", label_column),
        ):
            if column is None:
                columns = ", ".join(map(repr, row))
                raise self._wrong(f"no column of {file!r} has the {what}. Give --data.{flag}, one of {columns}.")
        assert file_column is not None
        assert label_column is not None
        return file_column, label_column, split_column

    def _entry(
        self, place: str, row: Mapping[str, Any], names: tuple[str, str, str | None], split: str | None, below: str
    ) -> Entry:
        file_column, label_column, split_column = names
        file, label = self._cell(place, row, file_column), self._cell(place, row, label_column)
        if split is None and split_column is not None:
            word = self._cell(place, row, split_column)
            split = SPLIT_OF.get(word.lower())
            if split is None:
                raise self._wrong(f"{place}: the split {word!r} is unknown. Write train, val or test.")
        return Entry(self._below(place, os.path.join(below, file)), printable(label), split, place)

    def _cell(self, place: str, row: Mapping[str, Any], column: str) -> str:
        """Return the text in a cell, without spaces around it."""
        value = row.get(column)
        if isinstance(value, str | int) and not isinstance(value, bool) and (text := str(value).strip()):
            return text
        if value is None or isinstance(value, str):
            raise self._wrong(f"{place}: {column!r} is empty. Fill it in, or remove the line.")
        raise self._wrong(f"{place}: {column!r} is {value!r}. Write one text or whole number.")

    def _below(self, place: str, name: str) -> str:
        """Return a path relative to the root, which it must not leave."""
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            name = "\0"
        path = os.path.abspath(os.path.join(self.base, name)) if "\0" not in name else ""
        start = os.path.join(self.base, "")
        if not path:
            raise self._wrong(f"{place}: the file name has characters that no file name has. Correct it.")
        if not path.startswith(start) or path == start:
            raise self._wrong(
                f"{place}: {name!r} is outside of {self.found.root!r}. Give --data.root, the folder of all images."
            )
        return path.removeprefix(start)

    def _add(self, entry: Entry) -> None:
        first = self.known.setdefault(entry.file, entry)
        if first is entry:
            self.found.entries.append(entry)
            return
        self.found.repeated += 1
        for what, ours, theirs in (("label", first.label, entry.label), ("split", first.split, entry.split)):
            if ours != theirs:
                raise self._wrong(
                    f"{entry.place}: {entry.file!r} has the {what} {theirs!r}, and {ours!r} in {first.place}. Keep one."
                )

    def _wrong(self, message: str) -> ValueError:
        return invalid("ImageTable", message, table=self.table)


def _at(file: str, line: int) -> str:
    return f"{Path(file).name} line {line}"


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the column that has the first of several usual names."""
    plain = {column.strip().lower().replace(" ", "_").replace("-", "_"): column for column in columns}
    return next((plain[name] for name in names if name in plain), None)
