import itertools
from dataclasses import replace

import pytest
import torch

from ablations.study import arms
from ablations.study.presets import PRESETS
from ablations.study.recipes import Recipe
from core.errors import InputError
from core.layers import EXACT
from core.transforms.decatt import decatt
from core.transforms.registry import REGISTRY, Transform


def test_baseline_is_the_unmodified_model():
    assert arms.parse("baseline").ops is EXACT


def test_one_canonical_spelling():
    spellings = {arms.parse("+".join(order)).name for order in itertools.permutations(("flash", "decatt"))}
    assert spellings == {"decatt+flash"}
    assert arms.parse("flash@sdpa").name == "flash"
    assert arms.parse("flash@tiled+decatt@0.50").name == "decatt@0.5+flash@tiled"


def test_settings_apply_below_the_name():
    settings = arms.read_settings(["decatt.weight=150", "decatt.norm=frobenius", "decatt.weight=3"])
    assert settings == {"decatt": {"weight": 3.0, "norm": "frobenius"}}
    assert arms.parse("decatt", settings).name == "decatt"
    assert arms.parse("decatt@3", settings).name == "decatt"
    assert arms.parse("decatt@4", settings).name == "decatt@4"


def test_lists_in_settings_are_read():
    assert arms.read_settings(["decatt.layers=(0, -1)"]) == {"decatt": {"layers": (0, -1)}}
    assert arms.read_settings(["decatt.layers=all"]) == {"decatt": {"layers": "all"}}
    assert arms.read_settings(["mrt.image=64", "mrt.patch_norm=False", "mrt.weights=None"]) == {
        "mrt": {"image": 64, "patch_norm": False, "weights": None}
    }


def test_lattice_is_every_combination_of_levels(monkeypatch):
    sampling = Transform(decatt, "unbiased gradient", "for the test", levels=(0.5, 0.3))
    three = {**{n: REGISTRY[n] for n in ("flash", "decatt")}, "crs": sampling}
    monkeypatch.setattr(arms, "REGISTRY", three)
    names = arms.lattice()
    assert len(names) == len(set(names)) == 2 * 2 * 3
    assert names[0] == "baseline"
    assert {"flash", "crs@0.3", "crs@0.5+decatt+flash"} <= set(names)
    assert [name.count("+") for name in names] == sorted(name.count("+") for name in names)


def test_a_precision_is_a_part_of_an_arm():
    arm = arms.parse("flash+bf16")
    assert (arm.name, arm.precision, len(arm.transforms)) == ("bf16+flash", "bf16", 1)
    assert Recipe(precision="fp32").dtype(arm) == torch.bfloat16
    for name, message in (("bf16+fp32", "two precisions"), ("bf16@1", "write bf16")):
        with pytest.raises(InputError, match=message):
            arms.parse(name)
    with pytest.raises(InputError, match="bf16 is the precision of the whole study"):
        Recipe(precision="bf16").dtype(arm)


def chosen(text):
    selected, refused = arms.select(text)
    assert not refused
    return [arm.name for arm in selected]


def test_combinations_that_cannot_be_are_left_out_and_named(monkeypatch):
    """An added optimization that replaces what mrt replaces runs with the others; asked for by name it is refused."""
    monkeypatch.setitem(arms.REGISTRY, "tiny", replace(REGISTRY["uniform"], control=None))
    selected, refused = arms.select("all")
    names = {arm.name for arm in selected}
    assert {"tiny", "flash+tiny", "decatt+tiny", "mrt", "uniform"} <= names
    assert len(refused) == 2 * len([name for name in names if "mrt" in name.split("+") and "flash" in name.split("+")])
    assert all({"mrt", "tiny"} <= set(name.split("+")) for name in refused)
    assert not names & refused.keys()
    assert "uniform both replace the model's tokenize" in refused["mrt+tiny"]
    with pytest.raises(InputError, match="both replace the model's tokenize"):
        arms.select("baseline,mrt+tiny")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("baseline", "baseline"), ("baseline-again", "baseline"), ("flash", "baseline"), ("flash@tiled", "baseline"),
        ("flash+recompute", "baseline"), ("crs@0.3+flash", "crs@0.3"), ("bf16+flash", "bf16"), ("mrt", "mrt"),
    ],
)  # fmt: skip
def test_twins(name, other):
    assert arms.twin(name) == other


def test_select():
    assert chosen("flash, baseline,flash+decatt,decatt+flash") == ["flash", "baseline", "decatt+flash"]
    controls = ["recompute", "flash+recompute", "uniform", "flash+uniform"]
    assert chosen("controls") == controls
    assert not {"readout", "droppath", "recompute"} & {part for arm in arms.lattice() for part in arm.split("+")}
    assert chosen("all") == chosen("all,controls") == [*arms.lattice(), arms.AGAIN, *controls]
    assert len(chosen("published")) == 8
    finetune, _ = arms.select("finetune", arms.read_settings(PRESETS["finetune"].set))
    assert [a.name for a in finetune] == ["baseline", "crs@0.5", "crs@0.3", "recompute", "bf16"]
    assert finetune[1].parameters["crs"]["scope"] == "published"
    assert set(arms.PUBLISHED) <= set(arms.lattice())


