"""A cell: an arm at a seed. What does not depend on the seed is prepared once; training.py takes that and the seed."""

import gc
import time
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ablations.study import processes
from ablations.study.arms import Arm, Conflict
from ablations.study.evaluation import Evaluation, evaluate, fetch
from ablations.study.initialization import initial
from ablations.study.recipes import Recipe
from core import engine, measure, model, parallel, process, rng, sizes
from core.account.step import Account, account, planned
from core.data.splits import Data
from core.errors import InputError, said
from core.foreign.model import Foreign
from core.layers import EXACT
from core.ops import Ops, Params
from core.optimizers import Optimizer
from core.step import Batch, Prepare, State, Step, objective, start
from core.targets import Targets


class WarmedUp(NamedTuple):
    """Seconds to compile, capture and warm up; then the peak bytes of one step, and the most that was reserved."""

    seconds: float
    peak: int
    reserved: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an arm, a recipe (resolved) and data make together, whatever the seed. Nothing is compiled, and nothing
    lies on the device, before it is asked for."""

    arm: Arm
    recipe: Recipe
    data: Data
    config: model.Config
    plain: model.Config
    """Of the same model without the arm's optimizations."""
    prepare: Prepare
    dtype: torch.dtype
    optimizer: Optimizer
    targets: Targets

    @cached_property
    def ops(self) -> Ops:
        """The arm's primitives as the model takes them, planned for the recipe's batch."""
        fitting, recipe = model.fit(self.arm.ops, self.config), self.recipe
        how = self.dtype, self.optimizer, recipe.image, self.share, self.targets
        return planned(self.config, fitting, self.images, *how)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.recipe.device)

    @cached_property
    def share(self) -> parallel.Share:
        """This process's part in a step."""
        return processes.share(self.recipe.parallel, self.recipe.processes)

    @property
    def images(self) -> int:
        """Images of a step in this process."""
        return self.recipe.batch_size // self.share.world

    @property
    def shapes(self) -> parallel.Shapes:
        """Of the whole parameters."""
        return model.shapes(self.config, self.ops)

    @property
    def steps(self) -> int:
        """Training steps of an epoch."""
        return len(self.data.train.labels) // self.recipe.batch_size

    @cached_property
    def step(self) -> Step:
        """The training step, under the recipe's engine."""
        how = self.recipe.engine, self.recipe.regions, self.share, self.targets
        return engine.build(self.config, self.ops, self.prepare, self.dtype, self.optimizer, *how)

    @cached_property
    def loop(self) -> engine.Loop:
        """What takes a state through an epoch."""
        recipe = self.recipe
        return engine.loop(recipe.engine, self.step, self.data.train, recipe.batch_size, self.device, self.share)

    @cached_property
    def warmed_up(self) -> WarmedUp:
        """The loop, ready. A step alone comes first: captured, the step's memory could not be had a second time."""
        state, batch = self.start(0, rng.key(0, self.device)), self.batch(self.images)
        begin = time.perf_counter()
        self.step(state, batch)  # what libraries allocate once belongs to no arm
        measure.synchronize(self.device)
        alone = time.perf_counter()
        peak = measure.peak_bytes(self.step, state, batch, device=self.device)
        reserved = measure.reserved_bytes(self.device)
        again = time.perf_counter()
        self.loop.warm_up(state)
        measure.synchronize(self.device)
        return WarmedUp(alone - begin + time.perf_counter() - again, peak, reserved)

    @property
    def met(self) -> bool:
        """Whether this process has warmed it up."""
        return "warmed_up" in vars(self)

    def start(self, seed: int, key: Tensor) -> State:
        """This process's share of the state before the first step."""
        return parallel.shard_state(self.start_whole(seed, key), self.share)

    def start_whole(self, seed: int, key: Tensor) -> State:
        """The state before the first step: parameters by the seed; the steps draw from the key."""
        params = initial(self.recipe, self.arm, self.data, seed)
        params = {name: tensor.to(self.device) for name, tensor in params.items()}
        return start(params, self.optimizer, key, self.ops)

    def batch(self, size: int) -> Batch:
        """The first training images, on the device."""
        return fetch(self.data.train, torch.arange(min(size, len(self.data.train.labels))), self.device)

    def account(self, batch: int | None = None, mode: str = "train") -> Account:
        """What a step of so many images costs a process, its share of the recipe's batch unless given; with mode "eval"
        a forward pass."""
        size, side = batch or self.images, self.recipe.image
        how = self.optimizer, side, self.share, self.targets
        return account(self.config, self.ops, size, self.dtype, mode, *how)

    @cached_property
    def costs(self) -> Account:
        """What a step of the recipe's batch costs."""
        return self.account()

    @property
    def plain_flops(self) -> int:
        """FLOPs of a step without the arm's optimizations: what MFU counts, whatever an arm saves or computes again."""
        return _plain_costs(self.plain, self.images, self.dtype).flops

    def holding_out(self, seed: int) -> "Prepared":
        """The same over the images that the seed trains on; what is compiled and measured is shared."""
        data = self.data.holding_out(seed)
        if data is self.data:
            return self
        shared = {"ops": self.ops, "step": self.step, "warmed_up": self.warmed_up, "costs": self.costs}
        other = replace(self, data=data)
        vars(other).update(shared)
        return other

    def evaluate(self, params: Params) -> Evaluation:
        """The validation images under whole parameters; of several processes each takes a share of them."""
        data = self.data.val
        return evaluate(params, data, self.config, self.ops, self.prepare, self.dtype, self.device, self.share)

    def need_memory(self) -> None:
        """InputError, with the arm's name, for parameters, and on a CPU a step, that this machine has no memory for. An
        account takes half a second an arm: it is made where the plain model's comes near."""
        instead = "pass a smaller --batch-size, --image, --width, --mlp or --depth"
        name, parameters = self.arm.name, model.parameters(self.config, self.ops)
        sizes.need(4 * parameters, f"arm '{name}': one copy of its parameters", instead)
        on_cpu = self.device.type == "cpu"
        if on_cpu and 4 * _plain_costs(self.plain, self.images, self.dtype).peak_bytes > sizes.memory("cpu"):
            sizes.need(self.costs.peak_bytes, f"arm '{name}': a step of its {self.images:,} images", instead)

    @process.as_it_was()
    def check(self) -> None:
        """InputError, with the arm's name, for what cannot run: the loss of two images is tried, twice, for nobody
        could continue what is another each time. Whatever else it raises is left to its cells, which meet it again and
        record it, while the other arms run."""
        try:
            loss = objective(self.config, self.ops, self.prepare, self.dtype, targets=self.targets)
            given = self.start_whole(0, rng.key(0)).params, self.batch(2), rng.key(0, self.device)
            before = {name: tensor.clone() for name, tensor in given[0].items()}
            first, again = (loss(*given)[0] for _ in range(2))
            if odd := [name for name, tensor in before.items() if not tensor.equal(given[0][name])]:
                raise InputError(f"it changes {odd[0]} whenever it is computed; compute from it, and change nothing")
            if not torch.allclose(first, again, rtol=1e-4, equal_nan=True):
                raise InputError(
                    f"its loss of the same images is {first:g} and then {again:g}; draw from site.key(…) alone, and "
                    "keep nothing from one call to the next"
                )
            if isinstance(self.config, Foreign) and self.recipe.engine != "eager" and not self.ops.parts:
                engine.refuse_breaks(f"model '{self.config}'", loss, *given)
        except InputError as error:
            raise InputError(f"arm '{self.arm.name}': {error}") from error
        except (Exception, SystemExit):
            return

    def release(self) -> None:
        """Give back the memory of the loop: a graph, its static state and its buffers. It is made again if need be."""
        if vars(self).pop("loop", None) is None:
            return
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@cache
def _plain_costs(config: model.Config, batch: int, dtype: torch.dtype) -> Account:
    return account(config, EXACT, batch, dtype)


@process.as_it_was()
def prepared(arm: Arm, recipe: Recipe, data: Data) -> Prepared:
    """What these make together; InputError, with the arm's name, if they do not fit."""
    try:
        plain, config = recipe.plain_config(arm, data), recipe.config(arm, data)
        share = processes.share(recipe.parallel, recipe.processes)
        parallel.check(arm.ops, share)
        optimizer = recipe.optimizer(len(data.train.labels) // recipe.batch_size, share)
        how = recipe.prepare(data, share), recipe.dtype(arm), optimizer, recipe.targets
        cell = Prepared(arm, recipe, data, config, plain, *how)
    except InputError as error:
        raise InputError(f"arm '{arm.name}': {error}") from error
    except Exception as error:
        if not arm.ops.parts:
            raise
        raise InputError(f"arm '{arm.name}' cannot be made ({said(error)}); mend it, or leave it out") from error
    try:
        _ = cell.ops
    except InputError as error:
        raise Conflict(f"arm '{arm.name}': {error}") from error
    return cell
