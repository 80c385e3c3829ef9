"""Writes pages of one file: no script, nothing from elsewhere, light and dark as the reader's system is."""

import html
import re
import string
from collections.abc import Iterable, Sequence

from pipeline.pages import figures
from pipeline.pages.figures import Draw

METADATA = re.compile("<metadata>.*?</metadata>", re.DOTALL)  # of an SVG file, with addresses from elsewhere
NAMES = re.compile(r'(?<= )id="|href="#|url\(#')  # of parts of an SVG, and where they are used
PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --ground: #fff; --line: #d5dade; --soft: #5a6570; --warn: #fff3cd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --ground: #15181c; --line: #363d45; --soft: #a0aab4; --warn: #4a3c0b; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.note { color: var(--soft); }
p.warning { background: var(--warn); border-radius: .3rem; padding: .6rem .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.dark { display: none; }
@media (prefers-color-scheme: dark) { .dark { display: block; } .light { display: none; } }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(title: str, parts: Iterable[str]) -> str:
    """Returns a whole page; `parts` are HTML."""
    return PAGE.substitute(title=html.escape(title), body="\n".join([f"<h1>{html.escape(title)}</h1>", *parts]))


def heading(text: str) -> str:
    """Returns a heading within the page."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """Returns a paragraph; `kind` is empty, `note` or `warning`."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, first_number: int | None = 1) -> str:
    """Returns a table whose columns from `first_number` on are set to the right (None: none)."""

    def line(cells: Sequence[str], tag: str) -> str:
        shown = []
        for column, cell in enumerate(cells):
            is_number = first_number is not None and column >= first_number
            shown.append(f"<{tag}{' class=number' if is_number else ''}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(shown)}</tr>"

    header = line(head, "th") if any(head) else ""
    return f'<div class="scroll"><table>{header}{"".join(line(row, "td") for row in rows)}</table></div>'


def figure_grid(drawings: Iterable[tuple[str, Draw]]) -> str:
    """Returns figures with their titles, each drawn for a light and for a dark page."""
    shown = []
    for title, draw in drawings:
        svgs = "".join(
            f'<div class="{theme}" role="img" aria-label="{html.escape(title)}">{_svg(draw, title, theme)}</div>'
            for theme in figures.INK
        )
        shown.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{svgs}</figure>")
    return f'<div class="figures">{"".join(shown)}</div>'


def _svg(draw: Draw, title: str, theme: str) -> str:
    """Returns a drawing without what only a file of its own needs; names within it are unique on the page."""
    text = METADATA.sub("", figures.drawn(draw, theme).decode())
    prefix = f"{re.sub('[^a-z]', '', title.lower())}-{theme}-"
    return NAMES.sub(lambda found: found[0] + prefix, text[text.index("<svg") :])
