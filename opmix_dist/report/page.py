"""The page itself: its one template, and HTML pieces in which every string is escaped.

The page loads nothing: plotly.js is embedded, and a content security policy lets no other script run and no
request leave, whatever a run directory may hold.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs


class Strong(str):
    """A table cell to emphasise."""


class Html(str):
    """Text that is markup already; every other string is escaped."""


def escape(text: str) -> Html:
    return text if isinstance(text, Html) else Html(html.escape(text))


def element(tag: str, *children: str, css: str = "") -> Html:
    """``<tag class="css">children</tag>``."""
    attribute = f' class="{html.escape(css)}"' if css else ""
    return Html(f"<{tag}{attribute}>{''.join(map(escape, children))}</{tag}>")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """The first column holds names, the others numbers."""
    head = element("tr", *(element("th", cell) for cell in header))
    body = [element("tr", *map(_cell, row)) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", *body)), css="scroll")


def _cell(text: str) -> Html:
    return element("td", element("strong", text) if isinstance(text, Strong) else text)


def section(title: str, *parts: str) -> Html:
    return element("section", element("h2", title), *parts)


def subsection(title: str, *parts: str) -> Html:
    return element("div", element("h3", title), *parts, css="sub")


def caption(text: str) -> Html:
    return element("p", text, css="caption")


def problem(text: str) -> Html:
    """Something that is missing or went wrong."""
    return element("p", text, css="problem")


def card(value: str, label: str, note: str = "") -> Html:
    parts = [element("b", value), element("span", label), element("small", note)]
    return element("div", *parts, css="card")


class Figures:
    """Collects the page's figures and hands out the places where they appear."""

    def __init__(self) -> None:
        self._figures: list[go.Figure] = []

    def place(self, figure: go.Figure) -> Html:
        self._figures.append(figure)
        height = int(figure.layout.height)
        return Html(
            f'<div class="chart" id="figure-{len(self._figures) - 1}" style="height:{height}px"></div>'
        )

    def grid(self, figures: Iterable[go.Figure]) -> Html:
        """Small charts side by side, as many as the window has room for."""
        return element("div", *map(self.place, figures), css="grid")

    def json(self) -> str:
        """JSON that cannot end the script element that holds it."""
        text = "[" + ",".join(figure.to_json() for figure in self._figures) + "]"
        return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def render(title: str, subtitle: str, parts: Iterable[Html], figures: Figures) -> bytes:
    """The whole page in UTF-8."""
    plotly = get_plotlyjs()
    text = _PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        body="\n".join(parts),
        figures=figures.json(),
        style=_STYLE,
        plotly=plotly,
        draw=_DRAW,
        hashes=f"{_hash(plotly)} {_hash(_DRAW)}",
    )
    return text.encode("utf-8", "replace")  # JSON on disk may hold halves of surrogate pairs


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src $hashes; \
style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<header><h1>$title</h1><p class="lead">$subtitle</p></header>
<noscript><p class="problem">The charts need JavaScript; the tables do not.</p></noscript>
$body
</main>
<script type="application/json" id="figures">$figures</script>
<script>$plotly</script>
<script>$draw</script>
</body>
</html>
""")

_STYLE = """
:root { --page: #f6f7f9; --panel: #ffffff; --ink: #1c2430; --soft: #5d6875; --line: #e3e7ec; --warn: #a4500f;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151a; --panel: #191f26; --ink: #e4e8ed; --soft: #98a3af; --line: #2b333d;
    --warn: #e8a25c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 1.5rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.lead { font-size: 1.2rem; color: var(--soft); margin: 6px 0 24px; }
h2 { font-size: 1.15rem; font-weight: 600; margin: 0 0 4px; }
h3 { font-size: 1rem; font-weight: 600; margin: 24px 0 2px; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin: 18px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.card b { display: block; font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { display: block; }
.card small { display: block; color: var(--soft); line-height: 1.3; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr));
  gap: 8px 16px; }
.chart { min-width: 0; margin-top: 8px; }
.caption { color: var(--soft); font-size: 0.9rem; max-width: 75ch; margin: 2px 0 8px; }
.problem { color: var(--warn); overflow-wrap: anywhere; margin: 6px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  margin-top: 12px; }
th { color: var(--soft); font-weight: 500; }
th, td { text-align: right; padding: 6px 0 6px 22px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: 0.82rem; line-height: 1.45; }
"""

_DRAW = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const css = getComputedStyle(document.documentElement);
  const [ink, soft, line, panel, font] =
    ["--ink", "--soft", "--line", "--panel", "--font"].map(name => css.getPropertyValue(name).trim());
  const axis = { gridcolor: line, zerolinecolor: soft, zerolinewidth: 1, automargin: true,
                 title: { font: { color: soft, size: 12 }, standoff: 8 } };
  return { layout: {
    font: { family: font, size: 12, color: ink }, paper_bgcolor: "#0000", plot_bgcolor: "#0000",
    title: { font: { size: 14 }, x: 0, xref: "paper", xanchor: "left" }, xaxis: axis, yaxis: axis,
    hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink }, align: "left", namelength: -1 },
    legend: { orientation: "h", x: 0, y: -0.22, yanchor: "top", traceorder: "normal" },
    margin: { l: 50, r: 24, t: 10, b: 44 } } };
}
function draw() {
  const template = theme();
  figures.forEach((figure, i) => Plotly.react("figure-" + i, figure.data, { ...figure.layout, template },
                                              { displayModeBar: false, responsive: true }));
}
draw();
dark.addEventListener("change", draw);
"""
