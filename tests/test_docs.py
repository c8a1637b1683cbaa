"""The code in docs/api.md runs as it stands, one block after another."""

import re
from pathlib import Path

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
