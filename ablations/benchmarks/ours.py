"""Our training loop as a contender."""

import torch
from torch import Tensor

from ablations.benchmarks.contest import Contender
from core import engine, model, rng
from core.account.step import planned
from core.data.splits import Split
from core.measure import peak_bytes
from core.ops import Ops
from core.optimizers import AdamW
from core.step import Prepare, objective, start


def contender(
    ops: Ops,
    config: model.Config,
    split: Split,
    order: Tensor,
    size: int,
    how: str,
    dtype: torch.dtype,
    device: torch.device,
    prepare: Prepare = lambda images, key: images,
) -> Contender:
    """The loop of an engine; a block is a step for every `size` images of this order.

    Raises InputError for what cannot run.
    """
    ops = planned(config, model.fit(ops, config), size, dtype, AdamW(), split.images.shape[-1])
    params = {name: tensor.to(device) for name, tensor in model.init(config, 0, ops).items()}
    with torch.no_grad():  # what cannot run says so here: inside a compiled graph it would be the compiler's error
        few = (split.images[:2].to(device), split.labels[:2].to(device))
        objective(config, ops, prepare, dtype)(params, few, rng.key(0, device))
    state = [start(params, AdamW(), rng.key(0, device), ops)]
    step = engine.build(config, ops, prepare, dtype, AdamW(), how)
    loop = engine.loop(how, step, split, size, device)

    def run() -> None:
        state[0], _ = loop.epoch(state[0], order)

    def peak() -> int:
        batch = split.images[:size], split.labels[:size].clone()
        step(state[0], batch)
        return peak_bytes(step, state[0], batch, device=device)

    return Contender(run, peak)
