"""A report as Markdown with PNG files, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image as PILImage

from lit_tricks.run.report.content import Image, Picture, Section, Table
from lit_tricks.run.report.escaping import escape_markdown
from lit_tricks.utils.files import write_whole

__all__ = ["markdown_table", "to_html", "to_markdown", "write"]

# Colors are named once for each ground; nothing is loaded from elsewhere.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --band: #f6f8fa;
  --link: #0060a0 }
@media (prefers-color-scheme: dark) { :root { --ground: #15181d; --ink: #e6e8eb; --faint: #9aa3ad; --line: #343a42;
  --band: #1d2127; --link: #6cb6ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line) }
p { max-width: 46rem; margin: .5rem 0 }
a { color: var(--link) }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0; margin: .75rem 0 }
.wide { overflow: auto; max-height: 44rem; margin: 1rem 0 }
.wide:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--faint); font-size: .875rem; padding-bottom: .25rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }
thead th { color: var(--faint); font-weight: 600; white-space: nowrap }
tbody th { font-weight: 600; white-space: nowrap }
td { max-width: 34rem }
.number { text-align: right; white-space: nowrap }
.pictures { display: flex; flex-wrap: wrap; gap: 1.25rem 2.5rem; align-items: flex-start }
.pictures .wide { max-width: 100% }
.pictures picture { flex: 0 1 auto; min-width: 0; max-width: 100% }
.pictures img { display: block; max-width: 100%; height: auto }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; margin: 1rem 0 }
.images figure { margin: 0 }
.images img { width: 100%; max-width: 12rem; aspect-ratio: 1; object-fit: contain; background: var(--band);
  image-rendering: pixelated; border-radius: 4px }
.images img.large { image-rendering: auto }
figcaption { font-size: .8125rem; line-height: 1.35; color: var(--faint) }
"""
DPI = 160  # of the pictures; shown at 96 to the inch, so that they are sharp on fine screens


def to_markdown(title: str, sections: Sequence[Section], links: dict[str, str] | None = None) -> str:
    """Return the report as Markdown. Pictures are files ``NAME.png`` in the same folder.

    Args:
        title: title of the report.
        sections: sections of the report.
        links: links to further pages, by their names.
    """
    lines = [f"# {escape_markdown(title)}", ""]
    lines += [" · ".join(f"[{name}]({target})" for name, target in links.items()), ""] if links else []
    for section in sections:
        lines += [f"## {escape_markdown(section.title)}", ""]
        for text in section.text:
            lines += [escape_markdown(text), ""]
        for table in section.tables:
            lines += [*markdown_table(table), ""]
        for picture in section.pictures:
            lines += [f"![{escape_markdown(picture.alt)}]({picture.name}.png)", ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> list[str]:
    """Return the lines of a table."""
    header = ["---", *("---:" if numeric else "---" for numeric in _numeric(table)[1:])]
    return [
        "| " + " | ".join(escape_markdown(cell) for cell in row) + " |" for row in (table.header, header, *table.rows)
    ]


def to_html(title: str, sections: Sequence[Section]) -> str:
    """Return the report as one page: pictures are inside, for light and for dark; it fits narrow and wide windows."""
    entries = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a></li>' for i, section in enumerate(sections))
    body = "\n".join(_section(section, f"s{i}") for i, section in enumerate(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # otherwise a browser would request one
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<nav aria-label="Sections"><ul>{entries}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, key: str) -> str:
    parts = [f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(section.title)}</h2>']
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    tables = "".join(map(_table, section.tables))
    if section.images:  # one by one, which fit any width: better than the grid that is one picture
        parts += [tables, f'<div class="images">{"".join(map(_image, section.images))}</div>']
    elif section.pictures:  # tables next to them, if the page is wide enough
        parts.append(f'<div class="pictures">{tables}{"".join(map(_picture, section.pictures))}</div>')
    else:
        parts.append(tables)
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    kinds = ['class="number"' if numeric else "" for numeric in _numeric(table)]
    head = "".join(
        f'<th scope="col" {kind}>{escape(name)}</th>' if name else "<td></td>"
        for name, kind in zip(table.header, kinds, strict=True)
    )
    rows = []
    for name, *cells in table.rows:
        found = "".join(f"<td {kind}>{escape(cell)}</td>" for cell, kind in zip(cells, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{found}</tr>')
    return (  # a table that is too large scrolls by itself, also by the keyboard
        f'<div class="wide" role="region" aria-label="{escape(table.caption)}" tabindex="0"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    with PILImage.open(io.BytesIO(picture.light)) as image:
        width, height = (round(side * 96 / DPI) for side in image.size)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark)}">'
        f'<img src="{_data(picture.light)}" alt="{escape(picture.alt)}" width="{width}" height="{height}"></picture>'
    )


def _image(image: Image) -> str:
    file = io.BytesIO()
    PILImage.fromarray(image.pixels.squeeze()).save(file, "PNG")
    size = ' class="large"' if max(image.pixels.shape[:2]) > 48 else ""
    return (
        f'<figure><img{size} src="{_data(file.getvalue())}" alt="{escape(image.alt)}">'
        f"<figcaption>{escape(image.caption)}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _numeric(table: Table) -> list[bool]:
    """Return which columns have numbers, which are aligned right."""
    columns = zip(*table.rows, strict=True) if table.rows else ([] for _ in table.header)
    return [bool(cells) and all(c[:1] in "-0123456789" and len(c) < 20 for c in cells) for cells in map(list, columns)]


def write(folder: Path, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write ``report.md``, its pictures, and ``report.html``."""
    paths = []
    for section in sections:
        for picture in section.pictures:
            paths.append(folder / f"{picture.name}.png")
            write_whole(paths[-1], picture.light, durable=False)
    for name, text in (("report.md", to_markdown(title, sections)), ("report.html", to_html(title, sections))):
        paths.append(folder / name)
        write_whole(paths[-1], text)
    return paths
