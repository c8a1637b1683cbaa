"""The README's example of a new optimization, followed to the letter in a copy of the tree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_passes_the_laws(tmp_path):
    file, line = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for folder in ("core", "ablations", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "core/transforms/activity.py").write_text(file)
    registry = tmp_path / "core/transforms/registry.py"
    text = registry.read_text().replace(
        "from core.transforms.decatt", "from core.transforms.activity import activity\nfrom core.transforms.decatt"
    )
    registry.write_text(text.replace("] = {\n", "] = {\n" + line))
    command = [sys.executable, "-m", "pytest", "tests/laws.py", "-k", "activity", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 10
