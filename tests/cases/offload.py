"""Steps with and without offload: are they the same, bit for bit, and does anything move?"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sharding_rules
from experiments.pipelining import Timing, make_steps
from experiments.pretrain import by_length
from experiments.resting import Rest
from mtl import tree
from mtl.checkpoint.restore import restore
from mtl.checkpoint.save import save
from mtl.kernels import host_copy
from mtl.models import decoder
from mtl.optim.optimizers import adamw, sgd
from mtl.optim.schedules import schedule
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.shard_map import to_local
from mtl.train import offload
from mtl.train.state import abstract_state, init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import batch, parallel
from tests.small import BATCH, MESHES, MODELS


class Counted:
    """Count what passes between device and host, and the types of the weights that a gradient is given."""

    def __init__(self) -> None:
        self.brought = self.put = 0

    def __enter__(self) -> "Counted":
        self.originals = host_copy.bring, host_copy.put

        def bring(*args: Any) -> Any:
            self.brought += args[0].nbytes
            return self.originals[0](*args)

        def put(*args: Any) -> Any:
            self.put += args[1].nbytes
            return self.originals[1](*args)

        host_copy.bring, host_copy.put = bring, put
        return self

    def __exit__(self, *_: object) -> None:
        host_copy.bring, host_copy.put = self.originals


def run(
    table: str, world: int, model: str, precision: str, kind: str, remat: str, how: str, micros: int = 1,
    optimizer: str = "plain", path: str = "",
) -> Any:  # fmt: skip
    """Take three steps; with ``path`` save after the second, restore and go on from there. Gives numbers, what moved, and the state."""
    config, rules, shape, policy = MODELS[model], sharding_rules.load(table), MESHES[table][world], PRECISIONS[precision]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    micro = BATCH // (rows * micros)
    par = parallel(config, rules, shape, micro, policy)
    specs = decoder.specs(config)
    mask = decayed(specs)
    update = sgd(mask) if optimizer == "sgd" else adamw(mask, impl=optimizer)
    rest = {"specs": specs, "mesh": par.mesh, "precision": policy, "optimizer": update}
    away = offload.optimizer_state(kind)
    state: Any = offload.begin(init_state, rules=rules, seed=7, **rest) if away else init_state(rules=rules, seed=7, **rest)
    offload.CHUNK = 1000  # several chunks of a small model
    options = StepOptions(policy, remat, how, "aot_eager", clip=0.5, seed=3, offload=kind)
    rate = schedule("linear", 1e-2, 10, 2)
    step, found = make_step(decoder, config, par, update, rate, options), list[Tensor]()
    with Counted() as moved:
        for i in range(3):
            if i == 2 and path:
                save(Path(path), state)
                state = restore(Path(path), abstract_state(specs, rules, par.mesh, policy, update))
                state = offload.place(state, specs, par.mesh, policy) if away else state
            data = batch(par, config, i, micro, False, dtype=policy.param)
            state, metrics = step(state, data)
            found += [x.clone() for x in tree.leaves(metrics)]
    return [*found, *(to_local(x) for x in tree.leaves(state))], (moved.brought, moved.put), state


def same(table: str, world: int, model: str, precision: str, kind: str, remat: str, how: str, **more: Any) -> dict[str, Any]:
    """Compare a run with offload with one without."""
    want, still, state = run(table, world, model, precision, "none", remat, how, **{**more, "path": ""})
    got, moved, _ = run(table, world, model, precision, kind, remat, how, **more)
    assert len(want) == len(got)
    held = [to_local(x) for x in tree.leaves(state.opt_state) if x.dim()]
    masters = [
        to_local(p)
        for s, p in zip(tree.leaves(decoder.specs(MODELS[model])), tree.leaves(state.params), strict=True)
        if offload.leaves_device(s, PRECISIONS[precision])
    ]
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(want, got, strict=True)),
        "still": still,
        "moved": moved,
        "state": sum(x.nbytes for x in held) + sum(x.nbytes for x in masters),
        "masters": sum(x.nbytes for x in masters),
    }


def turns() -> dict[str, Any]:
    """Take steps of two lengths in turn, as fine-tuning without packing does: what comes to the device, the state's bytes, the masters'."""
    config, policy, offload.CHUNK = MODELS["llama"], PRECISIONS["bf16"], 1000
    par = parallel(config, sharding_rules.load("single"), MESHES["single"][1], BATCH, policy)
    specs, update = decoder.specs(config), sgd(decayed(decoder.specs(config)))
    rest = Rest("optimizer", specs, par.mesh, policy)
    state = rest.fresh(partial(init_state, seed=7), par.rules, update)
    options, weights = StepOptions(policy, offload="optimizer"), rest.weights(par)
    rate = schedule("constant", 1e-2, 10)
    step = by_length(par, lambda p: make_steps(None, config, p, update, rate, options, Timing(4), weights=weights))
    with Counted() as moved:
        for i in range(4):
            own = par.sized(**dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), (32, 16)[i % 2]))
            state, _ = step(state, batch(own, config, i, BATCH, False, dtype=policy.param))
    masters = [p for s, p in zip(tree.leaves(specs), tree.leaves(state.params), strict=True) if offload.leaves_device(s, policy)]
    moments = [x for x in tree.leaves(state.opt_state) if x.dim()]
    sizes = [sum(to_local(x).nbytes for x in xs) for xs in (masters, moments)]
    return {"brought": moved.brought, "state": sum(sizes), "masters": sizes[0]}
