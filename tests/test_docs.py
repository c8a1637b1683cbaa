"""The code in docs/api.md and the notebook run as they stand, one block after another."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TEXT = (Path(__file__).parents[1] / "docs/api.md").read_text()


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
    assert [link for link in links if not (Path(__file__).parents[1] / "docs" / link).exists()] == []


def test_the_notebook_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    notebook = nbformat.read(root / "docs/study.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    tables = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(tables) == 3
    assert "verdict" in tables[0]
