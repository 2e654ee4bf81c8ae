"""Train a small model with products in 8 and in 16 bits; round as the kernel does."""

import dataclasses
import importlib
import itertools
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """Count the products in 8 bits of one gradient, and find how many scales their sides have."""
    found: dict[str, Any] = {}
    before = fp8.multiply
    scales: list[str] = []

    def counting(*args: Any) -> torch.Tensor:
        scales.extend("tensor" if way.scale.numel() == 1 else "rows" for way in args[:2])
        return before(*args)

    fp8.multiply = counting
    for name in ("bf16", "fp8", "fp8_rows"):
        scales.clear()
        gradient(name)
        found[name] = dict(Counter(scales))
    fp8.multiply = before
    return found | {"products": CONFIG.layers * 4}


def gradient(precision: str, remat: str = "none") -> None:
    """Take one gradient."""
    par = place("single", 1, precision)
    params = tree.map(to_local, init(decoder.specs(CONFIG), par.rules, par.mesh, 0, torch.float32))
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, 0).items()}
    loss = make_loss(decoder, CONFIG, par, PRECISIONS[precision], parse_remat(remat))
    value_and_grad(loss, "none", None)(params, data | {"key": torch.tensor(1)}, torch.tensor(1.0))


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operations(precision: str, remat: str = "none") -> dict[str, int]:
    """Count the operations of one gradient."""
    with Count() as count:
        gradient(precision, remat)
    return dict(count.names)


def kernel() -> None:
    """Hold the kernel against the plain reference, on values that 8 bits hold: Triton's interpreter does not round to nearest."""
    kernel = importlib.import_module("mtl.kernels.fp8_triton")
    for rows, columns in itertools.product((16, 48, 144, 256), (16, 80, 400)):
        draw = torch.Generator().manual_seed(rows + columns)
        powers = torch.randint(-3, 4, (rows, columns), generator=draw).float()
        x = (torch.randint(-1, 2, (rows, columns), generator=draw) * 2.0**powers).bfloat16()
        across, down = (2.0 ** torch.randint(-2, 3, shape, generator=draw).float() for shape in ((rows, 1), (1, columns)))
        one = torch.tensor(64.0)
        given = (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, columns:])
        for which, (a, b) in itertools.product(given, ((one, one), (one, None), (None, one), (across, down), (None, down))):
            for dtype in (fp8.VALUES, fp8.GRADIENTS):
                for got, want in zip(kernel.rounded(which, a, b, dtype), fp8.plain(x, a, b, dtype), strict=True):
                    assert got.shape == want.shape and torch.equal(got.float(), want.float()), (rows, columns, a, b, dtype)
    large = torch.full((16, 16), 100.0)
    assert all(got.float().eq(448.0).all() for got in kernel.rounded(large, one, one, fp8.VALUES)), "held to the range"


def place(table: str, world: int, precision: str) -> Any:
    """Lay out a run."""
    shape = MeshShape(**{table: world}) if table != "single" else MeshShape()
    par = parallel(CONFIG, sharding_rules.load(table), shape, ROWS // world, PRECISIONS[precision], seq=SEQ)
    return dataclasses.replace(par, fp8=PRECISIONS[precision].fp8)


def batch(par: Any, step: int) -> Any:
    """Make rows that count upwards, which a model learns soon."""
    start = torch.randint(0, CONFIG.vocab, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    text = ((start + torch.arange(SEQ + 1)) % CONFIG.vocab).numpy()
    index, count = par.mesh.index(par.axes("B")), par.mesh.size(par.axes("B"))
    rows = torch.arange(ROWS).reshape(count, 1, ROWS // count)[index].numpy()
    return to_device(par, text[:, :-1][rows], text[:, 1:][rows], rows, torch.float32, {})


def losses(precisions: list[str], table: str = "single", remat: str = "none") -> dict[str, list[float]]:
    """Give the losses of 30 steps, by precision."""
    found: dict[str, list[float]] = {}
    for name in precisions:
        policy = PRECISIONS[name]
        par = place(table, 1 if table == "single" else 2, name)
        specs = decoder.specs(CONFIG)
        optimizer = adamw(decayed(specs))
        state = init_state(specs, par.rules, par.mesh, 1, policy, optimizer)
        step = make_step(decoder, CONFIG, par, optimizer, schedule("constant", 1e-2, 100, 3), StepOptions(policy, remat))
        found[name] = []
        for i in range(30):
            state, metrics = step(state, batch(par, i))
            found[name].append(metrics["loss"].item())
    return found
