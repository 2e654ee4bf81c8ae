"""Check and time the copy engines against NCCL: `torchrun --nproc-per-node 4 experiments/bench/engine.py`.

First transfers of many sizes are compared with NCCL's bit for bit. Then, for a weight of --mib MiB, both are timed alone and beside
products, which also shows how much each slows the products.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro

from mtl.kernels import copy_engine
from mtl.kernels.columns import beside
from mtl.runtime import process
from mtl.sharding.collectives import exchange_sum_raw, gather_raw, wait


@dataclass(frozen=True)
class Bench:
    """What to time."""

    mib: int = 224
    """Size of the whole weight in 16 bits."""
    rounds: int = 20
    checks: int = 200


def main() -> None:
    """Check, then time."""
    bench = tyro.cli(Bench, args=process.command_line())
    at = process.place()
    process.prepare_environment()
    with process.process_group(at):
        group = dist.group.WORLD
        assert group is not None
        wrong = check(bench, at, group.group_name)
        if at.rank == 0:
            print(f"{bench.checks} gathers and sums of changing sizes: {wrong} differ from NCCL's", flush=True)
        for line in times(bench, at, group.group_name):
            if at.rank == 0:
                print(line, flush=True)


def check(bench: Bench, at: process.Place, group: str) -> int:
    """Count transfers that are not bitwise NCCL's, several under way at once, while devices are late by turns."""
    generator = torch.Generator(at.device).manual_seed(at.rank)
    wrong, size = 0, at.world
    pending: list[tuple[Any, ...]] = []
    for i in range(bench.checks):
        turns = i % 4 == 3
        rows, widths = 16 << (i % 6), [64 * (1 + i % 5)] * 2 if turns else [256 * (1 + i % 3), 64, 64 * (1 + i % 5)]
        if torch.cuda.is_available() and i % size == at.rank:
            torch.cuda._sleep(20_000_000)  # pyright: ignore[reportPrivateUsage]
        shards = [torch.randn(rows, width, generator=generator, device=at.device) for width in widths]
        whole = copy_engine.gather(shards, torch.bfloat16, size, group, turns=turns)
        grad = torch.randn(rows * size, sum(widths), generator=generator, device=at.device).bfloat16()
        pending.append((shards, whole, grad, widths, copy_engine.send(grad, size, group), turns))
        if len(pending) == copy_engine.SUMS:
            wrong += _differs(pending.pop(0), size, group)
    return wrong + sum(_differs(one, size, group) for one in pending)


def _differs(one: tuple[Any, ...], size: int, group: str) -> int:
    shards, whole, grad, widths, sent, turns = one
    gathered = wait(whole).clone()  # before NCCL lets all devices wait for each other
    sums = copy_engine.collect(sent, grad, widths, torch.float32, size, group, turns)
    expected = gather_raw(beside([s.bfloat16() for s in shards], turns), 0, size, group)
    expected_sum = exchange_sum_raw(grad, 0, size, group, torch.float32)
    return int(not (torch.equal(gathered, expected) and torch.equal(beside(sums, turns), expected_sum)))


def times(bench: Bench, at: process.Place, group: str) -> list[str]:
    """Time both ways to gather and to sum, alone and beside products."""
    size, columns = at.world, 4096
    rows = bench.mib * 2**19 // columns // size
    shard = torch.randn(rows, columns, device=at.device)
    grad = torch.randn(rows * size, columns, device=at.device).bfloat16()
    a, b = (torch.randn(16384, 8192, device=at.device).bfloat16() for _ in range(2))
    start_nccl: Any = torch.ops._c10d_functional  # pyright: ignore
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "NCCL gather": (lambda: start_nccl.all_gather_into_tensor(shard.bfloat16(), size, group), wait),
        "engine gather": (lambda: copy_engine.gather([shard], torch.bfloat16, size, group), wait),
        "NCCL sum in float32": (lambda: start_nccl.reduce_scatter_tensor(grad.float(), "sum", size, group), wait),
        "NCCL exchange": (
            lambda: start_nccl.all_to_all_single(grad, [rows] * size, [rows] * size, group),
            lambda x: wait(x).unflatten(0, (size, -1)).sum(0, dtype=torch.float32),
        ),
        "engine sum": (
            lambda: copy_engine.send(grad, size, group),
            lambda x: copy_engine.collect(x, grad, [columns], torch.float32, size, group),
        ),
    }
    product = clock(lambda: a @ b.t(), bench.rounds)
    lines = [f"product alone: {product:.2f} ms, {2 * 16384**2 * 8192 / product / 1e9:.0f} TFLOP/s"]
    for name, (start, end) in ways.items():

        def alone(start: Callable[[], Any] = start, end: Callable[[Any], Any] = end) -> Any:
            return end(start())

        def beside(start: Callable[[], Any] = start, end: Callable[[Any], Any] = end) -> Any:
            under_way = start()
            products = [a @ b.t() for _ in range(2)]
            return products, end(under_way)

        single, both = clock(alone, bench.rounds), clock(beside, bench.rounds)
        rate = bench.mib * 2**20 * (size - 1) / size / single / 1e6
        lines.append(f"{name:20s} alone {single:.2f} ms ({rate:.0f} GB/s); it makes two products {both - 2 * product:+.2f} ms longer")
    return lines


def clock(run: Callable[[], Any], rounds: int) -> float:
    """Give the time of one run in ms, of many in a row."""
    for _ in range(3):
        run()
    dist.barrier()
    torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        run()
    torch.accelerator.synchronize()
    return (time.perf_counter() - start) / rounds * 1e3


if __name__ == "__main__":
    process.guarded(main)
