"""A report as one HTML page that works without a network: the first section open, the others unfolded by a click."""

import base64
import hashlib
import re
from html import escape
from io import BytesIO
from pathlib import Path

import markdown
from PIL import Image

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
_SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
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
        shown = drawing.read_text(encoding="utf-8")
    else:
        packed = BytesIO()
        with Image.open(path) as picture:
            picture.thumbnail((1400, 1400))
            picture.save(packed, "webp", quality=85)
        shown = f'<img alt="" src="data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
