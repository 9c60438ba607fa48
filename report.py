"""Figures as text tables, and a report as one HTML file that needs nothing else: no network, no script."""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

import metrics
from scores import TEMPLATES

# What a column of numbers may hold: 97.3, 1,234, -0.2, 95.1–98.4, 97.3 ± 0.4, 1e-3, 58 of 60.
NUMBERS = re.compile(r"[-+−±<≤]? ?\d[\d.,\s%±–/()\[\]x×e+−-]*(of [\d,]+)?")


@dataclass(frozen=True)
class Table:
    """rows: each as long as header, the first cell its name.

    Shown: a str as it is; an int with thousands' commas; a float with one decimal, or with three where no float of the
    column is beyond -1..1; None, a figure of too few samples, as a dash that says so.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


@dataclass(frozen=True)
class Picture:
    """image: a PNG or JPEG file's bytes; alt: what it shows, in words, for those who cannot see it."""

    caption: str
    image: bytes
    alt: str


@dataclass(frozen=True)
class Section:
    """text: plain, a blank line between paragraphs."""

    heading: str
    text: str
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def top1_table(evaluations: dict[str, dict]) -> str:
    """Text table of top-1 in %, a row per kind with its number of queries, columns mean and best per evaluation.

    `evaluations`: title -> details of `evaluate`, all of the same queries.
    """
    first = next(iter(evaluations.values()))
    kinds = first["per_kind"]
    # What a crop cannot see at all drags the overall figure down: FACECOM's sunny has its own row and its own rest.
    others = [kind for kind in kinds if kind != "sunny"]

    def without_sunny(details: dict, template: str) -> float:
        per_kind = [details["per_kind"][kind] for kind in others]
        queries = sum(kind["queries"] for kind in per_kind)
        return sum(kind["top1"][template] * kind["queries"] for kind in per_kind) / queries if queries else math.nan

    rows = [
        (kind, kinds[kind]["queries"], [d["per_kind"][kind]["top1"] for d in evaluations.values()]) for kind in kinds
    ]
    if 0 < len(others) < len(kinds):
        rest = [{t: without_sunny(d, t) for t in TEMPLATES} for d in evaluations.values()]
        rows.append(("without sunny", sum(kinds[kind]["queries"] for kind in others), rest))
    rows.append(("all", first["queries"], [details["top1"] for details in evaluations.values()]))

    first_width = max(15, *(len(kind) + 2 for kind in kinds))
    width = max(15, *(len(title) + 2 for title in evaluations))
    lines = [
        f"{'top-1, %':<{first_width}}{'queries':>8}" + "".join(f"{title:>{width}}" for title in evaluations),
        f"{'template':<{first_width}}{'':>8}" + f"{'mean   best':>{width}}" * len(evaluations),
    ]
    for name, queries, values in rows:
        cells = (f"{100 * value['mean']:.1f}  {100 * value['best']:>5.1f}" for value in values)
        lines.append(f"{name:<{first_width}}{queries:>8}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def figures_table(measured: dict[str, metrics.Measured]) -> str:
    """Text table in %, a row per group with its number of queries: rank-1 with its 95 % interval, then the others.

    A dash: too few samples for that figure.
    """

    def cell(figure: dict) -> str:
        return f"{100 * figure['value']:.1f}" if figure["value"] is not None else "-"

    first_width = max(15, *(len(group) + 2 for group in measured))
    short = {name: name.replace("@FAR=", "@").replace("@FPIR=", "@") for name in metrics.FIGURES}
    widths = {name: max(7, len(short[name]) + 2) for name in metrics.FIGURES}
    header = f"{'%':<{first_width}}{'queries':>8}{'rank-1 [95 % interval]':>24}"
    lines = [header + "".join(f"{short[name]:>{widths[name]}}" for name in metrics.FIGURES[1:])]
    for group, of_group in measured.items():
        rank1 = of_group.figures["rank-1"]
        interval = f"[{100 * rank1['low']:.1f}, {100 * rank1['high']:.1f}]" if rank1["low"] is not None else ""
        row = f"{group:<{first_width}}{len(of_group.values['rank-1']):>8}{cell(rank1):>8} {interval:>15}"
        lines.append(row + "".join(f"{cell(of_group.figures[n]):>{widths[n]}}" for n in metrics.FIGURES[1:]))
    return "\n".join(lines)


def comparison_table(differences: dict[str, dict[str, dict]]) -> str:
    """Text table in points: group -> figure -> {value, low, high} of `metrics.compare`; a star where 0 is outside."""
    names = ("rank-1", "mAP", "TAR@FAR=0.001", "DIR@FPIR=0.01")
    first_width = max(15, *(len(group) + 2 for group in differences))
    lines = [f"{'points':<{first_width}}" + "".join(f"{name:>26}" for name in names)]
    for group, of_group in differences.items():
        cells = []
        for name in names:
            found = of_group.get(name)
            if found is None:
                cells.append("-")
            elif found["low"] is None:
                cells.append(f"{100 * found['value']:+.1f}")
            else:
                star = "*" if found["low"] > 0 or found["high"] < 0 else " "
                cells.append(
                    f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]{star}"
                )
        lines.append(f"{group:<{first_width}}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def encoded(figure: Figure) -> tuple[str, bytes]:
    """The suffix and content of a light file: JPEG where the figure shows photos, else PNG of 256 colours, a third of
    the size and no visible loss."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png")
    image = Image.open(file).convert("RGB")
    if any(shown.get_array().ndim == 3 for axes in figure.axes for shown in axes.images):  # (H, W, 3)
        image.save(small, format="jpeg", quality=88, optimize=True)
        return ".jpg", small.getvalue()
    image.quantize(256).save(small, format="png", optimize=True)
    return ".png", small.getvalue()


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """HTML5 page with a table of contents, to be written in UTF-8; every text is escaped, none is taken as HTML.

    Raises ValueError if a row has another length than its header or a picture is no PNG or JPEG.
    """
    contents = [f'<li><a href="#s{n}">{_text(s.heading)}</a></li>' for n, s in enumerate(sections, 1)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # Should escaping ever fail: no script runs and nothing is fetched.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            f"<title>{_text(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            f'<header><h1>{_text(title)}</h1><p class="subtitle">{_text(subtitle)}</p></header>',
            f'<nav aria-label="Contents"><ol>{"".join(contents)}</ol></nav>',
            "<main>",
            *(_section(f"s{number}", section) for number, section in enumerate(sections, 1)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(anchor: str, section: Section) -> str:
    paragraphs = [f"<p>{_text(text.strip())}</p>" for text in re.split(r"\n\s*\n", section.text) if text.strip()]
    pictures = [_picture(picture) for picture in section.pictures]
    return "\n".join(
        [
            f'<section id="{anchor}" aria-labelledby="{anchor}-heading">',
            f'<h2 id="{anchor}-heading">{_text(section.heading)}</h2>',
            *paragraphs,
            *(_table(table) for table in section.tables),
            *([f'<div class="pictures">{"".join(pictures)}</div>'] if pictures else []),
            "</section>",
        ]
    )


def _table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            what = f"{table.caption}: a row of {len(row)} cells under a header of {len(table.header)}"
            raise ValueError(f"{what}: {list(row)}; expected as many")
    columns = [_column([row[place] for row in table.rows]) for place in range(len(table.header))]
    aligned = [' class="number"' if numbers else "" for _, numbers in columns]
    head = [f'<th scope="col"{a}>{_text(name)}</th>' for name, a in zip(table.header, aligned, strict=True)]
    body = []
    for cells in zip(*(cells for cells, _ in columns), strict=True):
        first = f'<th scope="row"{aligned[0]}>{cells[0]}</th>'
        rest = [f"<td{a}>{cell}</td>" for cell, a in zip(cells[1:], aligned[1:], strict=True)]
        body.append(f"<tr>{first}{''.join(rest)}</tr>")
    caption = _text(table.caption)
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>\n'
        f"<thead><tr>{''.join(head)}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div></figure>"
    )


def _column(values: Sequence[str | float | None]) -> tuple[list[str], bool]:
    """The cells of a column as HTML, and whether they are numbers, which stand right-aligned."""
    largest = max((abs(value) for value in values if isinstance(value, float)), default=0)
    decimals = 3 if largest <= 1 else 1
    cells, numbers = [], True
    for value in values:
        if value is None:
            cells.append('<span title="too few samples">–</span>')
            continue
        if isinstance(value, str):
            numbers = numbers and NUMBERS.fullmatch(value) is not None
        elif isinstance(value, float):
            value = f"{value:,.{decimals}f}"
        else:
            value = f"{value:,}"
        cells.append(_text(value))
    return cells, numbers


def _picture(picture: Picture) -> str:
    """A click, or the space bar, shows it large; without a script that is a hidden checkbox."""
    try:
        with Image.open(io.BytesIO(picture.image), formats=["PNG", "JPEG"]) as image:
            (width, height), kind = image.size, image.format.lower()
    except UnidentifiedImageError as error:
        raise ValueError(f"{picture.caption}: no PNG or JPEG, it begins with {picture.image[:8]!r}") from error
    alt = _text(picture.alt)
    data = base64.b64encode(picture.image).decode("ascii")
    shape = ' class="wide"' if width > 1.8 * height else ""
    return (
        f'<figure{shape}><label><input type="checkbox" aria-label="Enlarge: {alt}"><span class="frame">'
        f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{alt}">'
        f"</span></label><figcaption>{_text(picture.caption)}</figcaption></figure>\n"
    )


def _text(text: str) -> str:
    """Escaped for text and attributes; what UTF-8 cannot hold, such as a file name's stray byte, becomes a ?."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --ground: #ffffff; --band: #f4f6f8; --link: #0059a3;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #a0a9b3; --line: #3b434c; --ground: #15181c; --band: #1f242a; --link: #7fc1ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 0; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.8rem 0 0.6rem; padding-top: 0.9rem; }
h2 { border-top: 1px solid var(--line); }
p { max-width: 68ch; margin: 0.7rem 0; }
a { color: var(--link); }
.subtitle { color: var(--soft); font-size: 1.05rem; margin-top: 0.4rem; }
nav { margin: 1.2rem 0; padding: 0.7rem 1rem; background: var(--band); border-radius: 0.4rem; }
nav ol { margin: 0; padding-left: 1.6rem; columns: 18rem; }
figure { margin: 1.4rem 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 0.9rem; max-width: 75ch; margin: 0.4rem 0; }

.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 36rem; }
.scroll, .frame { border: 1px solid var(--line); border-radius: 0.4rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.65rem; text-align: left; white-space: nowrap; background: var(--ground); }
tbody tr:nth-child(even) > * { background: var(--band); }
tbody th { font-weight: 500; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--band); border-bottom: 1px solid var(--line); }
th.number, td.number { text-align: right; }
@media (min-width: 40rem) {  /* on a telephone the names would cover the figures */
  th:first-child { position: sticky; left: 0; }
  thead th:first-child { z-index: 2; }
}

