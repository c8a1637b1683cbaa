"""A study goes on with the same code, data and weights, or says what differs."""

import json
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from synthetic import study

from ablations import library
from ablations.analysis.comparisons import compare
from ablations.reporting.words import sentences
from ablations.study import identity, reading, schema, store
from ablations.study.presets import PRESETS
from core import code, vit
from core.data import sets
from core.errors import InputError
from core.foreign import sources
from core.weights import checkpoints

MODEL = """from torch import nn

def build(classes):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, classes))
    nn.init.constant_(net[1].weight, {value})
    return net
"""
RECIPE = vars(PRESETS["quick"])
MACHINE = {"torch": "2", "device_name": "a processor", "threads": "1"}
SAME = {"code": "c" * 64, "data": "d" * 64, "weights": None}


def opened(out, same=SAME, accept=False, **recipe):
    settings = json.loads(json.dumps({"preset": "quick", **RECIPE, **recipe}))
    made = {"configuration": settings, "environment": MACHINE, "identity": same}
    store.open_study(out, made | {"parts": 5, "parameters": {"baseline": 1}}, accept)


@pytest.mark.parametrize("key", ["code", "data", "weights"])
def test_what_differs_is_named_and_can_be_accepted(tmp_path, key):
    opened(tmp_path / "s")
    opened(tmp_path / "s")
    other = SAME | {key: "e" * 64}
    with pytest.raises(InputError, match=rf"\({key} .* -> eeeeeeeeeeee\); pass another --out, .*--accept-changes"):
        opened(tmp_path / "s", other)
    opened(tmp_path / "s", other, accept=True)
    assert store.read_study(tmp_path / "s")["identity"] == other
    opened(tmp_path / "s", other)


def test_a_setting_that_an_earlier_version_did_not_have_is_its_default(tmp_path):
    opened(tmp_path / "s")
    kept = store.read_study(tmp_path / "s")
    del kept["configuration"]["mixup"]
    store.write_json(tmp_path / "s" / "study.json", kept)
    opened(tmp_path / "s", mixup=0.0)
    with pytest.raises(InputError, match=r"mixup 0.0 -> 0.1"):
        opened(tmp_path / "s", mixup=0.1)
    assert store.read_study(tmp_path / "s") == kept  # cells tell a digest of it


def test_settings_count_in_any_order(tmp_path):
    opened(tmp_path / "s", set=("decatt.weight=150", "mrt.scorer=blur"))
    opened(tmp_path / "s", set=("mrt.scorer=blur", "decatt.weight=1", "decatt.weight=150.0"))
    with pytest.raises(InputError, match="set .*weight=150"):
        opened(tmp_path / "s", set=("decatt.weight=15", "mrt.scorer=blur"))
    opened(tmp_path / "t", set=("rubbish",))
    with pytest.raises(InputError, match=r"/t' holds a study with other settings \(set \['rubbish'\] -> \['mrt.scorer"):
        opened(tmp_path / "t", set=("mrt.scorer=blur",))


def test_every_source_file_counts(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("x = 1")
    found = [identity.sources(tmp_path)]
    (tmp_path / "core" / "a.py").write_text("x = 2")
    found.append(identity.sources(tmp_path))
    (tmp_path / "core" / "a.py").rename(tmp_path / "core" / "b.py")
    found.append(identity.sources(tmp_path))
    (tmp_path / "core" / "b.pyc").write_text("")
    assert len({*map(tuple, found)}) == 3
    assert identity.sources(tmp_path) == found[-1]


def test_a_users_files_count_as_they_ran_and_not_those_of_other_studies(tmp_path):
    files = [tmp_path / name / "mine.py" for name in "ab"]
    for file, value in zip(files, (1, 2), strict=True):
        file.parent.mkdir()
        file.write_text(f"x = {value}")
        os.utime(file, (1e9, 1e9))
        assert code.run(str(file), "plugin").x == value
    both = identity.code(files)
    assert len({both, identity.code(files[:1]), identity.code(files[1:]), identity.code()}) == 4
    assert identity.code(files[::-1]) == both
    files[0].write_text("x = 3")  # of the same size
    os.utime(files[0], (1e9, 1e9))
    identity.code(files[1:])
    with pytest.raises(InputError, match=r"a/mine.py' was changed since this process ran it; start"):
        identity.code(files)
    assert code.run(str(files[0]), "plugin").x == 3
    assert identity.code(files) != both


def test_what_a_users_file_imports_counts_and_not_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helpers_of_mine").mkdir()
    for name, text in {
        "mine.py": "import torch, json\nfrom helpers_of_mine import part, VALUE",
        "helpers_of_mine/__init__.py": "VALUE = 1",
        "helpers_of_mine/part.py": "from .deep import x",
        "helpers_of_mine/deep.py": "x = 1",
        "helpers_of_mine/unused.py": "x = 1",
    }.items():
        (tmp_path / name).write_text(text)
    file, found = tmp_path / "mine.py", []
    for text in ("x = 1", "x = 22"):
        (tmp_path / "helpers_of_mine" / "deep.py").write_text(text)
        for name in [name for name in sys.modules if name.startswith("helpers_of_mine")]:
            monkeypatch.delitem(sys.modules, name)
        for path in code.imported.get(file, ()):
            del code.ran[path]
        code.run(str(file), "plugin")
        found.append(identity.code([file]))
    assert found[0] != found[1]
    assert [path.name for path in code.imported[file]] == ["__init__.py", "part.py", "deep.py"]
    (tmp_path / "helpers_of_mine" / "unused.py").write_text("x = 2")
    assert identity.code([file]) == found[1]
    (tmp_path / "helpers_of_mine" / "part.py").write_text("")
    with pytest.raises(InputError, match=r"part.py' was changed since this process ran it"):
        identity.code([file])


def test_every_image_label_and_class_counts(image_folder, tmp_path):
    data = sets.load(f"folder:{image_folder}", tmp_path)
    plain = replace(data, pixels=None)
    assert data.digest() == plain.digest()  # the cache's digests are those of the images
    changed = data.val.images.clone()
    changed[-1, 0, 0, 0] += 1
    others = [
        replace(plain, val=data.val._replace(images=changed)),
        replace(plain, val=data.val._replace(labels=data.val.labels.flip(0))),
        replace(plain, classes=("dark", "bright")),
        replace(plain, train=data.val, val=data.train),
    ]
    assert len({data.digest(), *(other.digest() for other in others)}) == 5
    digits = sets.load("digits")
    assert replace(digits, fifth=digits.fifth.flip(0)).digest() != digits.digest()


def test_weights_count_by_value(tmp_path):
    config = vit.VitConfig(image=8, patch=4, width=8, depth=1, heads=2, mlp=16, classes=2)
    params = vit.init(config, 0)
    found = []
    for name, state in (("a", params), ("b", params), ("c", params | {"norm.bias": torch.ones(8)})):
        checkpoints.save(tmp_path / f"{name}.safetensors", state, {"config": vars(config)})
        found.append(identity.pretrained.load.__wrapped__(str(tmp_path / f"{name}.safetensors")).digest())
    assert found[0] == found[1] != found[2]


def test_what_a_model_of_others_begins_with_counts(tmp_path):
    """Weights that a function of a file reads are in no file that is known here."""
    image_data, found = sets.outline("digits", image=8), []
    for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.25)):
        (tmp_path / f"{name}.py").write_text(MODEL.format(value=value))
        config = sources.load(f"module:{tmp_path}/{name}.py:build", 8, 3, 10)
        found.append(identity.of(image_data, None, config, ())["weights"])
    assert found[0] == found[1] != found[2]


