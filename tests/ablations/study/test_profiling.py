import gzip
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from ablations.study import profiling
from ablations.study.profiling import Operation, Profile
from core import rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.measure import peak_bytes
from core.optimizers import AdamW
from core.step import State, make_step, objective, start

N = 96
PRODUCT = 4 * N * N  # bytes of a float32 matrix


def a_state(device="cpu"):
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return State({"w": torch.ones(N, N, device=device)}, {}, zero, torch.zeros(2, device=device))


def a_batch(device="cpu"):
    return torch.ones(N, N, device=device), torch.zeros(1, device=device)


ARGUMENTS = 2 * PRODUCT + 8 + 2 * 4 + 4


def products(count):
    """A step of so many products of N x N matrices, all kept to its end."""

    def step(state, batch):
        return state, [batch[0] @ state.params["w"] for _ in range(count)]

    return step


def listed(state, batch):
    """A step that updates a list of tensors."""
    return state, torch._foreach_lerp([batch[0]] * 3, [state.params["w"]] * 3, 0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    steps = {"baseline": products(5), "few": products(2), "listed": listed}
    folders = {arm: out / arm / "profile" for arm in steps}
    for arm, step in steps.items():
        profiling.profile(step, a_state(), a_batch(), folders[arm], arm)
    return folders


def test_calls_and_bytes_are_those_of_the_step(folders):
    made = profiling.load(folders["baseline"])
    (mm,) = [o for o in made.operations if o.name == "aten::mm"]
    assert (mm.category, mm.calls, mm.mib) == ("matrix product", 5, 5 * PRODUCT / 2**20)
    assert not any(o.name.startswith(("[memory]", "ProfilerStep", "vit-ablations")) for o in made.operations)
    assert list(made.live) == [ARGUMENTS + k * PRODUCT for k in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0)]
    assert made.at_ms[0] == 0
    assert list(made.at_ms) == sorted(made.at_ms)
    assert 0 < made.ms <= made.profiled_ms
    assert made.wall_ms > 0
    assert [o.ms for o in made.operations] == sorted((o.ms for o in made.operations), reverse=True)


def test_shares_sum_to_all(folders):
    made = profiling.load(folders["baseline"])
    for field in ("name", "category"):
        assert sum(ms for ms, _ in made.by(field).values()) == pytest.approx(made.ms)


def test_operations_on_lists_have_those_they_call_in_them(folders):
    made = profiling.load(folders["listed"])
    assert made.by("category")["optimizer"][1] == 1
    assert not any("lerp" in o.name and "_foreach_" not in o.name for o in made.operations)
    assert sum(o.mib for o in made.operations if o.category == "optimizer") == 3 * PRODUCT / 2**20


def test_the_trace_is_json_and_under_the_name_that_the_plugin_looks_for(folders):
    for name in ("trace.json.gz", "step.pt.trace.json.gz"):
        with gzip.open(folders["few"] / name, "rt") as handle:
            events = json.load(handle)["traceEvents"]
        assert sum(e.get("name") == "aten::mm" for e in events) == 3 * 2


def test_difference_from_the_baseline(folders):
    few, listed_, baseline = (profiling.load(folders[arm]) for arm in ("few", "listed", "baseline"))
    changes = {c.name: c for c in profiling.difference(few, baseline)["name"]}
    assert (changes["aten::mm"].arm[1], changes["aten::mm"].baseline[1], changes["aten::mm"].kind) == (2, 5, "changed")
    assert sum(c.ms for c in changes.values()) == pytest.approx(few.ms - baseline.ms)
    kinds = {c.name: c.kind for c in profiling.difference(listed_, baseline)["category"]}
    assert (kinds["optimizer"], kinds["matrix product"]) == ("new", "gone")
    for changed in profiling.difference(listed_, baseline).values():
        sizes = [abs(c.ms) for c in changed]
        assert sizes == sorted(sizes, reverse=True)


def test_a_training_step_has_the_peak_that_is_measured(config, batch, tmp_path):
    loss = objective(config, EXACT, lambda images, key: images)
    step = make_step(loss, AdamW(), EXACT)
    state = start(vit.init(config, 0), AdamW(), rng.key(0))
    made = profiling.profile(step, state, batch, tmp_path, "baseline", steps=1)
    assert max(made.live) == peak_bytes(step, state, batch, device=torch.device("cpu"))
    assert made.live[0] == made.live[-1]
    assert {"matrix product", "normalization", "optimizer", "elementwise"} <= set(made.by("category"))


def test_compiled_graphs_are_named_in_order_of_first_call(tmp_path):
    @torch.compile(fullgraph=True)
    def block(w, x):
        return F.gelu(F.layer_norm(x @ w, (N,))).square().mean()

    def step(state, batch):
        w = state.params["w"].detach().requires_grad_()
        return state, torch.autograd.grad(block(w, batch[0]), w)

    made = profiling.profile(step, a_state(), a_batch(), tmp_path, "compiled")
    calls = {name: calls for name, (_, calls) in made.by("name").items()}
    assert [calls[f"compiled_graph {i}"] for i in (1, 2)] == [1, 1]  # forward and backward
    assert calls["aten::mm"] == 2
    assert made.by("category")["fused (compiled)"][1] >= 2
    assert not any(re.search(r"Region: \d|CompiledFxGraph", name) for name in calls)


