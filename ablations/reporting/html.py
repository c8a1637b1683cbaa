"""A report as one HTML page that works without a network: the first section open, the others unfolded by a click."""

import base64
import hashlib
import re
from html import escape
from io import BytesIO
from pathlib import Path

import markdown
from PIL import Image

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --band: #f4f6f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: 86rem; color: var(--ink); background: #fff;
       font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.4rem; margin: 0; }
h1 + p { color: var(--soft); font-size: .85rem; margin: .1rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: .6rem 0 .3rem; }
p, li { max-width: 75rem; }
section p { color: var(--soft); font-size: .85rem; margin: .4rem 0; }
section ul { margin: .4rem 0 1rem; padding-left: 1.1rem; font-size: .92rem; }
section td:last-child { white-space: normal; min-width: 26rem; }
details { border-top: 1px solid var(--line); }
summary { padding: .5rem 0; cursor: pointer; }
summary:hover { color: var(--accent); }
summary h2 { display: inline; font-size: 1.05rem; margin: 0; }
.table { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; cursor: pointer; }
th:hover { color: var(--accent); }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
th:first-child, td:first-child { position: sticky; left: 0; background: inherit; }
tr { background: #fff; }
tbody tr:nth-child(even) { background: var(--band); }
code { font: .92em ui-monospace, "SF Mono", Consolas, monospace; background: var(--band); padding: .05em .3em;
       border-radius: 3px; }
td code { background: none; padding: 0; }
pre { overflow-x: auto; padding: 1rem; background: var(--band); font-size: .8rem; }
figure { margin: .8rem 0 1.5rem; }
figure img, figure svg { max-width: 100%; height: auto; }
figure img { image-rendering: pixelated; }
svg g:has(> title):hover { filter: brightness(.75) drop-shadow(0 0 1px var(--ink)); }
figcaption { color: var(--soft); font-size: .88rem; max-width: 75rem; }
.better, .no-worse { color: #00694e; } .worse { color: #b03a00; } .undecided, .not-timed { color: #7a5c00; }
@page { margin: 12mm; }
@media print { summary { break-after: avoid; }
               body { max-width: none; padding: 0; font-size: 10pt; } figure, tr { break-inside: avoid; }
               details::details-content { content-visibility: visible; } td { white-space: normal; }
               .table { overflow: visible; } table { font-size: 7pt; } th, td { padding: .15rem .25rem; } }
"""

# A click on a heading sorts its table: the first column as text, others by the first number in a cell.
_SCRIPT = """
const number = text => parseFloat((text.replace(/\\u2212/g, "-").replace(/[,>+]/g, "").match(/-?\\d[\\d.]*/) || [])[0]);
for (const table of document.querySelectorAll("table")) table.querySelectorAll("th").forEach((head, column) => {
  const sort = () => {
    const body = table.tBodies[0], rows = [...body.rows], up = head.ariaSort !== "ascending";
    const text = row => row.cells[column].textContent;
    const named = column === 0 || rows.every(row => isNaN(number(text(row))));
    const value = row => { const x = number(text(row)); return isNaN(x) ? Infinity : x; };
    rows.sort((a, b) => named ? text(a).localeCompare(text(b), "en", { numeric: true }) : value(a) - value(b) || 0);
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.ariaSort = up ? "ascending" : "descending";
    body.append(...(up ? rows : rows.reverse()));
  };
  head.tabIndex = 0;
  head.title = "sort by this column";
  head.onclick = sort;
  head.onkeydown = event => { if (event.key === "Enter") sort(); };
});
"""
_REFERRING = (
    *("html", "link", "reference", "short_reference", "autolink", "automail"),
    *("image_link", "image_reference", "short_image_ref"),
)
_VERDICT = re.compile("<strong>(better|no worse|worse|undecided|not timed)</strong>")


def render(text: str, folder: Path) -> str:
    """A Markdown report as HTML; pictures in `folder`/figures become part of the page.

    Whatever a study's names hold is shown as text: HTML, links and other pictures in the Markdown stay as they are
    written, and no script runs but the page's own.
    """
    converter = markdown.Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")
    for name in _REFERRING:
        converter.inlinePatterns.deregister(name)
    body = converter.convert(text)
    body = re.sub(r"<p>!\[(.*?)\]\((.*?)\)</p>", lambda m: _figure(m[1], folder / m[2], folder), body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub("; (?=(accuracy|time|memory) <strong>)", "<br>", body)
    body = _VERDICT.sub(lambda m: f'<strong class="{m[1].replace(" ", "-")}">{m[1]}</strong>', body)
    head, *sections = re.split(r"(?=<h2>)", body)
    folded = [re.sub(r"<h2>.*?</h2>", r"<summary>\g<0></summary>", part, count=1) for part in sections[1:]]
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(_SCRIPT)}'"
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(text.partition(chr(10))[0].removeprefix('# '))}</title>\n<style>{_STYLE}</style>\n</head>",
        f"<body>\n{head}",
        *(f"<section>\n{part}</section>" for part in sections[:1]),
        *(f"<details>\n{part}</details>" for part in folded),
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _figure(caption: str, path: Path, folder: Path) -> str:
    """A picture within the page, as SVG where there is one; nothing for a path outside the report's figures."""
    if path.resolve().parent != (folder / "figures").resolve() or not path.is_file():
        return ""
    if (drawing := path.with_suffix(".svg")).is_file():
        shown = drawing.read_text()
    else:
        packed = BytesIO()
        with Image.open(path) as picture:
            picture.thumbnail((1400, 1400))
            picture.save(packed, "webp", quality=85)
        shown = f'<img alt="" src="data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
