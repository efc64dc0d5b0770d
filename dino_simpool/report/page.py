"""The HTML around the contents: style sheet, sections, tables, tiles. Text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence

from dino_simpool.names import shown_lines

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #fff; --ink: #16181d; --soft: #5d6470; --rule: #e2e2dd;
  --s1: #2a6fd6; --s2: #c8571b; --mark: #eef3fb; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1b1e23; --ink: #e9eaec; --soft: #9aa1ac;
  --rule: #2e333a; --s1: #6aa5f4; --s2: #f0935a; --mark: #202a38; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 40px 0 4px; }
p { margin: 0 0 12px; max-width: 80ch; overflow-wrap: anywhere; } .soft { color: var(--soft); } .small { font-size: .85rem; }
.tiles, .charts, .cards { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin-top: 20px; }
.charts, .cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.cards.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px; min-width: 0; }
.card + .card, .missing + .card, .charts + .card, details .charts { margin-top: 12px; }
.tiles .card, .charts .card, .cards .card { margin-top: 0; }
.tile .value { font-size: 1.9rem; font-weight: 650; line-height: 1.15; }
.tile .name { color: var(--soft); font-size: .85rem; }
.card h3 { font-size: .95rem; margin: 0; } .card h3 + p { margin: 0 0 6px; }
.chart { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--soft); }
.chart .grid { stroke: var(--rule); } .chart .reference { stroke: var(--soft); stroke-dasharray: 4 3; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .strong { font-weight: 650; font-size: 12px; fill: var(--ink); }
.chart .hit { fill: transparent; } .chart .hit:hover { fill: var(--ink); }
.chart .line.s1 { stroke: var(--s1); } .chart .end.s1, .chart text.s1 { fill: var(--s1); }
.chart .line.s2 { stroke: var(--s2); } .chart .end.s2, .chart text.s2 { fill: var(--s2); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; } th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; } td.main { font-weight: 650; background: var(--mark); }
.missing { border-left: 3px solid var(--s2); padding-left: 10px; color: var(--soft); margin: 12px 0; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .78rem; line-height: 1.3; margin-top: 3px; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
.crops { display: grid; grid-template-columns: 35% 1fr; gap: 10px; align-items: start; }
.views { display: flex; flex-wrap: wrap; gap: 8px; align-items: flex-end; }
.scale { display: inline-block; width: 110px; height: 10px; border-radius: 5px; vertical-align: middle; margin: 0 4px; }
details summary { cursor: pointer; color: var(--soft); } pre { overflow-x: auto; font-size: .82rem; margin: 10px 0 0; }
"""


def escape(text: str) -> str:
    """Text of any kind, such as the name of a file, as HTML that shows it."""
    return html.escape(shown_lines(text))


def document(title: str, body: str) -> str:
    """A complete HTML page that loads nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, content: str, note: str = "") -> str:
    """A heading, a sentence and contents in HTML."""
    said = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}\n{content}</section>\n"


def missing(text: str) -> str:
    """A note on what is missing, and how to get it."""
    return f'<p class="missing">{escape(text)}</p>'


def tile(name: str, value: str, note: str) -> str:
    """One important number."""
    return (
        f'<div class="card tile"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="name">{escape(note)}</div></div>'
    )


def card(title: str, note: str, content: str) -> str:
    """A box with a heading, a line under it and contents in HTML."""
    return f'<div class="card"><h3>{escape(title)}</h3><p class="soft small">{escape(note)}</p>{content}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, main: int | None = None) -> str:
    """A table of text cells.   main: number of the column to highlight."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in rows:
        cells = (f"<td{' class=main' if i == main else ''}>{escape(cell)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="card scroll"><table>{"".join(lines)}</table></div>'


def charts(cards: Sequence[str]) -> str:
    """Cards with charts, side by side."""
    return f'<div class="charts">{"".join(cards)}</div>'


def lines(text: str) -> str:
    """Text of many lines, shown as it is."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, content: str) -> str:
    """Contents in HTML that open on a click."""
    return f'<details class="card"><summary>{escape(title)}</summary>{content}</details>'