def test_more_are_alone_and_with_flash(monkeypatch):
    """Whatever is registered outside the lattice; what needs weights is left out without, and named."""
    monkeypatch.setitem(arms.REGISTRY, "tiny", replace(REGISTRY["uniform"], control=None, lattice=False))
    selected, refused = arms.select("baseline,more")
    names = [arm.name for arm in selected]
    assert names[:5] == ["baseline", "readout", "flash+readout", "droppath", "droppath+flash"]
    assert names[-2:] == ["tiny", "flash+tiny"]
    assert refused.keys() == {"lora", "lora+flash"}
    assert refused["lora"].startswith("arm 'lora': lora is for pretrained weights; pass --weights, or leave it out (")
    with pytest.raises(InputError, match="lora is for pretrained weights; pass --weights"):
        arms.select("baseline,lora")
    everything, refused = arms.select("more", pretrained=True)
    assert not refused
    assert {"lora", "flash+lora"} <= {arm.name for arm in everything}
    assert {arm.name for arm in arms.select("all,more")[0]} == {*chosen("all"), *names}


def test_a_lattice_of_named_ones():
    assert chosen("lattice:flash,readout") == ["baseline", "readout", "flash", "flash+readout"]
    assert chosen("mrt,lattice:flash,crs@0.3") == ["mrt", "baseline", "flash", "crs@0.3", "crs@0.3+flash"]
    assert chosen("lattice:crs") == ["baseline", "crs@0.5", "crs@0.3"]
    assert chosen("lattice:crs@0.3,crs@0.7,flash")[2:4] == ["crs@0.3", "crs@0.7"]
    assert chosen("lattice:flash,bf16") == ["baseline", "flash", "bf16", "bf16+flash"]
    assert len(chosen("lattice:flash,readout,droppath")) == 8
    selected, refused = arms.select("lattice:flash,crs@0.3,recompute")
    assert len(selected) == 6
    assert refused.keys() == {"crs@0.3+recompute", "crs@0.3+flash+recompute"}


def test_half_a_lattice_balances_every_three_factors():
    """Resolution IV of four factors: in the plan's half, as in the whole, every setting of any three is there alike."""
    names = chosen("half:flash,readout,droppath,decatt")
    assert len(names) == 8
    assert names[0] == "baseline"
    for three in itertools.combinations(("flash", "readout", "droppath", "decatt"), 3):
        assert len({frozenset(three) & set(name.split("+")) for name in names}) == 8
    assert len(chosen("half:flash,readout,droppath,decatt,tome,muon")) == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lattice:flash,flush", "unknown optimization 'flush'"),
        ("latice:flash", "unknown group 'latice'; legal: lattice, half; did you mean 'lattice'"),
        ("half:flash,readout,tome", "half of a lattice of 3 factors does not tell main effects from interactions"),
        ("half:flash,readout,tome,crs", "takes factors of two levels: write one value for each, such as crs@0.3"),
    ],
)
def test_bad_lattices_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        arms.select(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flsh", "unknown optimization 'flsh'; legal: .*; did you mean 'flash'"),
        ("", "unknown optimization ''"),
        ("flash+", "unknown optimization ''"),
        ("baseline+flash", "'baseline' stands alone"),
        ("flash+flash@tiled", "has flash twice"),
        ("readout@2", "'readout@2' has a value, and readout takes none; write readout"),
        ("mrt+uniform", "mrt and uniform both replace the model's tokenize"),
        ("flash@titled", "unknown flash backend 'titled'.*did you mean 'tiled'"),
        ("decatt@much", "decatt weight 'much' is not a number"),
        ("decatt@-1", "decatt weight -1.0 must be finite"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        arms.parse(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decatt.wieght=1", "unknown decatt parameter 'wieght'; legal: weight, norm, layers; did you mean 'weight'"),
        ("decat.weight=1", "unknown optimization 'decat'"),
        ("decatt=1", "cannot read setting 'decatt=1'; write NAME.PARAMETER=VALUE"),
        ("decatt.weight=x", "decatt weight 'x' is not a number"),
        ("mrt.image=16.0", "mrt image '16.0' is not a whole number"),
        ("mrt.patch_norm=maybe", "unknown mrt patch_norm 'maybe'; legal: True, False"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        arms.read_settings([text])


def test_a_required_parameter_must_be_given(monkeypatch):
    def sampling(ratio: float):
        return lambda ops: ops

    monkeypatch.setitem(arms.REGISTRY, "crs", Transform(sampling, "unbiased gradient", "x", levels=(0.5,)))
    with pytest.raises(InputError, match=r"'crs' needs its ratio: write for example crs@0.5"):
        arms.parse("crs")
    assert arms.parse("crs@0.30").name == "crs@0.3"


def test_near_values_have_names_of_their_own():
    near, _ = arms.select("crs@0.3000001,crs@0.3,crs@0.9999999,decatt@1e20,decatt@123456789e9")
    names = ["crs@0.3000001", "crs@0.3", "crs@0.9999999", "decatt@1e20", "decatt@1.23456789e17"]
    assert [arm.name for arm in near] == names
    assert all(arms.parse(arm.name).parameters == arm.parameters for arm in near)
