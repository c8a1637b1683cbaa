"""What a transform is given at the model's sites: inputs, parameters, numbers, keys; and what lives how long."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core import rng, vit
from core.layers import EXACT
from core.model import parameters, shapes
from core.ops import Parameter, rewrite
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.flash import flash
from core.transforms.recompute import recompute


def double(params):
    return {n: p.double() for n, p in params.items()}


def test_a_penalty_gets_the_attention_outputs_before_the_projection(config, batch):
    """Every block's, by torch's own attention on the same q, k, v."""
    found, inputs, params = [], [], double(vit.init(config, 0))

    def penalty(inner, site, heads):
        found.append(heads)
        return inner(site, heads)

    def block(inner, site, x):
        inputs.append(x)
        return inner(site, x)

    ops = rewrite("look", wrap={"penalty": penalty, "block": block})(EXACT)
    vit.forward(params, batch[0].double(), config, ops)
    assert [tuple(h.shape) for h in found] == [(6, 2, 17, 8)] * 2
    for i, (x, heads) in enumerate(zip(inputs, found, strict=True)):
        own = {n.removeprefix(f"blocks.{i}."): p for n, p in params.items()}
        y = F.layer_norm(x, (16,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        q, k, v = F.linear(y, own["attn.qkv.weight"], own["attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (t.reshape(6, 17, 2, 8).transpose(1, 2) for t in (q, k, v))
        torch.testing.assert_close(heads, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-10)


def test_penalties_of_the_blocks_are_summed(config, batch):
    ops = rewrite(
        "number", wrap={"penalty": lambda inner, site, heads: inner(site, heads) + 2 + site.block}, positional=True
    )(EXACT)
    params = vit.init(config, 0)
    assert vit.forward(params, batch[0], config, ops).penalty.item() == 2 + 3
    assert vit.forward(params, batch[0], config).penalty.item() == 0


def test_what_a_transform_adds_to_the_carry_reaches_the_next_block(config, batch):
    found = []

    def block(inner, site, x):
        found.append(site.carry.get("sum"))
        after, carry = inner(site, x)
        return after, carry | {"sum": x.sum()}

    inputs = []

    def look(inner, site, x):
        inputs.append(x.sum())
        return inner(site, x)

    ops = rewrite("sums", wrap={"block": block, "attention": look})(EXACT)
    vit.forward(vit.init(config, 0), batch[0], config, ops)
    assert found[0] is None
    assert torch.equal(found[1], inputs[0])


def test_block_parameters_reach_their_block(config, batch):
    """A gain brought to every MLP branch is the model with these gains in the weights of the branch's last map."""
    gains = {f"blocks.{i}.mlp.gain": Parameter((1,), 3.0 + i) for i in range(config.depth)}
    ops = rewrite(
        "gain",
        wrap={"mlp": lambda inner, site, x: inner(site, x) * site.params["mlp.gain"]},
        parameters=lambda config: gains,
    )(EXACT)
    assert parameters(config, ops) == parameters(config) + config.depth
    params = double(vit.init(config, 0, ops))
    scaled = {n: params[n] for n in shapes(config)}
    for i in range(config.depth):
        for name in (f"blocks.{i}.mlp.fc2.weight", f"blocks.{i}.mlp.fc2.bias"):
            scaled[name] = scaled[name] * (3 + i)
    ours = vit.forward(params, batch[0].double(), config, ops).logits
    torch.testing.assert_close(ours, vit.forward(scaled, batch[0].double(), config).logits, rtol=0, atol=1e-10)


def test_a_site_has_the_parameters_of_its_block_or_of_the_rest(config, batch):
    found = {}

    def look(inner, site, x):
        found.setdefault(site.name, []).append(set(site.params))
        return inner(site, x)

    params = vit.init(config, 0)
    vit.forward(params, batch[0], config, rewrite("look", wrap={"block": look, "readout": look})(EXACT))
    one, two, rest = found[""]
    assert one == two == {n.removeprefix("blocks.0.") for n in params if n.startswith("blocks.0.")}
    assert rest == {n for n in params if not n.startswith("blocks.")}