def test_the_version_of_the_package_that_a_model_is_of_counts(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="the extra test is not installed")
    config, found = sources.load("timm:vit_tiny_patch16_224", 32, 3, 10), []
    for version in (timm.__version__, timm.__version__, "0.0"):
        monkeypatch.setattr(timm, "__version__", version)
        found.append(identity.of(sets.outline("digits", image=8), None, config, ())["code"])
    assert found[0] == found[1] != found[2]


def test_from_python_weights_are_those_of_their_file_now(tmp_path, monkeypatch):
    file, found = tmp_path / "w.safetensors", []
    monkeypatch.setattr(library, "execute", lambda *_: found.append(identity.pretrained.load(str(file)).digest()))
    monkeypatch.setattr(library, "load", lambda *_, **__: None)
    config = vit.VitConfig(image=8, patch=4, width=8, depth=1, heads=2, mlp=16, classes=2)
    for seed in (0, 1):
        checkpoints.save(file, vit.init(config, seed), {"config": vars(config)})
        library.run(tmp_path / "s", weights=str(file))
    assert found[0] != found[1]


def made_by(folder, arm, seed, same):
    path = store.cell_folder(folder, arm, seed)
    store.write_result(path, json.loads((path / "result.json").read_text()) | {"identity": same})


def test_a_report_names_cells_of_other_code(tmp_path):
    folder = study(tmp_path / "s", seeds=2, epochs=2)
    for arm in ("baseline", "flash", "mrt", "flash+mrt"):
        for seed in (0, 1):
            made_by(folder, arm, seed, SAME | {"code": "f" * 64} if (arm, seed) == ("mrt", 1) else SAME)
    said = "\n".join(sentences(compare([folder])))
    assert "**Not made by the same as the other cells:** `mrt` seed 1: code cccccccccccc -> ffffffffffff." in said
    assert "**Timed under others than the cells were made by:** code cccccccccccc -> unknown" in said
    timing = json.loads((folder / "timing.json").read_text())
    store.write_json(folder / "timing.json", timing | {"identity": SAME})
    assert "Timed under others" not in "\n".join(sentences(compare([folder])))


@pytest.mark.parametrize("key", ["data", "weights"])
def test_studies_of_other_data_or_weights_are_not_joined(tmp_path, key):
    folders = [study(tmp_path / name, ["baseline"], seeds=2, epochs=2) for name in ("a", "b")]
    for seed, folder in zip((1, 0), folders, strict=True):
        shutil.rmtree(store.cell_folder(folder, "baseline", seed))
    assert len(reading.read(folders).cells) == 2
    made_by(folders[0], "baseline", 0, SAME)
    made_by(folders[1], "baseline", 1, SAME | {key: "0" * 64})
    with pytest.raises(InputError, match=f"cannot be joined: digest of {key} .* pass them one at a time"):
        reading.read(folders)


def test_a_cell_of_other_settings_is_left_out(tmp_path):
    """Copied from another study, of the same shape."""
    folder = study(tmp_path / "s", ["baseline", "mrt"], seeds=1, epochs=2)
    for arm, of in (("baseline", "own"), ("mrt", "other")):
        path = store.cell_folder(folder, arm, 0)
        found = {"own": schema.settings(store.read_study(folder)), "other": "0" * 64}[of]
        store.write_result(path, json.loads((path / "result.json").read_text()) | {"settings": found})
    read = reading.read([folder])
    assert list(read.arms) == ["baseline"]
    assert "cells/mrt/seed0' is not as study.json has it (settings 000000000000…, not " in read.damaged[0]
