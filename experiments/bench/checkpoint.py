"""Time saves and restores beside torch.distributed.checkpoint and safetensors: `python experiments/bench/checkpoint.py --mode alone`."""

import math
import os
import random
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard

from mtl import checkpoint, tree
from mtl.checkpoint import files
from mtl.checkpoint.background import Saver
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape, make_mesh


@dataclass(frozen=True)
class Bench:
    """What to time: one process (alone), rows to columns on all ranks of torchrun (ranks), or the blocking of a step loop (gpu)."""

    mode: Literal["alone", "ranks", "gpu"] = "alone"
    folders: tuple[Path, ...] = (Path("bench-checkpoint"), Path("/dev/shm/bench-checkpoint"))
    """Where to write: a disk, and memory."""
    gib: float = 4.0
    """The state: over all ranks; in gpu mode a rank's."""
    repeats: int = 3
    threads: tuple[int, ...] = (1, 2, 4, 8)
    """The thread counts of torch.distributed.checkpoint that are tried; the best counts."""
    rest: float = 6.0
    """Seconds a disk rests once what a round wrote (where it is small: what a program wrote) is removed: nobody saves in the moment after
    removing gigabytes, when file systems look for what was just removed and disks still write."""
    restores: bool = True
    """Time restores too, where one process does both."""
    step_ms: tuple[float, ...] = (1500.0,)
    """gpu mode: how long a step's products should take; a train state of 8 B parameters over four GPUs has steps of about 1500 ms."""


def main() -> None:
    """Run one mode and print a table."""
    bench = tyro.cli(Bench, args=process.command_line())
    at = process.place()
    with process.process_group(at):
        for folder in bench.folders:
            need = 1.2 * bench.gib * 2**30 * (at.world if bench.mode == "gpu" else 1)
            free = shutil.disk_usage(next(p for p in folder.absolute().parents if p.exists())).free
            if free < need:
                if at.rank == 0:
                    print(f"{folder} is left out: {free / 2**30:.0f} GiB are free, {need / 2**30:.0f} are needed", flush=True)
                continue
            if at.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            dist.barrier()
            rows = {"alone": alone, "ranks": ranks, "gpu": gpu}[bench.mode](bench, folder, at)
            for i, row in enumerate(rows):  # a row is printed as soon as it is known
                if at.rank == 0 and i == 0:
                    print(f"{folder}, {bench.gib:g} GiB, {at.world} process(es), torch {torch.__version__}, best of {bench.repeats}")
                if at.rank == 0:
                    print("  " + row, flush=True)
            if at.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)


def alone(bench: Bench, folder: Path, at: process.Place) -> list[str]:
    """Time one process: save and restore, every program in turn, several times over."""
    state = make_state(bench.gib)
    blank = tree.map(torch.zeros_like, state)
    meta = tree.map(lambda x: torch.empty_like(x, device="meta"), state)

    def dcp_save(n: int) -> Callable[[Path], Any]:
        return lambda path: save(state, storage_writer=FileSystemWriter(path, thread_count=n, sync_files=True), no_dist=True)

    def dcp_load(path: Path) -> Any:
        load(blank, storage_reader=FileSystemReader(path), no_dist=True)

    def plain_save(path: Path) -> None:
        save_file(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    programs: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "mtl (checksums written, verified)": (lambda p: checkpoint.save(p, state), lambda p: checkpoint.restore(p, meta)),
        **{f"dcp, {n} threads": (dcp_save(n), dcp_load) for n in bench.threads},
        "safetensors": (plain_save, lambda p: tree.map(torch.clone, load_file(p))),
    }
    took: dict[str, list[list[float]]] = {name: [[], []] for name in programs}
    work: dict[str, list[float]] = {name: [math.inf, math.inf] for name in programs}
    memory = files.in_memory(folder)
    room = shutil.disk_usage(folder).free > 1.2 * bench.gib * 2**30 * len(programs) and not memory
    for turn in range(bench.repeats):
        # what came just before, or that nothing did, decides how much memory the host has at hand: every round has its own order
        for name in random.Random(turn).sample(list(programs), len(programs)):
            actions, path = programs[name], folder / re.sub(r"\W+", "-", name)
            for i, action in enumerate(actions[: 1 + bench.restores]):
                begun, used = time.perf_counter(), time.process_time()
                action(path)
                took[name][i].append(time.perf_counter() - begun)
                work[name][i] = min(work[name][i], time.process_time() - used)
            if not room:
                clear(folder)
                time.sleep(0 if memory else bench.rest)
        times = (f"{name} {' and '.join(f'{t[-1]:.2f}' for t in took[name][: 1 + bench.restores])}" for name in programs)
        print(f"round {turn + 1} of {bench.repeats}, seconds: {', '.join(times)}", flush=True)
        if room:
            clear(folder)
            time.sleep(bench.rest)

    def told(name: str, i: int) -> str:
        theirs = [t[i] for other, t in took.items() if other.startswith("dcp")]
        best, middle = min(took[name][i]), statistics.median(took[name][i])
        ratios = min(map(min, theirs)) / best, min(map(statistics.median, theirs)) / middle
        return (
            f"{('save', 'restore')[i]} {best:5.2f} s, median {middle:5.2f} ({ratios[0]:4.2f} and {ratios[1]:4.2f} x dcp's best), "
            f"processor {work[name][i]:4.1f}"
        )

    return [f"{name:34} " + "; ".join(told(name, i) for i in range(1 + bench.restores)) for name in programs]