.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); }
.pictures { gap: 1rem 1.6rem; align-items: start; }
.pictures figure { margin: 0.8rem 0; }
.pictures .wide, .pictures figure:has(:checked) { grid-column: 1 / -1; }
label { display: block; position: relative; cursor: zoom-in; }
label input { position: absolute; opacity: 0; }
.frame { display: block; width: fit-content; max-width: 100%; overflow: auto; padding: 0.5rem; background: #ffffff; }
.frame img { display: block; width: auto; max-width: 100%; height: auto; margin: 0 auto; }
:checked + .frame { width: auto; cursor: zoom-out; }
:checked + .frame img { max-width: none; min-width: 100%; }
:focus-visible + .frame, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }

@media print {
  :root { --ink: #000000; --soft: #333333; --line: #bbbbbb; --ground: #ffffff; --band: #ffffff; --link: #000000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { max-height: none; overflow: visible; }
  .scroll, .frame { border: 0; padding: 0; }
  table { font-size: 8.5pt; }
  th, td, th:first-child { position: static; padding: 0.1rem 0.4rem; }
  .pictures { display: block; }
  .frame img, :checked + .frame img { min-width: 0; max-width: 100%; max-height: 11cm; }
  tr, .pictures figure { break-inside: avoid; }
  h2, figcaption:first-child { break-after: avoid; }  /* a picture's caption comes last */
}
"""
