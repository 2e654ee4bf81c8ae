"""Time tensor-parallel products in pieces, and by collectives: `torchrun --nproc-per-node 2 experiments/bench/piecewise.py`.

Each row is one product of a layer and what it gathers or sums, forward or backward, on all processes at once: the products alone, with
collectives before and after them, and in pieces. Errors are against the collectives' result, relative to its largest number.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from experiments.provenance import provenance
from mtl.kernels import piecewise
from mtl.ops.piecewise import Gathered, Summed
from mtl.runtime import process
from mtl.sharding.collectives import gather, psum_scatter_over
from mtl.sharding.mesh import MeshShape, make_mesh


@dataclass(frozen=True)
class Bench:
    """What to time."""

    batch: int = 2
    seq_len: int = 8192
    embed: int = 4096
    attention: int = 4096
    """Columns of all query heads."""
    kv: int = 1024
    """Columns of all key heads."""
    mlp: int = 14336
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    repeat: int = 20
    json: Path | None = None


def main() -> None:
    """Time all products of a layer."""
    bench, at = tyro.cli(Bench, args=process.command_line()), process.place()
    process.prepare_environment()
    with process.process_group(at), torch.no_grad():
        group, dtype = make_mesh(MeshShape(tensor=at.world), at.device.type).group(("tensor",)), getattr(torch, bench.dtype)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=at.device, dtype=dtype)

        torch.manual_seed(at.rank)
        part = random(bench.batch, bench.seq_len // at.world, bench.embed)
        rows: list[dict[str, Any]] = []
        for name, columns in (("qkv", bench.attention + 2 * bench.kv), ("gate and up", 2 * bench.mlp)):
            w, grad = random(bench.embed, columns // at.world), random(bench.batch * bench.seq_len, columns // at.world)
            rows += gathered(bench, name, part, w / bench.embed**0.5, grad, at.world, group)
        for name, columns in (("out", bench.attention), ("down", bench.mlp)):
            x, w = random(bench.batch, bench.seq_len, columns // at.world), random(bench.embed, columns // at.world)
            rows += summed(bench, name, x, w / columns**0.5, part, at.world, group)
        if at.rank == 0:
            show(rows)
            if bench.json:
                with bench.json.open("a") as file:
                    file.write(json.dumps({"devices": at.world, **provenance(), "rows": rows}) + "\n")


def gathered(bench: Bench, name: str, part: Tensor, w: Tensor, grad: Tensor, size: int, group: str) -> list[dict[str, Any]]:
    """Time a product of what is gathered, with the whole input kept for backward, and its backward."""
    how = Gathered(size, group, keep=True)
    whole = gather(part, 1, size, group)

    def by_collectives() -> Tensor:
        return gather(part, 1, size, group).flatten(0, 1) @ w

    def pulled_by_collectives() -> tuple[Tensor, Tensor]:
        d_rows = (grad @ w.t()).unflatten(0, (part.shape[0], -1))
        return psum_scatter_over(d_rows, 1, size, group), whole.flatten(0, 1).t() @ grad

    def alone() -> tuple[Tensor, Tensor]:
        return grad @ w.t(), whole.flatten(0, 1).t() @ grad

    return [
        row(bench, name, lambda: whole.flatten(0, 1) @ w, by_collectives, lambda: how.product(part, w, False)[0]),
        row(bench, f"{name}, backward", alone, pulled_by_collectives, lambda: how.pull(grad, part, (whole,), w, False, True)),
    ]


def summed(bench: Bench, name: str, x: Tensor, w: Tensor, grad: Tensor, size: int, group: str) -> list[dict[str, Any]]:
    """Time a product whose sum over devices is scattered, and its backward."""
    how, whole = Summed(size, group), gather(grad, 1, size, group)

    def by_collectives() -> Tensor:
        return psum_scatter_over(x @ w.t(), 1, size, group)

    def pulled(whole: Tensor, d_rows: Tensor) -> tuple[Tensor, Tensor]:
        return d_rows, whole.flatten(0, 1).t() @ x.flatten(0, 1)

    def pulled_by_collectives() -> tuple[Tensor, Tensor]:
        whole = gather(grad, 1, size, group)
        return pulled(whole, whole @ w)

    def in_pieces() -> tuple[Tensor, Tensor]:
        d_rows, whole = piecewise.gather_product(grad, w, False, size, group)
        return pulled(whole, d_rows)

    return [
        row(bench, name, lambda: x @ w.t(), by_collectives, lambda: how.product(x, w, True)),
        row(bench, f"{name}, backward", lambda: pulled(whole, whole @ w), pulled_by_collectives, in_pieces),
    ]


def row(bench: Bench, name: str, alone: Callable[[], Any], plain: Callable[[], Any], pieces: Callable[[], Any]) -> dict[str, Any]:
    """Time the three by turns, so that all see the same clocks, and compare the last two's results."""
    want, got = (x if isinstance(x, tuple) else (x,) for x in (plain(), pieces()))
    error = max(
        ((a.reshape(b.shape).float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(got, want, strict=True)
    )
    del want, got
    times: list[list[float]] = [[], [], []]
    for _ in range(3):
        for kept, fn in zip(times, (alone, plain, pieces), strict=True):
            kept.append(timed(fn, bench.repeat))
    return {"what": name, **{k: min(t) for k, t in zip(("alone", "collectives", "pieces"), times, strict=True)}, "error": error}


def timed(fn: Callable[[], Any], repeat: int) -> float:
    """Give milliseconds a call."""
    settle()
    start = time.perf_counter()
    for _ in range(repeat):
        fn()
    settle()
    return (time.perf_counter() - start) / repeat * 1e3


def settle() -> None:
    """Wait for this device and all others."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, and what it sums to."""
    print(f"{'product':<24}{'alone':>9}{'collectives':>13}{'pieces':>9}  ms   {'error':>8}")
    total = {k: sum(r[k] for r in rows) for k in ("alone", "collectives", "pieces")}
    for r in [*rows, {"what": "a layer", **total, "error": max(r["error"] for r in rows)}]:
        print(f"{r['what']:<24}{r['alone']:>9.3f}{r['collectives']:>13.3f}{r['pieces']:>9.3f}       {r['error']:>8.1e}", flush=True)


if __name__ == "__main__":
    process.guarded(main)
