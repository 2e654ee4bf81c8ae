"""Train a small model with products in 8 and in 16 bits."""

import dataclasses
from typing import Any

import torch

import sharding_rules
from mtl import tree
from mtl.data.batches import to_device
from mtl.kernels import fp8
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed, init
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import value_and_grad
from mtl.train.loss import make_loss, parse_remat
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import parallel

CONFIG = Config(vocab=64, layers=2, embed=64, heads=4, kv_heads=2, mlp=96, head_size=16)
SEQ, ROWS = 32, 8


def rounded() -> dict[str, Any]:
    """Count what is rounded to 8 bits in one gradient."""
    found: dict[str, Any] = {}
    before = fp8._rounded
    for name in ("bf16", "fp8"):
        count = 0

        def counting(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            nonlocal count
            count += 1
            return before(x, scale, dtype)

        fp8._rounded = counting
        par = place("single", 1, name)
        params = tree.map(to_local, init(decoder.specs(CONFIG), par.rules, par.mesh, 0, torch.float32))
        data = {k: v if k == "slots" else v[0] for k, v in batch(par, 0).items()}
        loss = make_loss(decoder, CONFIG, par, PRECISIONS[name], parse_remat("none"))
        value_and_grad(loss, "none", None)(params, data | {"key": torch.tensor(1)}, torch.tensor(1.0))
        found[name] = count
    fp8._rounded = before
    return found | {"products": CONFIG.layers * 4}


def place(table: str, world: int, precision: str) -> Any:
    """Lay out a run."""
    shape = MeshShape(fsdp=world) if table == "fsdp" else MeshShape()
    par = parallel(CONFIG, sharding_rules.load(table), shape, ROWS // world, PRECISIONS[precision], seq=SEQ)
    return dataclasses.replace(par, fp8=PRECISIONS[precision].fp8)


def batch(par: Any, step: int) -> Any:
    """Make rows that count upwards, which a model learns soon."""
    start = torch.randint(0, CONFIG.vocab, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    text = ((start + torch.arange(SEQ + 1)) % CONFIG.vocab).numpy()
    index, count = par.mesh.index(par.axes("B")), par.mesh.size(par.axes("B"))
    rows = torch.arange(ROWS).reshape(count, 1, ROWS // count)[index].numpy()
    return to_device(par, text[:, :-1][rows], text[:, 1:][rows], rows, torch.float32, {})


def losses(table: str = "single") -> dict[str, list[float]]:
    """Give the losses of 30 steps."""
    found: dict[str, list[float]] = {}
    for name in ("bf16", "fp8"):
        precision = PRECISIONS[name]
        par = place(table, 2 if table == "fsdp" else 1, name)
        specs = decoder.specs(CONFIG)
        optimizer = adamw(decayed(specs))
        state = init_state(specs, par.rules, par.mesh, 1, precision, optimizer)
        step = make_step(decoder, CONFIG, par, optimizer, schedule("constant", 1e-2, 100, 3), StepOptions(precision))
        found[name] = []
        for i in range(30):
            state, metrics = step(state, batch(par, i))
            found[name].append(metrics["loss"].item())
    return found
