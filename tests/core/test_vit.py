import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import vit_b_16

from core import layers, rng, vit
from core.errors import InputError
from core.layers import EXACT
from core.ops import Parameter, Site, rewrite
from core.transforms.crs import crs
from core.transforms.decatt import decatt
from core.transforms.flash import flash
from core.transforms.recompute import recompute
from core.weights import checkpoints
from core.weights.names import rename

SHAPES = {
    "published": {"image": 32, "patch": 4, "width": 48, "depth": 3, "heads": 3, "mlp": 128, "classes": 10},
    "one head, odd grid": {"image": 21, "patch": 7, "width": 20, "depth": 1, "heads": 1, "mlp": 33, "classes": 2},
    "grey": {"image": 16, "patch": 8, "width": 24, "depth": 2, "heads": 4, "mlp": 48, "classes": 3, "channels": 1},
}


def double(params):
    return {n: p.double() for n, p in params.items()}


def gradients(loss, params):
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def assert_close(a, b, tolerance):
    for name in b:
        scale = b[name].abs().max().clamp_min(1e-3)
        assert (a[name] - b[name]).abs().max() / scale < tolerance, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_timm(shape):
    config = vit.VitConfig(**shape)
    model = VisionTransformer(
        img_size=config.image, patch_size=config.patch, in_chans=config.channels, num_classes=config.classes,
        embed_dim=config.width, depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp / config.width,
    ).double()  # fmt: skip
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == vit.shapes(config)
    params = {n: p.requires_grad_() for n, p in double(vit.init(config, 1)).items()}
    images = rng.uniform(rng.key(2), (4, config.channels, config.image, config.image)).double() * 4 - 2
    labels = torch.arange(4) % config.classes

    ours = vit.forward(params, images, config).logits
    theirs = functional_call(model, params, images)
    assert (ours - theirs).abs().max() < 1e-10
    assert_close(
        gradients(F.cross_entropy(ours, labels), params), gradients(F.cross_entropy(theirs, labels), params), 1e-10
    )


def test_equals_torchvision_vit_b_16():
    """ViT-B/16 itself, 86.6 M parameters at 224 pixels, weights converted."""
    torch.manual_seed(0)
    model = vit_b_16(num_classes=10).double().eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    config = vit.VitConfig(224, 16, 768, 12, 12, 3072, 10)
    params = {n: p.clone().requires_grad_() for n, p in checkpoints.check(rename(model.state_dict()), config).items()}
    images = rng.uniform(rng.key(2), (1, 3, 224, 224)).double() * 4 - 2
    labels = torch.tensor([3])

    ours, theirs = vit.forward(params, images, config).logits, model(images)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-10
    got = gradients(F.cross_entropy(ours, labels), params)
    F.cross_entropy(theirs, labels).backward()
    wanted = checkpoints.check(rename({n: p.grad for n, p in model.named_parameters()}), config)
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    ("width", "heads", "classes", "expected"),
    [(384, 6, 10, 11_965_642), (384, 6, 100, 11_983_012), (192, 3, 10, 4_197_994), (192, 3, 100, 4_206_724)],
)
def test_published_parameter_counts(width, heads, classes, expected):
    config = vit.VitConfig(32, 4, width, 12, heads, 512, classes, dropout=0.1, patch_norm=True, head="mlp")
    assert vit.parameters(config) == expected
    assert sum(p.numel() for p in vit.init(config, 0).values()) == expected


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
    assert vit.parameters(config, ops) == vit.parameters(config) + config.depth
    params = double(vit.init(config, 0, ops))
    scaled = {n: params[n] for n in vit.shapes(config)}
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


def test_init_depends_on_seed_and_name_only(config):
    first, again, other = vit.init(config, 0), vit.init(config, 0), vit.init(config, 1)
    deeper = vit.init(vit.VitConfig(16, 4, 16, 3, 2, 32, 5), 0)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(first[n], deeper[n]) for n in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["blocks.0.attn.proj.weight"], first["blocks.1.attn.proj.weight"])


def test_init_is_glorot_uniform():
    weight = vit.init(vit.VitConfig(16, 4, 64, 1, 2, 256, 5), 0)["blocks.0.mlp.fc1.weight"]
    bound = (6 / (64 + 256)) ** 0.5
    assert weight.abs().max() <= bound
    assert abs(weight.std().item() / (bound / 3**0.5) - 1) < 0.02


def test_dropout_draws_from_the_key_and_only_with_one(batch):
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.5, head="mlp")
    params = vit.init(config, 0)
    evaluated = vit.forward(params, batch[0], config).logits
    trained = [vit.forward(params, batch[0], config, key=rng.key(k)).logits for k in (0, 0, 1)]
    assert torch.equal(evaluated, vit.forward(params, batch[0], config).logits)
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], evaluated)


def test_dropout_keeps_the_mean():
    x = torch.ones(400, 500)
    config = vit.VitConfig(16, 4, 16, 2, 2, 32, 5, dropout=0.1)
    dropped = layers.dropout(Site("mlp", {}, config, EXACT, rng.key(0), x.dtype, {}), x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.9, rel=1e-4)]
    assert dropped.mean().item() == pytest.approx(1, abs=4 * (0.1 / 0.9 / x.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, r"patch 5 does not divide image 16; legal: 1, 2, 4, 8, 16"),
        ({"heads": 3}, r"heads 3 do not divide width 16; legal: 1, 2, 4, 8, 16"),
        ({"depth": 0}, r"depth 0 is outside 1 to 1,024"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside"),
        ({"head": "liner"}, r"unknown head 'liner'; legal: linear, mlp; did you mean 'linear'"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    shape = {"image": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp": 32, "classes": 5}
    with pytest.raises(InputError, match=message):
        vit.VitConfig(**(shape | change))
