"""`--remat auto`: recompute as little as fits, by the plan of the run's own step."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from experiments import plan_search, planning
from experiments.foretold import known
from experiments.settings import Experiment
from mtl.errors import UserError
from mtl.inspect.plan import Plan
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules
from mtl.train import offload
from mtl.train.step import StepOptions

ORDER = ("none", "gather", "selective", "mlp:4", "mlp:2", "mlp", "dense", "full")
"""From what computes least again to what computes most. Each is planned only if those before it do not fit."""
WHOLE = ("every:4", "every:3", "every:2", "full")
"""The same where whole layers must be computed again."""
SPARE = 0.9
"""The share of a device that plain `auto` plans with: the rest is for the driver, communication and gaps between blocks."""
GIB = 2**30


class Chosen(NamedTuple):
    """What was chosen, and the plans that led to it, in bytes at the peak."""

    remat: str
    peaks: Mapping[str, int]
    budget: int

    def __str__(self) -> str:
        """Say it in a line."""
        before = [f"{name} {peak / GIB:.1f}" for name, peak in self.peaks.items() if name != self.remat]
        why = f"; planned and too large: {', '.join(before)} GiB" if before else ""
        return (
            f"remat {self.remat}: chosen for {self.budget / GIB:.1f} GiB, its planned peak is {self.peaks[self.remat] / GIB:.1f} GiB{why}"
        )


def is_auto(remat: str) -> bool:
    """Tell whether remat is to be chosen."""
    return remat.partition(":")[0] == "auto"


def parse_budget(remat: str, total: int) -> int:
    """Read auto, auto:100GiB or auto:80%, where a device has ``total`` bytes."""
    text = remat.partition(":")[2]
    if remat == "auto":
        return round(total * SPARE)
    try:
        if not text.endswith("%"):
            return plan_search.parse_bytes(text)
        if 0 < float(text[:-1]) <= 100:
            return round(float(text[:-1]) / 100 * total)
    except (UserError, ValueError):
        pass
    raise UserError(f"--remat is {remat!r}: expected auto, auto:100GiB (or GB, ...) or auto:80% (of the device's memory, at most 100%).")


def choose(peak: Callable[[str], int], budget: int, order: Sequence[str] = ORDER) -> Chosen:
    """Choose the first whose peak fits, or say what comes closest."""
    peaks: dict[str, int] = {}
    for remat in order:
        peaks[remat] = peak(remat)
        if peaks[remat] <= budget:
            return Chosen(remat, peaks, budget)
    best = min(peaks, key=lambda name: peaks[name])
    raise UserError(
        f"--remat auto: no plan fits {budget / GIB:.2f} GiB. Closest comes {best}, with a planned peak of {peaks[best] / GIB:.2f} GiB, "
        f"{(peaks[best] - budget) / GIB:.2f} GiB too much. Use a smaller --train.micro-batch-size, shorter samples or more devices."
    )


def candidates(shape: MeshShape, kept: str) -> tuple[str, ...]:
    """Give what a run can choose from: gather is none without a tensor axis, and what waits in host memory must be computed again."""
    return WHOLE if offload.activations(kept) else tuple(remat for remat in ORDER if remat != "gather" or shape.tensor > 1)


def planned(
    setup: Experiment, rules: Rules, shape: MeshShape, sizes: Mapping[str, int], options: StepOptions, device: torch.device,
    documents: bool, engine: bool = False,
) -> Callable[[str], Plan]:  # fmt: skip
    """Make ``plan(remat)``: the plan of the run's step with it."""
    if why := planning.refuses(setup):
        raise UserError(f"--remat {setup.remat} needs a plan of the step, and there is none: {why}. Choose another than auto.")

    def plan(remat: str) -> Plan:
        kind, chosen = "cpu" if device.type == "cpu" else "meta", dataclasses.replace(options, remat=remat)
        job = planning.job_for(setup, rules, shape, sizes, chosen, kind, documents, engine)
        return planning.plan(setup, job, known(device))

    return plan


def settled(
    setup: Experiment, rules: Rules, shape: MeshShape, sizes: Mapping[str, int], options: StepOptions, device: torch.device,
    documents: Callable[[], bool], engine: bool = False,
) -> tuple[Experiment, tuple[str, ...]]:  # fmt: skip
    """Replace auto by what the first process chooses, and say why. Every process must call this."""
    if not is_auto(setup.remat):
        return setup, ()

    def decide() -> str:
        budget = parse_budget(setup.remat, memory_of(device, shape.devices()))
        plan = planned(setup, rules, shape, sizes, options, device, documents(), engine)
        found = choose(lambda remat: plan(remat).memory.peak, budget, candidates(shape, setup.offload))
        return json.dumps([found.remat, str(found)])

    remat, said = json.loads(process.on_first_rank(decide))
    return dataclasses.replace(setup, remat=remat), (said,)


def memory_of(device: torch.device, processes: int) -> int:
    """Give a device's memory; on a CPU, a process's share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
