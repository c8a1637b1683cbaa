"""The code in docs/api.md and the notebook run as they stand, one block after another."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
from commands import hurry

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "api.md").read_text()


def test_every_block_of_the_api_page_runs():
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
    assert len(blocks) == TEXT.count("```python") >= 7
    namespace: dict[str, object] = {}
    for block in blocks:
        first = TEXT.count("\n", 0, block.start(1))  # so that a failure names the page's line
        exec(compile("\n" * first + block[1], "docs/api.md", "exec"), namespace)


def test_the_pages_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert len(links) >= 6
    assert [link for link in links if not (DOCS / link).exists()] == []


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Each cell ends in what it shows."""
    hurry(monkeypatch)
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(DOCS / "study.ipynb", as_version=4)
    nbformat.validate(notebook)
    namespace, shown = {}, []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            *body, last = ast.parse(cell.source).body
            exec(compile(ast.Module(body, []), "docs/study.ipynb", "exec"), namespace)
            shown.append(eval(compile(ast.Expression(last.value), "docs/study.ipynb", "eval"), namespace))
    assert [type(table) for table in shown] == [pd.DataFrame] * 3 + [pd.Series]
    assert "verdict" in shown[0]