@pytest.mark.parametrize(("positional", "expected"), [(True, [0, 1]), (False, [None, None])])
def test_only_a_positional_transform_gets_the_number_of_a_block(config, batch, positional, expected):
    numbers = {"block": [], "penalty": []}

    def look(primitive):
        def looking(inner, site, x):
            numbers[primitive].append(site.block)
            return inner(site, x)

        return looking

    ops = rewrite("look", wrap={name: look(name) for name in numbers}, positional=positional)(EXACT)
    vit.forward(vit.init(config, 0), batch[0], config, ops)
    assert numbers == {"block": expected, "penalty": expected}


class Born(TorchDispatchMode):
    """Weak references to the storages that operations made: all that they return but the `given` ones."""

    def __init__(self, given):
        super().__init__()
        self.given, self.storages = given, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() > 1:
                ref = StorageWeakRef(t.untyped_storage())
                self.storages[ref.cdata] = ref
        for given in self.given:
            self.storages.pop(given, None)
        return out

    def alive(self):
        return {cdata for cdata, ref in self.storages.items() if not ref.expired()}


def storages(*tensors):
    return {StorageWeakRef(t.untyped_storage()).cdata for t in tensors}


@pytest.mark.parametrize("training", [True, False])
def test_nothing_outlives_its_use(config, batch, training):
    """What lives when a block's MLP begins, and after the forward pass, is what autograd keeps and what is still to be
    read: no q, k, v, no heads, no branch output."""
    params = {n: p.requires_grad_(training) for n, p in vit.init(config, 0).items()}
    kept, made, begun = {}, [], []

    def pack(t):
        ref = StorageWeakRef(t.untyped_storage())
        kept[ref.cdata] = ref
        return t

    def block(inner, site, x):
        begun[:] = [*storages(x)]
        return inner(site, x)

    def attention(inner, site, x):
        branch, carry = inner(site, x)
        made.append(StorageWeakRef(branch.untyped_storage()))
        return branch, carry

    def attend(inner, site, q, k, v):
        heads = inner(site, q, k, v)
        made.extend(StorageWeakRef(t.untyped_storage()) for t in (q, k, v, heads))
        return heads

    def mlp(inner, site, x):
        assert born.alive() - kept.keys() <= {*begun, *storages(x)}
        assert {ref.cdata for ref in made if not ref.expired()} <= kept.keys()
        return inner(site, x)

    wrap = {"block": block, "attention": attention, "attend": attend, "mlp": mlp}
    ops = rewrite("look", wrap=wrap)(EXACT)
    born = Born(storages(batch[0], *params.values()))
    with torch.set_grad_enabled(training), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), born:
        output = vit.forward(params, batch[0], config, ops)
    assert len(made) == 5 * config.depth
    assert bool(kept) is training
    assert born.alive() - kept.keys() == storages(output.logits)
    if not training:
        assert all(ref.expired() for ref in made)


DRAWING = {
    "crs": crs(0.3),
    "crs published": crs(0.3, "published"),
    "decatt": decatt(2.0),
    "flash": flash(),
    "recompute": recompute(),
    "recompute fc1": recompute(True),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_transform_moves_no_other_draw(batch, name):
    """None of these changes the forward pass, whatever it draws: with dropout on, the logits of a key stay."""
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.5, head="mlp")
    params, images = double(vit.init(config, 0)), batch[0].double()
    plain, other = (vit.forward(params, images, config, key=rng.key(k)).logits for k in (0, 1))
    changed = vit.forward(params, images, config, DRAWING[name](EXACT), rng.key(0)).logits
    assert (changed - plain).abs().max() < 1e-10
    assert (other - plain).abs().max() > 1e-2


def test_every_block_site_and_purpose_has_its_own_key():
    keys = []

    def keep(inner, site, *inputs):
        keys.extend(tuple(site.key(purpose).tolist()) for purpose in ("dropout", "crs"))
        return inner(site, *inputs)

    config = vit.VitConfig(16, 8, 8, 32, 1, 8, 2, head="mlp")
    wrap = dict.fromkeys(("tokenize", "norm", "linear", "attend", "block", "readout"), keep)
    ops = rewrite("look", wrap=wrap)(EXACT)
    vit.forward(vit.init(config, 0), torch.zeros(1, 3, 16, 16), config, ops, rng.key(5))
    names = 2 * (32 * 8 + 4)  # block, two norms, four maps, attend; the model (tokens and readout), norm, two maps
    assert len(set(keys)) == names
