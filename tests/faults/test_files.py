"""Faults in what comes from outside: files of a study damaged or forged, weights, images, and what is typed.

Each property is of all that hypothesis thinks of: one message (InputError), or a value that is right. How many faults
were tried is printed at the end of the run.
"""

import json
import re
import struct
import warnings
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from synthetic import study

from ablations.analysis.comparisons import compare
from ablations.commands import options as commands
from ablations.reporting import compose, sections
from ablations.reporting.words import pays, sentences
from ablations.study import arms, evaluation, reading, schema, store
from ablations.study.recipes import Recipe
from core import vit
from core.data import pictures, sets
from core.errors import InputError
from core.transforms.registry import REGISTRY
from core.weights import checkpoints, pretrained

NASTY = [
    "", " ", "0", "-1", "1e999", "nan", "inf", "-inf", "0x10", "1_0", "1e3", "2" * 30, str(2**64), "9" * 5000, "None",
    "True", "[]", "{}", "(" * 5000, "__import__('os').abort()", "[bold]", "[/]", "../..", "/", "a\nb", "ä", "\udcff",
    "%s", "{0}", "-", "--", "+", "@", "=", ".", ",",
]  # fmt: skip
WORDS = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@contextmanager
def refusable(*names):
    """Lets a refusal pass that is one message, of one line, with one of these in it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        if len(text.splitlines()) > 1 or len(text) > 1010 or not any(name in text for name in names or ("",)):
            raise AssertionError(f"not one message: {error}") from error


def tries(count):
    """A property of so many examples."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet)


# Files of a study


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study with every kind of file that is read back."""
    folder = study(tmp_path_factory.mktemp("faults") / "study", seeds=2, epochs=2)
    store.write_json(folder / "margins.json", {"margins": {"accuracy": 1.0}, "looks": 2})
    profile = {
        "arm": "flash", "device": "cpu", "steps": 3, "wall_ms": 2.0, "profiled_ms": 3.0, "at_ms": [0.0, 1.0],
        "live": [8, 16], "operations": [{"name": "mm", "category": "other", "calls": 1, "ms": 1.0, "mib": 0.1}],
    }  # fmt: skip
    at = store.profile_folder(folder, "flash")
    at.mkdir()
    store.write_json(at / "profile.json", profile)
    compose.write([folder])
    return folder


READ = [
    "study.json", "timing.json", "margins.json", "cells/mrt/seed1/result.json", "cells/mrt/seed1/metrics.jsonl",
    "cells/mrt/seed1/correct.npz", "cells/mrt/seed1/tokens.png", "cells/flash/profile/profile.json",
]  # fmt: skip


def damaged(content, kind, at, bit, other):
    """A file's content after a fault."""
    at %= max(len(content), 1)
    if kind == "flipped":
        return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
    return {
        "emptied": b"", "truncated": content[:at], "zeroed": content[:at] + bytes(len(content) - at),
        "longer": content + other, "other": other, "of another": b"{}",
    }[kind]  # fmt: skip


@given(
    name=st.sampled_from(READ),
    kind=st.sampled_from(["flipped", "emptied", "truncated", "zeroed", "longer", "other", "of another"]),
    at=st.integers(0, 1 << 20),
    bit=st.integers(0, 7),
    other=st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()),
)
@tries(150)
def test_a_damaged_file_is_told_and_nothing_else_changes(tried, whole, name, kind, at, bit, other):
    path, intact = whole / name, (whole / name).read_bytes()
    before = {cell.key: cell.result for cell in reading.read([whole]).cells}
    broken = damaged(intact, kind, at, bit, other)
    path.write_bytes(broken)
    try:
        with refusable(*["study.json"] * (name == "study.json") or ["never"]):
            comparisons = compare([whole])
            said = [*pays(comparisons), *sentences(comparisons)]
            after = {cell.key: cell.result for cell in comparisons.study.cells}
            assert all(before[key] == result for key, result in after.items())
            unharmed = name.endswith(".png") or same(intact, broken)
            assert unharmed or any(name in text for text in said), said
            assert unharmed or "seed1" not in name or ("mrt", 1) not in after
            if "seed1" in name and not name.endswith(".png"):
                assert reading.finished(path.parent) == (("mrt", 1) in after)
    finally:
        path.write_bytes(intact)
    tried["damaged files of a study"] += 1


def same(intact, broken):
    """Whether a fault left what a file says as it was: blanks, or the name of the seal."""
    if intact == broken:
        return True
    try:
        before, after = (schema.sealed(json.loads(content)) for content in (intact, broken))
    except (ValueError, AttributeError):
        return False
    return {k: before[k] for k in before if k != schema.SEAL} == {
        k: after[k] for k in before if k in after and k != schema.SEAL
    }


