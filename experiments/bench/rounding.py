"""Time rounding to 8 bits and the products that follow: `python experiments/bench/rounding.py`.

The bound of rounding is the memory's: 2 bytes read an element and 1 written a way. The largest value takes 2 more, where it is not found
in the kernel that makes the matrix.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from experiments.bench.ops import clock
from experiments.provenance import provenance
from mtl.kernels import fp8
from mtl.runtime import process
from mtl.runtime.compile import compiled, inductor_options


@dataclass(frozen=True)
class Bench:
    """What to time."""

    rows: int = 16384
    columns: tuple[int, ...] = (28672, 14336, 4096)
    embed: int = 4096
    """The other side of the products."""
    rounds: int = 10
    json: Path | None = None


def main() -> None:
    """Print a line a way."""
    bench = tyro.cli(Bench, args=process.command_line())
    at = process.place()
    process.prepare_environment()
    options: Any = inductor_options("inductor", at.device.type, False)

    def say(what: str, *, columns: int, run: Callable[[], Any], amount: float, unit: str, note: str = "") -> None:
        ms = clock(run, bench.rounds, at.device)
        row = {"what": what, "rows": bench.rows, "columns": columns, "us": ms * 1e3, unit: amount / ms * 1e3, "note": note}
        print(f"{what:34s} {bench.rows} x {columns:6d} {ms * 1e3:9.1f} us {amount / ms * 1e3:8.0f} {unit} {note}", flush=True)
        if bench.json:
            with bench.json.open("a") as file:
                file.write(json.dumps({**row, **provenance()}, default=str) + "\n")

    with process.process_group(at):
        dtype = torch.bfloat16 if at.device.type == "cuda" else torch.float32
        for columns in bench.columns:
            x = torch.randn(bench.rows, columns, device=at.device, dtype=dtype)
            roundings(x, options, partial(say, columns=columns))
            products(bench, x, partial(say, columns=columns))


def roundings(x: Tensor, options: Any, say: Callable[..., None]) -> None:
    """Time the kernel, and what a compiler makes of the same."""
    scale, gb = fp8.scale_for(x, fp8.GRADIENTS), x.numel() / 1e9
    for name, way in {"both ways": {}, "as it is": {"turned": False}, "turned over": {"plain": False}}.items():
        run = partial(fp8.side, x, known=scale, dtype=fp8.GRADIENTS, **way)
        say(f"rounded, {name}", run=run, amount=(3 if way else 4) * gb, unit="GB/s", note=checked(x, run()))
    largest, whole = compiled(lambda x: fp8.scale_for(x, fp8.GRADIENTS), options=options), compiled(naive, options=options)
    say("largest value", run=partial(largest, x), amount=2 * gb, unit="GB/s")
    say("largest and both ways, inductor", run=partial(whole, x), amount=6 * gb, unit="GB/s")


def naive(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round both ways in an expression that a compiler may fuse as it likes."""
    scale = torch.finfo(fp8.GRADIENTS).max / x.abs().amax().float().clamp(min=1e-30)
    return fp8.plain(x, scale, scale, fp8.GRADIENTS)


def checked(x: Tensor, made: fp8.Side) -> str:
    """Hold what was made against the plain reference, bit by bit."""
    one = made.plain.scale
    pairs = zip(made, fp8.plain(x, one, one, made.plain.values.dtype), strict=True)
    same = all(torch.equal(got.values.view(torch.uint8), want.view(torch.uint8)) for got, want in pairs if got.values.numel())
    return "exact" if same else "DIFFERS"


def products(bench: Bench, x: Tensor, say: Callable[..., None]) -> None:
    """Time the three products of a projection (embed, columns) with its gradient ``x``; errors are those of 256 rows and columns."""
    rows, w = (torch.randn(n, bench.embed, device=x.device, dtype=x.dtype) for n in (bench.rows, x.shape[1]))
    for scales in ("tensor", "rows"):
        a, b, g = fp8.side(rows, scales), fp8.side(w, scales), fp8.side(x, scales, dtype=fp8.GRADIENTS)
        kinds = {
            "forward": (a.plain, b.plain, rows, w),
            "gradient of rows": (g.plain, b.turned, x, w.t()),
            "gradient of weights": (g.turned, a.turned, x.t(), rows.t()),
        }
        for name, (left, right, true_left, true_right) in kinds.items():
            exact = true_left[:256].double() @ true_right[:256].t().double()
            near = [(way.values[:256].double() / way.scale.expand(len(way.values), 1)[:256]) for way in (left, right)]
            rounded = near[0] @ near[1].t()
            for fast in (True, False) if x.device.type == "cuda" else (True,):
                run = partial(fp8.multiply, left, right, x.dtype, fast)
                made = run()[:256, :256].double()
                error, summed = ((made - one).norm() / exact.norm() for one in (exact, rounded))
                flops = 2 * left.values.shape[0] * left.values.shape[1] * right.values.shape[0] / 1e12
                note = f"error {error:.5f}, of the sum and bf16 {summed:.5f}"
                say(f"{name}, {scales}, {'fast' if fast else 'exact'}", run=run, amount=flops, unit="TFLOP/s", note=note)


if __name__ == "__main__":
    process.guarded(main)