def event(name, kind=DeviceType.CPU, us=0.0, annotation=False, parent=None, kernel=None):
    return SimpleNamespace(
        name=name, device_type=kind, self_cpu_time_total=1e6, self_device_time_total=us, self_cpu_memory_usage=7,
        self_device_memory_usage=2**20, cpu_parent=parent, is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        kernels=[SimpleNamespace(name=kernel, duration=us)] if kernel else [],
    )  # fmt: skip


def test_on_cuda_the_time_of_every_kernel_counts_once():
    cuda = DeviceType.CUDA
    update = event("aten::_foreach_add", us=1000, kernel="multi_tensor_apply")
    events = [
        event(profiling._STEP),
        event("aten::mm", us=3000, kernel="nvjet_tst"),
        update,
        event("aten::add", us=500, parent=update, kernel="multi_tensor_apply"),
        event("triton_poi_fused_add_17", us=200, kernel="triton_poi_fused_add_17"),
        event("triton_poi_fused_add_4", us=300, kernel="triton_poi_fused_add_4"),
        event("nvjet_tst", cuda, 3000),
        event("multi_tensor_apply", cuda, 1000),
        event("multi_tensor_apply", cuda, 500),
        event("triton_poi_fused_add_17", cuda, 200),
        event("triton_poi_fused_add_4", cuda, 300),
        event("flash_fwd_kernel", cuda, 600),  # launched by no operation, as in a CUDA graph
        event("nvjet_tst", cuda, 400),
        event(profiling._STEP, cuda, 9999, annotation=True),
    ]
    made = {o.name: o for o in profiling._operations(events, cuda=True, steps=2)}
    expected = {
        "aten::mm": 1.5,
        "aten::_foreach_add": 0.75,
        "triton_poi_fused_add": 0.25,
        "flash_fwd_kernel": 0.3,
        "nvjet_tst": 0.2,
    }
    assert {name: o.ms for name, o in made.items() if o.ms} == pytest.approx(expected)
    assert [made[name].calls for name in expected] == [0.5, 0.5, 1, 0.5, 0.5]
    assert (made["nvjet_tst"].category, made["flash_fwd_kernel"].category) == ("matrix product", "attention kernel")
    assert (made["aten::_foreach_add"].calls, made["aten::_foreach_add"].mib) == (0.5, 1.0)
    assert made["triton_poi_fused_add"].category == "fused (compiled)"


@pytest.mark.gpu
def test_cuda(tmp_path):
    made = profiling.profile(products(5), a_state("cuda"), a_batch("cuda"), tmp_path, "baseline")
    assert made.by("name")["aten::mm"][1] == 5
    assert max(made.live) - made.live[0] == 5 * PRODUCT
    with (tmp_path / "memory_snapshot.pickle").open("rb") as handle:
        assert pickle.load(handle)["device_traces"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::addmm", "matrix product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention kernel"),
        ("_AttentionBackward", "attention kernel"),
        ("aten::native_layer_norm_backward", "normalization"),
        ("aten::_softmax", "reduction, loss"),
        ("aten::maximum", "elementwise"),
        ("aten::max", "reduction, loss"),
        ("aten::t", "copy, layout"),
        ("aten::tanh", "elementwise"),
        ("aten::scatter_add", "random, sort, index"),
        ("aten::searchsorted", "random, sort, index"),
        ("aten::_foreach_mul_", "optimizer"),
        ("triton_for_fused_0", "optimizer"),
        ("triton_red_fused_mm", "fused (compiled)"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "other"),
        ("something new", "other"),
    ],
)
def test_category(name, expected):
    assert profiling.category(name) == expected


def test_largest_change_first_whatever_its_sign():
    def made(**ms):
        return Profile("a", "cpu", 1, 1, 1, [Operation(n, "other", 1, t, 0) for n, t in ms.items()], [0], [0])

    changes = profiling.difference(made(x=1, y=9, z=3), made(x=6, y=8, w=2))["name"]
    assert [(c.name, c.ms, c.kind) for c in changes] == [
        ("x", -5, "changed"), ("z", 3, "new"), ("w", -2, "gone"), ("y", 1, "changed"),
    ]  # fmt: skip


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="0 profiled steps are too few: at least 1"):
        profiling.profile(listed, a_state(), a_batch(), tmp_path, "a", steps=0)
    with pytest.raises(InputError, match="profile.json' is not there"):
        profiling.load(tmp_path)


def test_a_failing_step_leaves_no_profile_behind(folders, tmp_path):
    def fails(state, batch):
        raise RuntimeError("broken")

    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(RuntimeError, match="broken"):
        profiling.profile(fails, a_state(), a_batch(), tmp_path, "a")
    assert not (tmp_path / "profile.json").exists()
