"""One self-contained HTML page: text, tables and figures, readable in light, dark and print, without anything external.

Every function takes plain text, escapes it, and returns markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from heterosync.study.figures.style import COLOURS, GRID, INK, MUTED, PAPER

#: Names of the page's colours: light, dark.
THEME = {
    "ink": (INK, "#e6e9ec"),
    "muted": (MUTED, "#9aa5b0"),
    "grid": (GRID, "#363e46"),
    "paper": (PAPER, "#14181c"),
    "wash": ("#f2f4f6", "#1d2329"),
    "accent": ("#0072b1", "#56b4e9"),
    "first": (COLOURS[0].lower(), "#2b95da"),  # the reference in a figure: brighter on dark paper
}

#: Tables up to this length are not broken between two printed pages.
ROWS_OF_A_PAGE = 40

_CSS = """
html { color-scheme: light dark; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--grid); }
h3 { margin-top: 1.8rem; } p, li { max-width: 48rem; }
nav ul { columns: 16rem; padding-left: 1.1rem; } a { color: var(--accent); }
.note { border-left: 4px solid var(--accent); background: var(--wash); padding: .5rem 1rem; max-width: 48rem; }
.note ul { margin: .3rem 0; padding-left: 1.1rem; }
figure { margin: 1rem 0 1.6rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption, caption { color: var(--muted); font-size: .88rem; text-align: left; max-width: 60rem; }
.wide { overflow-x: auto; max-height: 40rem; overflow-y: auto; margin: .6rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .3rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
.left1 :is(td, th):nth-child(-n+1), .left2 :is(td, th):nth-child(-n+2), .left3 :is(td, th):nth-child(-n+3),
.words :is(td, th) { text-align: left; }
thead th, .words td { white-space: normal; }
thead th { background: var(--wash); position: sticky; top: 0; }
tbody tr:hover { background: var(--wash); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .wide { max-height: none; overflow: visible; } table { font-size: 7pt; } th, td { padding: .1rem .3rem; }
  thead th { position: static; } h2, h3, caption, figcaption { break-after: avoid; }
  @page { margin: 12mm; } tr, .short { break-inside: avoid; }
  figure { break-inside: avoid; } figure svg { max-height: 23cm; }
}
"""


@dataclass
class Section:
    """A heading and the markup below it, part by part."""

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return "s-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str, items: Sequence[str] = ()) -> str:
    """A paragraph that must not be overlooked, with a list below it."""
    listed = "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""
    return f'<div class="note"><p>{escape(text)}</p>{listed}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", names: int | None = 1) -> str:
    """The first `names` columns (1 to 3) are set to the left, the others, numbers, to the right; None: all cells are
    text, to the left and wrapped."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    listed = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    body = "\n".join(listed)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = "words" if names is None else f"left{names}"
    inner = f"{told}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    fits = " short" if len(listed) <= ROWS_OF_A_PAGE else ""
    return f'<div class="wide{fits}"><table class="{kind}">{inner}</table></div>'


def figure(svg: Path, caption: str) -> str:
    """An SVG file of `figures` as part of the page, in the page's colours."""
    text = svg.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    opening, _, content = text[text.index("<svg") :].partition(">")
    box = re.search(r'viewBox="([0-9. ]+)"', opening)
    if box is None:
        raise ValueError(f"{svg} has no viewBox")
    own = re.sub(r"[^A-Za-z0-9]+", "-", svg.stem)  # ids of several figures in one page must differ
    content = re.sub(r'\bid="([^"]+)"', rf'id="{own}-\1"', content)
    content = re.sub(r'xlink:href="#', f'href="#{own}-', content).replace("xlink:href=", "href=")
    content = content.replace("url(#", f"url(#{own}-")
    for name in ("ink", "muted", "grid", "paper", "first"):
        content = content.replace(THEME[name][0], f"var(--{name})")
    width = float(box[1].split()[2]) * 4 / 3  # points to CSS pixels: never larger than drawn
    label = escape(caption, quote=True)
    return (
        f'<figure><svg role="img" aria-label="{label}" viewBox="{box[1]}" style="max-width:{width:.0f}px">{content}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document; `lead`: markup before the table of contents."""
    contents = "".join(f'<li><a href="#{each.anchor}">{escape(each.title)}</a></li>' for each in sections)
    body = "\n".join(
        f'<section id="{each.anchor}"><h2>{escape(each.title)}</h2>\n' + "\n".join(each.parts) + "</section>"
        for each in sections
    )
    light, dark = (
        "".join(f"--{name}: {colours[i]};" for name, colours in THEME.items()) for i in (0, 1)
    )  # print is always light: paper is
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
:root {{ {light} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
{_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(lead)}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
{body}
</body>
</html>
"""
