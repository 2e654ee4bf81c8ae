"""Time a start by its phases, with an empty compiler cache and again with a full one.

`python experiments/bench/startup.py --devices 4 --preset llama3_8b` takes the flags of step.py.
Each start is a process (or one a device) of its own.
"""

import cProfile
import dataclasses
import io
import json
import pstats
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.bench.step import Bench, prepared
from mtl.errors import UserError
from mtl.runtime import process
from mtl.runtime.compile_time import compile_time


@dataclass(frozen=True)
class Startup(Bench):
    """What to start."""

    devices: int = 1
    """Processes, one a device."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The compiler's cache; by default a fresh one, which is removed at the end."""
    starts: int = 2
    """How often: the first with the cache as it is, the others with what it holds then."""
    calls: int = 0
    """Show so many of Python's functions by the time that the first start spends inside them (which slows it down)."""
    begun: float = 0.0
    """When this process was started (Unix time): given to the processes that are timed, leave it out."""


def main() -> None:
    """Start some processes and compare them."""
    flags = process.command_line()
    startup = tyro.cli(Startup, args=flags, config=(tyro.conf.AvoidSubcommands,))
    if startup.begun:
        start(startup)
        return
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(startup.devices)]
    program = program if startup.devices > 1 else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        found: list[dict[str, float]] = []
        for i in range(startup.starts):
            out = Path(folder) / f"{i}.json"
            own = ["--cache", str(startup.cache or Path(folder) / "cache"), "--json", str(out), "--begun", str(time.time())]
            command = [*program, __file__, *flags, *own, *(["--calls", "0"] if i else [])]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"start {i + 1} failed; what it printed says why.")
            found.append(json.loads(out.read_text()))
    names = ["cold" if startup.cache is None else "first", *["warm"] * (startup.starts - 1)]
    print(table(found, names), flush=True)
    if startup.json:
        with startup.json.open("a") as file:
            file.write(json.dumps({**dataclasses.asdict(startup), "starts": found}, default=str) + "\n")


def start(startup: Startup) -> None:
    """Start once: take two steps and write seconds by phase."""
    at = process.place()
    process.prepare_environment(cache=startup.cache)
    seconds: dict[str, Any] = {"imports": time.time() - startup.begun}
    ready = time.perf_counter()
    with prepared(startup, at) as (_, _, run):
        seconds["state and data"] = time.perf_counter() - ready
        watch = cProfile.Profile()
        begun = time.perf_counter()
        if startup.calls and at.rank == 0:
            watch.enable()
        run(0)["loss"].item()
        watch.disable()
        first = time.perf_counter() - begun
        begun = time.perf_counter()
        run(1)["loss"].item()
        second = time.perf_counter() - begun
    spent = compile_time()
    seconds |= {"first step": first, **{f"  {name}": value for name, value in spent.seconds.items()}}
    seconds |= {"  not compiling": first - spent.total, "second step": second}
    seconds |= {"graphs from cache": spent.hits, "graphs made": spent.misses, "graphs not cacheable": spent.uncached}
    if at.rank == 0 and startup.json:
        startup.json.write_text(json.dumps(seconds))
        if startup.calls:
            text = io.StringIO()
            pstats.Stats(watch, stream=text).sort_stats("cumulative").print_stats(startup.calls)
            print(text.getvalue(), flush=True)


def table(found: list[dict[str, float]], names: list[str]) -> str:
    """Write phases down and starts across."""
    lines = [f"{'seconds':24s}" + "".join(f"{name:>10s}" for name in names)]
    for phase in found[0]:
        cells = (f"{one[phase]:10d}" if isinstance(one[phase], int) else f"{one[phase]:10.2f}" for one in found)
        lines.append(f"{phase:24s}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    process.guarded(main)