def clear(folder: Path) -> None:
    """Remove what is in a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def ranks(bench: Bench, folder: Path, at: process.Place) -> list[str]:
    """Time a restore whose layout crosses the saved one: rows on disk, columns in memory."""
    mesh = make_mesh(MeshShape(fsdp=at.world), "cpu").device_mesh
    side = 1 << (int(math.log2(bench.gib * 2**30 / 4)) // 2)
    count = max(1, round(bench.gib * 2**30 / 4 / side**2))
    rows = {f"w{i}": DTensor.from_local(torch.randn(side // at.world, side), mesh, [Shard(0)], run_check=False) for i in range(count)}
    blank = {n: DTensor.from_local(torch.zeros(side, side // at.world), mesh, [Shard(1)], run_check=False) for n in rows}
    need = sum(x.to_local().nbytes for x in blank.values())
    programs: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
        "mtl": (lambda p: checkpoint.save(p, rows), lambda p: checkpoint.restore(p, blank)),
        **{
            f"dcp, {n} threads": (
                lambda p, n=n: save(rows, storage_writer=FileSystemWriter(p, thread_count=n)),
                lambda p: load(blank, storage_reader=FileSystemReader(p)),
            )
            for n in bench.threads[:1]
        },
    }
    found: list[str] = []
    for name, (put, get) in programs.items():
        saved, loaded, read = math.inf, math.inf, 0
        for _ in range(bench.repeats):
            saved = min(saved, together(lambda: put(folder / "c")))  # noqa: B023 (called at once)
            loaded = min(loaded, together(lambda: get(folder / "c")))  # noqa: B023
            read = counted(lambda: get(folder / "c"))  # noqa: B023
            dist.barrier()
            if at.rank == 0:
                shutil.rmtree(folder / "c")
            dist.barrier()
        most = torch.tensor(read / need)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found.append(f"{name:18} save {saved:6.2f} s   rows to columns {loaded:6.2f} s, at most {most.item():.2f} x the bytes needed")
    return found


def gpu(bench: Bench, folder: Path, at: process.Place) -> Iterator[str]:
    """Time steps with and without a save under way, each as long as ``step_ms`` says."""
    mesh = make_mesh(MeshShape(fsdp=at.world), at.device.type).device_mesh
    side = 1 << (14 if at.device.type == "cuda" else 9)
    count = max(1, round(bench.gib * 2**30 / 4 / side**2))
    parts = {f"w{i}": torch.randn(side, side, device=at.device) for i in range(count)}
    state = {name: DTensor.from_local(x, mesh, [Shard(0)], run_check=False) for name, x in parts.items()}
    saver = Saver()
    step = stepper(parts, saver, at.device)
    begun = time.perf_counter()
    saver.prepare(state).join()
    prepared = time.perf_counter() - begun
    update, one, more = (min(step(n)[0] for _ in range(3)) for n in (0, 1, 17))
    if at.rank == 0:
        print(f"memory for copies taken in {prepared:.1f} s; a step of an update alone takes {1e3 * update:.0f} ms", flush=True)
    for goal in bench.step_ms:
        products = 1 + max(0, round((goal / 1e3 - one) / (more - one) * 16))
        for i in range(bench.repeats):
            path = (folder / f"{goal:g}-{i}").absolute()
            usual = statistics.median(step(products)[0] for _ in range(max(3, min(20, int(4e3 / goal)))))
            yield blocked(path, saver, state, lambda n=products: step(n), usual, at.device)
            dist.barrier()
            if at.rank == 0:
                shutil.rmtree(path)
            dist.barrier()


def stepper(parts: dict[str, torch.Tensor], saver: Saver, device: torch.device) -> Callable[[int], tuple[float, float]]:
    """Make a step: some products, the fence, an update of the whole state in place, which adds one to every number's bits.

    It gives its time, and how much of it was at the fence.
    """
    x = torch.randn(*[8192 if device.type == "cuda" else 256] * 2, device=device).to(torch.bfloat16)

    def step(products: int) -> tuple[float, float]:
        begun = time.perf_counter()
        y = x
        for _ in range(products):
            y = (y @ x).mul_(1e-2)
        loss = y.sum()
        waiting = time.perf_counter()
        saver.fence()
        waited = time.perf_counter() - waiting
        for leaf in parts.values():
            leaf.view(torch.int32).add_(1)
        loss.item()
        return time.perf_counter() - begun, waited

    return step


def blocked(
    path: Path, saver: Saver, state: dict[str, Any], step: Callable[[], tuple[float, float]], usual: float, device: torch.device
) -> str:
    """Save beside steps; say by how much the first was late, how much slower the others were, and whether the values are those before."""
    values = {name: bits(leaf)[0, 0].clone() for name, leaf in state.items()}
    together(lambda: None)
    ended: list[float] = []
    begun = time.perf_counter()
    saver.save(path, state, after=lambda: ended.append(time.perf_counter()))
    call = time.perf_counter() - begun
    busy = [step()]
    while saver.busy():
        busy.append(step())
    lost = 1 - len(busy) * usual / (time.perf_counter() - begun)
    saver.wait()
    whole = ended[0] - begun
    slower = statistics.mean(t for t, _ in busy[1:]) / usual - 1 if len(busy) > 1 else math.nan
    right = "right" if saved_right(path, state, values) else "WRONG"
    numbers = [usual, call + busy[0][0] - usual, call, busy[0][1], slower, lost, whole]
    usual, late, call, fence, slower, lost, whole = worst(numbers, device)
    return (
        f"steps of {1e3 * usual:.0f} ms: the loop is blocked for {late:.3f} s (call {call:.3f}, at the fence {fence:.3f}); "
        f"{len(busy) - 1} steps while writing are slower by {100 * slower:.2f} %; both are {100 * lost:.2f} % of the "
        f"time; all is on the disk after {whole:.1f} s; what was saved is {right}"
    )


def worst(numbers: list[float], device: torch.device) -> list[float]:
    """Give of each number the greatest over all processes."""
    most = torch.tensor(numbers, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def saved_right(path: Path, state: dict[str, Any], values: dict[str, torch.Tensor]) -> bool:
    """Tell whether the last leaf that was saved holds everywhere what it held when the save was asked for."""
    name = list(state)[-1]
    meta = torch.empty_like(state[name].to_local(), device="meta")
    target = DTensor.from_local(meta, state[name].device_mesh, [Shard(0)], run_check=False)
    back, now = bits(checkpoint.restore(path, {name: target}, subset=True)[name]), bits(state[name])
    return back.equal(now - (now[0, 0] - values[name]).to(now.device))


def bits(x: Any) -> torch.Tensor:
    """See this process's part of an array of float32 as whole numbers."""
    return x.to_local().view(torch.int32)


def make_state(gib: float) -> dict[str, torch.Tensor]:
    """Make a model's worth of tensors: few large ones, many small ones."""
    torch.manual_seed(0)
    state = {f"norm{i}": torch.randn(4096) for i in range(64)}
    shapes = [(4096, 14336), (4096, 4096), (14336, 4096), (32, 1024, 1024)]
    while (left := gib * 2**30 - sum(x.nbytes for x in state.values())) > 4 * 4096 * 4096:
        shape = next(s for s in shapes[len(state) % 4 :] + shapes if 4 * math.prod(s) <= left)
        state[f"w{len(state)}"] = torch.randn(shape)
    return state


def together(action: Callable[[], Any]) -> float:
    """Time an action of all ranks, from the first to start to the last to end."""
    dist.barrier()
    begun = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begun


def counted(action: Callable[[], Any]) -> int:
    """Count what this process reads from files while it restores once more, without memory maps, of which the system counts nothing."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    local, files.LOCAL = files.LOCAL, ()
    before = so_far()
    try:
        action()
    finally:
        files.LOCAL = local
    return so_far() - before


if __name__ == "__main__":
    process.guarded(main)
