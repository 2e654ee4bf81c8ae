"""Wire what watches a run's speed: time spent compiling, and profiles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.settings import Experiment
from mtl.errors import UserError
from mtl.runtime.compile_time import compile_time
from mtl.runtime.log import RunLog
from mtl.runtime.process import Place
from mtl.runtime.profile import Profiler, profiled_steps, profiling
from mtl.sharding.mesh import MeshShape

Hook = Callable[[int, Any, dict[str, Any]], None]


def check(setup: Experiment) -> None:
    """Refuse a profile of more steps than there are."""
    if not 0 <= setup.profile <= setup.train.steps:
        raise UserError(f"--profile is {setup.profile}: it must lie from 0 to --train.steps, {setup.train.steps}.")


def compiling(log: RunLog) -> Hook:
    """Make the hook that records, after each step that compiled something, the seconds it took (compile_time), and says where they went."""
    known = 0.0

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        nonlocal known
        spent = compile_time()
        if spent.total - known > 0.01:
            record["compile_time"] = round(spent.total - known, 2)
            log.say(f"compiled in step {i}: {record['compile_time']} s of its {record['step_time']:.1f} s; so far {spent}")
        known = spent.total

    return hook


def profiled(setup: Experiment, at: Place, folder: Path, about: str, first: int, log: RunLog) -> list[Hook]:
    """Make the hook that profiles, where it is asked for, on the first device; just before step ``first + 1``."""
    if not setup.profile or at.rank:
        return []
    return [profiling(Profiler(folder / "profile", at.device, about), first, setup.train.steps, setup.profile, log.say)]


def may_wait(setup: Experiment, at: Place, shape: MeshShape, first: int, i: int) -> bool:
    """Say whether a device may begin the step after step i before i is told of.

    Not where that would change what is measured or saved: a step that is evaluated, saved or where a profile begins or ends has the device
    to itself, and the first two steps compile. A CPU computes nothing while it is told.
    """
    alone = any(every and i % every == 0 for every in (setup.train.eval_every, setup.checkpoint.every))
    profiled = setup.profile > 0 and i in profiled_steps(first, setup.train.steps, setup.profile)
    return at.device.type == "cuda" and shape.pipe == 1 and i > first + 1 and not (alone or profiled)
