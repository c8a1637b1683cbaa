"""The training step as a pure function: step(state, batch) -> (state, metrics).

Loss and gradient, then the optimizer's update. Nothing is mutated; randomness comes from the key in the state and the
step count. Only core.engine decides how the step is run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import rng
from core.layers import EXACT
from core.model import Config, bind
from core.ops import Ops, Params
from core.optimizers import Followed, Optimizer, changed
from core.targets import LABELS, Targets

Batch = tuple[Tensor, Tensor]  # images [B,C,H,W] as stored, labels [B]


class State(NamedTuple):
    """Parameters, the optimizer's state of those that are trained, steps done (0-d int64), key [2]."""

    params: Params
    optimizer: Any
    step: Tensor
    key: Tensor

    @property
    def judged(self) -> Params:
        """The parameters that are evaluated: averages of those that have one."""
        return self.params | self.optimizer.average if isinstance(self.optimizer, Followed) else self.params


class Metrics(NamedTuple):
    """0-d tensors: loss = cross_entropy + penalty (means over the batch), correct predictions, learning rate."""

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor
    learning_rate: Tensor


class Aux(NamedTuple):
    """What the objective reports beside its value, 0-d float64."""

    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor


Prepare = Callable[[Tensor, Tensor | None], Tensor]  # (stored images, key) -> normalised float images
Objective = Callable[[Params, Batch, Tensor], tuple[Tensor, Tensor]]
Step = Callable[[State, Batch], tuple[State, Metrics]]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def start(params: Params, optimizer: Optimizer, key: Tensor, ops: Ops = EXACT) -> State:
    """The state before the first step; takes the parameters detached, and the optimizer as `ops` want it."""
    params = {name: p.detach() for name, p in params.items()}
    device = next(iter(params.values())).device
    trained = {name: p for name, p in params.items() if not ops.frozen(name)}
    count = torch.zeros((), dtype=torch.int64, device=device)
    return State(params, changed(optimizer, ops).init(trained), count, key.to(device))


def objective(
    config: Config,
    ops: Ops,
    prepare: Prepare,
    dtype: torch.dtype = torch.float32,
    region: Callable[..., Any] = lambda block: block,
    own: Callable[[Tensor], Tensor] = lambda key: key,
    targets: Targets = LABELS,
) -> Objective:
    """(params, batch, key) -> (cross entropy + penalty, the values of Aux [3]); the forward pass in `dtype`, the loss
    in float32.

    Augmentation and model draw from separate keys, so that all arms of a seed see the same images. region: a compiler's
    mark on the function of a block, to compile it once for all. own: of several processes, each one's key of the model.
    targets: what of a batch is learned; correct are predictions of an image's own label.
    """
    forward = bind(config, ops, dtype, region)

    def loss(params: Params, batch: Batch, key: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = batch
        data_key = rng.named(key, "data")
        images, loss_of = targets(prepare(images, data_key), labels, data_key)
        output = forward(params, images, own(rng.named(key, "model")))
        logits = output.logits.to(torch.promote_types(dtype, torch.float32))
        cross_entropy = loss_of(logits)
        correct = (logits.detach().argmax(-1) == labels).sum()
        # One tensor of its own: parts that a compiler finds equal to the value would share its gradient.
        aux = torch.stack([t.detach().double() for t in Aux(cross_entropy, output.penalty, correct)])
        return cross_entropy + output.penalty, aux

    return loss


def value_and_grad(
    fn: Callable[..., tuple[Tensor, Tensor]], frozen: Callable[[str], bool] = lambda name: False
) -> Callable[..., tuple[Tensor, Aux, Params]]:
    """fn(params, *args) -> (value, aux [3])  becomes  (params, *args) -> (value, Aux, gradients by name), without those
    of frozen parameters."""

    def differentiated(params: Params, *args: Any) -> tuple[Tensor, Aux, Params]:
        leaves = {name: p.detach().requires_grad_(not frozen(name)) for name, p in params.items()}
        trained = {name: p for name, p in leaves.items() if p.requires_grad}
        with torch.enable_grad():
            value, aux = fn(leaves, *args)
        gradients = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
        return value.detach(), Aux(*aux.unbind()), dict(zip(trained, gradients, strict=True))

    return differentiated


def make_step(
    loss: Objective,
    optimizer: Optimizer,
    ops: Ops = EXACT,
    wrap_loss: Wrap = lambda fn: fn,
    wrap_update: Wrap = lambda fn: fn,
) -> Step:
    """The pure step of a loss; `ops` say what is frozen and change the optimizer. What wraps the loss, a compiler, may
    split it into a forward and a backward graph."""
    optimizer = changed(optimizer, ops)

    def of_step(params: Params, batch: Batch, key: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return loss(params, batch, rng.fold_in(key, count))

    def update(trained: Params, gradients: Params, state: Any, count: Tensor) -> tuple[Params, Any, Tensor]:
        return *optimizer.update(trained, gradients, state, count), optimizer.rate(count)

    gradient, apply = value_and_grad(wrap_loss(of_step), ops.frozen), wrap_update(update)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        value, aux, gradients = gradient(state.params, batch, state.key, state.step)
        trained = {name: state.params[name] for name in gradients}
        params, moments, rate = apply(trained, gradients, state.optimizer, state.step)
        state = State(state.params | params, moments, state.step + 1, state.key)
        return state, Metrics(value, aux.cross_entropy, aux.penalty, aux.correct, rate)

    return step