@given(data=st.data())
@tries(300)
def test_forged_values_are_refused_or_told(tried, whole, data):
    """Valid JSON without a seal, one of its values another: nothing raises but InputError, and no number that is not
    finite is told."""
    name = data.draw(st.sampled_from([n for n in READ if n.endswith((".json", ".jsonl"))]))
    path, intact = whole / name, (whole / name).read_bytes()
    lines = intact.splitlines() if name.endswith("l") else [intact]
    value = json.loads(lines[0])
    value.pop(schema.SEAL, None)
    inner = value
    while True:
        key = data.draw(st.sampled_from(sorted(inner)))
        if isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        break
    if data.draw(st.booleans()):
        inner[key] = data.draw(JSON)
    else:
        del inner[key]
    result = path.with_name("result.json").read_bytes() if name.endswith("l") else b""
    path.write_bytes(b"\n".join([json.dumps(value).encode(), *lines[1:]]))
    if result:  # without the digests, the lines themselves are judged
        plain = {k: v for k, v in json.loads(result).items() if k not in ("files", schema.SEAL)}
        path.with_name("result.json").write_text(json.dumps(plain))
    try:
        with refusable():
            comparisons = compare([whole])
            told = [*pays(comparisons), *sentences(comparisons), *sections.arms(comparisons)]
            told += [*sections.verdicts(comparisons), *sections.effects(comparisons), sections.terms(comparisons)]
            told += sections.against_baseline(comparisons, comparisons.target)
            words = {word for line in told if "Left out" not in line for word in re.split(r"[^a-z]+", line)}
            assert not words & {"nan", "inf"}
    finally:
        path.write_bytes(intact)
        if result:
            path.with_name("result.json").write_bytes(result)
    tried["forged values in a study"] += 1


@given(st.binary(max_size=200))
@tries(200)
def test_a_line_of_metrics_is_a_row_or_damaged(tried, line):
    with refusable("metrics.jsonl"):
        assert 0 <= schema.parse(line, schema.Line, "metrics.jsonl")["val/accuracy"] <= 1
    tried["lines of metrics"] += 1


# Weights


CONFIG = vit.VitConfig(image=8, patch=4, width=8, depth=1, heads=2, mlp=16, classes=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A cell's checkpoint."""
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    recipe = Recipe(image=8, width=8, depth=1, heads=2, mlp=16, device="cpu", engine="eager", precision="fp32")
    about = {
        "arm": "baseline", "seed": 0, "accuracy": 0.5, "data": "digits", "classes": ["a", "b", "c"], "mean": [0.5] * 3,
        "std": [0.2] * 3, "config": vars(CONFIG), "recipe": vars(recipe),
    }  # fmt: skip
    checkpoints.save(path, vit.init(CONFIG, 0), about)
    return path


def loads(path):
    """Whether both readers take the file; they may refuse it in one line."""
    taken = []
    for load in (evaluation.load, lambda path: pretrained.load.__wrapped__(str(path))):
        taken.append(False)
        with refusable():
            found = load(path)
            assert all(p.isfinite().all() and p.is_floating_point() for p in found.params.values())
            taken[-1] = True
    return taken


def test_the_checkpoint_is_taken(weights):
    assert loads(weights) == [True, True]


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), cut=st.booleans())
@tries(150)
def test_a_damaged_checkpoint_is_refused(tried, weights, at, bit, cut):
    content, other = weights.read_bytes(), weights.with_name("other.safetensors")
    at %= len(content)
    other.write_bytes(content[:at] if cut else content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :])
    with refusable():
        params, _ = checkpoints.load(other)
        intact, _ = checkpoints.load(weights)
        assert all(torch.equal(params[name], intact[name]) for name in intact)  # a blank of the header
    loads(other)
    tried["damaged checkpoints"] += 1


HEADERS = [
    "{", "null", "[]", "[" * 10_000, '{"a":' * 10_000, '"x"', "1", "{}", '{"config": null}', '{"config": {"heads": 0}}',
    '{"config": {"heads": "2"}}', '{"config": {"eps": NaN}}', '{"mean": 3}', '{"mean": [1]}', '{"std": [0, 0, 0]}',
    '{"mean": [1e999, 0, 0]}', '{"config": {"heads": 99999999999999999999}}',
]  # fmt: skip


@given(header=st.sampled_from(HEADERS) | JSON.map(json.dumps))
@tries(60)
def test_a_hostile_header_is_one_message(tried, weights, header):
    import safetensors.torch

    other = weights.with_name("header.safetensors")
    other.write_bytes(safetensors.torch.save(vit.init(CONFIG, 0), {"about": header}))
    assert not loads(other)[0]
    tried["headers of checkpoints"] += 1


@given(data=st.data())
@tries(100)
def test_a_forged_description_is_refused_or_evaluated(tried, weights, data):
    params, about = checkpoints.load(weights)
    inner = data.draw(st.sampled_from([about, about["config"], about["recipe"]]))
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON | st.sampled_from([0, -1, 10**7, 10**30]))
    other = weights.with_name("about.safetensors")
    checkpoints.save(other, params, about)
    loads(other)
    tried["forged descriptions of checkpoints"] += 1


