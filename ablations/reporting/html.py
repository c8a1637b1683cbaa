"""A report as one self-contained HTML page: Markdown rendered, figures embedded."""

import base64
import re
from html import escape
from pathlib import Path

import markdown

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --band: #f4f6f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 86rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p, li { max-width: 62rem; }
li { margin: .35rem 0; }
nav { margin: 1.2rem 0; font-size: .92rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; list-style: none; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: inherit; }
tr { background: #fff; }
tbody tr:nth-child(even) { background: var(--band); }
code { font: .92em ui-monospace, "SF Mono", Consolas, monospace; background: var(--band); padding: .05em .3em;
       border-radius: 3px; }
td code { background: none; padding: 0; }
pre { overflow-x: auto; padding: 1rem; background: var(--band); font-size: .8rem; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .88rem; max-width: 62rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
               figure, tr { break-inside: avoid; } .table { overflow: visible; } table { font-size: 7pt; } }
"""


def render(text: str, folder: Path) -> str:
    """A Markdown report as HTML; pictures, with paths relative to `folder`, become part of the page."""
    converter = markdown.Markdown(extensions=["tables", "fenced_code", "toc"], extension_configs={"toc": _CONTENTS})
    body = converter.convert(text)
    body = re.sub(r"<p><img alt=\"([^\"]*)\" src=\"([^\"]*)\" ?/?></p>", lambda m: _figure(m[1], folder / m[2]), body)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = body.replace("</h1>", f"</h1>\n<nav>{getattr(converter, 'toc', '')}</nav>", 1)
    title = text.partition("\n")[0].removeprefix("# ")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


_CONTENTS = {"toc_depth": "2-2"}


def _figure(caption: str, path: Path) -> str:
    """A picture within the page; caption: HTML already."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
