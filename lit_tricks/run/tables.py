"""Tables of results as CSV, JSON, JSON lines or Parquet, by the ending of the file's name."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_tricks.utils.files import open_regular, printable, text_cell, written_whole

__all__ = ["FORMATS", "STDOUT", "check_table", "write_table"]

STDOUT = "-"
FORMATS = (".csv", ".json", ".jsonl", ".ndjson", ".parquet")

Columns = Mapping[str, str]  # by name, how its numbers are written as text; "" for text
Row = Sequence[Any]  # None is an empty cell


def check_table(output: str) -> None:
    """Check that a table can be written to a file, and make the file's folder.

    Args:
        output: the file; "-" is standard output, and a name without an ending is for CSV.

    Raises:
        ValueError: for an ending that is not in ``FORMATS``.
        ModuleNotFoundError: for Parquet without pyarrow.
        FileExistsError: if the file exists and is not such a table.
        OSError: if the folder cannot be made.
    """
    path = Path(output)
    if output == STDOUT:
        return
    if path.suffix and path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"output={output!r}: the ending {path.suffix!r} is not one of {', '.join(FORMATS)}. Choose one."
        )
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        remedy = 'Install it with pip install "lit-tricks[parquet]", or write CSV'
        raise ModuleNotFoundError(f"output={output!r}: Parquet needs pyarrow. {remedy}.", name="pyarrow")
    if path.is_dir():
        raise IsADirectoryError(f"output={output!r} is a folder. Give a file, such as {path / 'predictions.csv'}.")
    if path.exists() and not _is_table(path):
        raise FileExistsError(
            f"output={output!r} exists, and is not a table of predictions. Choose another name, or remove the file."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"output={output!r}: its folder cannot be made ({error.strerror}). Choose another."
        ) from error


def write_table(output: str, columns: Columns, rows: Sequence[Row]) -> None:
    """Write a table whole, or to standard output as CSV. In CSV, an apostrophe goes before what would be a formula.

    Args:
        output: as in ``check_table``.
        columns: names of the columns, and how their numbers are written in CSV, such as ".6f".
        rows: cells, in the order of the columns.
    """
    if output == STDOUT:
        sys.stdout.write(_csv(columns, rows))
        return
    path = Path(output)
    with written_whole(path) as part:
        if path.suffix.lower() == ".parquet":
            _write_parquet(part, columns, rows)
        else:
            writers = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines}
            writer = writers.get(path.suffix.lower(), _csv)
            text = writer(columns, rows)
            # bytes in file names that are not UTF-8 stay as they are in CSV
            part.write_bytes(text.encode("utf-8", "surrogateescape" if writer is _csv else "backslashreplace"))


def _is_table(path: Path) -> bool:
    """Return whether a file is a table of ours, by its beginning, so that it may be replaced."""
    try:
        with open_regular(path) as stream:
            start = stream.read(2**12).strip()
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return bool(parquet.read_schema(path).names[:1] == ["file"])
    except (OSError, ValueError):  # not a regular file, or not Parquet
        return False
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return start in (b"", b"[]") or re.match(rb'(\[\s*)?\{\s*"file":', start) is not None
    return start.startswith(b"file,")


def _csv(columns: Columns, rows: Sequence[Row]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(map(text_cell, columns))
    formats = list(columns.values())
    for row in rows:
        writer.writerow(
            [
                format(cell, how) if isinstance(cell, float) else text_cell(cell) if isinstance(cell, str) else cell
                for cell, how in zip(row, formats, strict=True)
            ]
        )
    return stream.getvalue()


def _records(columns: Columns, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as they are in JSON, with as many digits as in CSV."""
    formats = list(columns.values())
    return [
        {
            name: _number(format(cell, how)) if isinstance(cell, float) else cell
            for name, cell, how in zip(columns, row, formats, strict=True)
        }
        for row in rows
    ]


def _text(cell: Any) -> Any:
    return printable(cell) if isinstance(cell, str) else cell


def _number(text: str) -> float | None:
    """Return the number that a text is; None if it is not finite, since JSON has no such numbers."""
    value = float(text)
    return value if math.isfinite(value) else None


def _json(columns: Columns, rows: Sequence[Row]) -> str:
    return json.dumps(_records(columns, rows), ensure_ascii=False, indent=1) + "\n"


def _json_lines(columns: Columns, rows: Sequence[Row]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _records(columns, rows))


def _write_parquet(path: Path, columns: Columns, rows: Sequence[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = [pyarrow.float64() if how else pyarrow.string() for how in columns.values()]
    cells: list[list[Any]] = [list(map(_text, column)) for column in zip(*rows, strict=True)] or [[] for _ in columns]
    arrays = [pyarrow.array(column, kind) for column, kind in zip(cells, kinds, strict=True)]
    parquet.write_table(pyarrow.table(arrays, names=list(columns)), path)