@pytest.mark.parametrize(
    "change",
    [
        {"head.bias": torch.full((3,), torch.nan)},
        {"head.weight": torch.ones(3, 8, dtype=torch.int64)},
        {"cls_token": torch.zeros(())},
        {"cls_token": torch.zeros(0, 0, 0)},
        {"patch_embed.proj.weight": torch.zeros(8)},
        {"pos_embed": torch.zeros(1, 4, 8)},
        {"blocks.x.norm1.weight": torch.zeros(8)},
        {"blocks.999999999.norm1.weight": torch.zeros(8)},
        {"blocks.0.attn.q.weight": torch.zeros(8, 8)},
        {"blocks.0.mlp.fc1.weight": torch.zeros(16)},
    ],
)
def test_weights_that_are_none_are_refused(tried, weights, change):
    params, about = checkpoints.load(weights)
    other = weights.with_name("none.safetensors")
    checkpoints.save(other, params | change, about)
    assert not loads(other)[0]
    tried["weights that are none"] += 1


def test_a_pickle_is_not_loaded(tried, weights):
    """Neither as weights nor as a cell's file."""
    other = weights.with_name("pickle.safetensors")
    torch.save({"a": torch.zeros(1)}, other)
    assert loads(other) == [False, False]
    tried["weights that are none"] += 1


def test_a_header_that_claims_more_than_there_is(tried, weights):
    other = weights.with_name("claims.safetensors")
    for length in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        other.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')
        assert loads(other) == [False, False]
        tried["weights that are none"] += 1


# Images


def encoded(kind):
    """A small picture in a format."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


PICTURES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM")}


@given(
    kind=st.sampled_from(sorted(PICTURES)),
    faults=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=6),
    cut=st.none() | st.integers(0, 1 << 12),
)
@tries(300)
def test_a_damaged_image_is_named_or_decoded(tried, tmp_path_factory, kind, faults, cut):
    content = bytearray(PICTURES[kind])
    for at, value in faults:
        content[at % len(content)] = value
    file = tmp_path_factory.getbasetemp() / "damaged.png"
    file.write_bytes(bytes(content)[: None if cut is None else cut % len(content)])
    with refusable("damaged.png"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pictures._open(str(file)).mode == "RGB"
    tried["damaged images"] += 1


# What is typed


PARTS = st.one_of(st.sampled_from([*REGISTRY, "baseline", "bf16", "fp32", "published"]), WORDS)
ARMS = st.lists(st.tuples(PARTS, st.none() | WORDS), min_size=1, max_size=4).map(
    lambda parts: "+".join(name if value is None else f"{name}@{value}" for name, value in parts)
)


@given(ARMS)
@tries(400)
def test_an_arm_is_refused_or_has_one_name(tried, text):
    with refusable():
        arm = arms.parse(text)
        assert arms.parse(arm.name).name == arm.name
        arms.select(text)
    tried["names of arms"] += 1


@given(st.lists(st.tuples(st.sampled_from([*REGISTRY, "x", ""]), WORDS | st.sampled_from(["weight", "norm"]), WORDS)))
@tries(200)
def test_settings_are_refused_or_read(tried, parts):
    with refusable():
        for base, values in arms.read_settings([f"{a}.{b}={c}" for a, b, c in parts]).items():
            arms.parse(base, {base: values})
    tried["settings"] += 1


def settable():
    """Every setting of every optimization."""
    import inspect

    return [f"{name}.{p}" for name, t in REGISTRY.items() for p in inspect.signature(t.build).parameters]


@given(st.sampled_from(settable()), WORDS)
@tries(300)
def test_a_value_of_a_setting_is_refused_or_taken(tried, name, value):
    with refusable():
        base = name.partition(".")[0]
        parameters = arms.read_settings([f"{name}={value}"])
        arm = arms.parse(base if base != "crs" or "ratio" in name else "crs@0.5", parameters)
        arm.ops.config(vit.VitConfig(image=32, patch=4, width=8, depth=2, heads=2, mlp=16, classes=3))
    tried["values of settings"] += 1


NAMES = [*vars(Recipe()), "seeds", "first_seed", "arms", "until", "margin", "max_minutes"]
OPTIONS = [f"--{name.replace('_', '-')}" for name in NAMES]
DIGITS = sets.outline("digits")
CONSOLE = Console(file=open("/dev/null", "w"), markup=False)  # noqa: SIM115


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), min_size=1, max_size=3))
@tries(200)
def test_a_command_line_is_refused_or_read(tried, options):
    words = [word for pair in options for word in pair]
    with refusable(), suppress(SystemExit):  # tyro's refusals
        command = commands.read(["--preset", "quick", "--device", "cpu", *words], CONSOLE)
        recipe = command.recipe.resolve_machine().resolve_data(DIGITS)
        recipe.plain_config(arms.parse("baseline"), DIGITS)
        recipe.optimizer(10)
        commands.each(command)
    tried["command lines"] += 1
