"""A run's plan: made and shown at its start, held against what was measured at its end. Nothing here can stop a run."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments import planning, recording
from experiments.settings import Experiment
from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.inspect.describe import against, as_page, shortfall, summary
from mtl.inspect.page import write_page
from mtl.inspect.plan import Plan
from mtl.runtime.log import RunLog
from mtl.sharding.mesh import MeshShape
from mtl.sharding.parallel import Parallel
from mtl.train.speed import peak_memory_gib, resident_gib
from mtl.train.step import StepOptions

SETTLED = 3
"""The first steps compile and warm up: the median is over those that follow, where there are any."""


@dataclass
class Foretold:
    """A plan (or why there is none), and the step times seen since. On a CPU, memory is counted from what the process held before."""

    plan: Plan | None
    why_not: str
    device: torch.device
    before: float
    times: list[float] = field(default_factory=list[float])

    def hook(self, last: int, log: RunLog) -> Callable[[int, Any, dict[str, Any]], None]:
        """Make the hook that watches every step, and after the last adds the comparison to its record and shows it."""

        def hook(i: int, state: Any, record: dict[str, Any]) -> None:
            if "step_time" in record:
                self.times.append(record["step_time"])
            if i == last:
                record["plan"] = self.compared(record.get("peak_memory_gib"))
                for line in self.said_at_end(record["plan"]):
                    log.say(line)

        return hook

    def compared(self, peak: float | None) -> dict[str, Any]:
        """Put plan and measurement side by side, as plain values; None is what is not known, errors are (plan - measured) / measured."""
        planned = None if self.plan is None else self.plan.memory.peak / 2**30
        step = None if self.plan is None else self.plan.step
        memory = peak_memory_gib(self.device) if peak is None else peak
        memory = None if self.device.type == "mps" else memory - self.before
        settled = self.times[SETTLED:] or self.times[1:]
        seen = statistics.median(settled) if settled else None
        return {
            "peak_memory_gib": planned, "measured_peak_memory_gib": memory, "peak_memory_error": _error(planned, memory),
            "step_time": step, "measured_step_time": seen, "step_time_error": _error(step, seen),
        }  # fmt: skip

    def said_at_end(self, found: dict[str, Any]) -> list[str]:
        """Say the comparison in words."""
        if self.plan is None:
            return []
        what = "step's memory (what the process grew by)" if self.device.type == "cpu" else "peak"
        return [against(what, found)]


def _error(planned: float | None, measured: float | None) -> float | None:
    return None if planned is None or not measured else (planned - measured) / measured


def foretell(
    setup: Experiment, shape: MeshShape, par: Parallel, options: StepOptions, device: torch.device, first: bool,
    documents: Callable[[], bool],
) -> Foretold:  # fmt: skip
    """Plan a run's step on its first rank; the others plan nothing. Whatever goes wrong is said, and the run goes on."""
    before = resident_gib() if device.type == "cpu" else 0.0
    if not first:
        return Foretold(None, "", device, before)
    try:
        why = planning.refuses(setup)
        found = None if why else planning.plan(setup, _job(setup, shape, par, options, device, documents()), known(device))
    except Exception as error:  # a plan is advice: no fault of it may end a run
        found, why = None, f"{type(error).__name__}: {error}".splitlines()[0]
    return Foretold(found, why, device, resident_gib() if device.type == "cpu" else 0.0)


def known(device: torch.device) -> hardware.Device | None:
    """Find the table of the run's device, if there is one."""
    return hardware.named_like(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _job(setup: Experiment, shape: MeshShape, par: Parallel, options: StepOptions, device: torch.device, documents: bool) -> recording.Job:
    kind = "cpu" if device.type == "cpu" else "meta"
    return planning.job_for(setup, par.rules, shape, par.sizes, options, kind, documents, par.engine)


def show(foretold: Foretold, folder: Path, title: str, log: RunLog) -> None:
    """Say the plan in a few words, and leave plan.json and plan.html in the run's folder."""
    plan = foretold.plan
    if plan is None:
        log.say(f"plan: none ({foretold.why_not})")
        return
    log.say(summary(plan) + ("" if plan.seconds else f"; time not planned (no table for this {foretold.device.type} device)"))
    if lack := shortfall(plan):
        log.say(f"WARNING: {lack}")
    try:
        (folder / "plan.json").write_text(json.dumps(plan.as_json(), indent=1) + "\n")
        write_page(folder / "plan.html", as_page(plan, f"Plan of {title}", f"made {time.strftime('%Y-%m-%d %H:%M')} when the run began"))
    except (OSError, UserError) as error:
        log.say(f"plan.json and plan.html could not be written: {error}")
