"""Hold plans against measured runs: `python experiments/bench/plan_error.py measure --out runs.jsonl` (under torchrun for several GPUs).

`measure` runs a few steps of every configuration of plan_cases.py that is made for as many GPUs as there are processes, and appends the
allocator's peak and the median step. `table --runs FILES` plans the same configurations (no GPU needed) and writes the table of errors
into docs/planner.md.
"""

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

import sharding_rules
from experiments import pipelining, planning, pretrain
from experiments.bench.plan_cases import CASES, Case
from experiments.bench.step import RandomTokens
from experiments.presets import PRESETS
from experiments.provenance import provenance
from experiments.settings import Experiment, PipelineSettings
from mtl import params
from mtl.data.batches import BatchShape, batch_at
from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.inspect.plan import Plan
from mtl.kernels import copy_engine
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.precision import PRECISIONS
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape
from mtl.train.state import init_state
from mtl.train.step import StepOptions

START, END = "<!-- plan_error: from here", "<!-- plan_error: to here -->"


@dataclass(frozen=True)
class Measure:
    """Measure the configurations for as many GPUs as there are processes."""

    out: Path
    """Lines of JSON are appended here; what it already holds is left out."""
    steps: int = 7
    warmup: int = 3
    seconds: float = 100.0
    """Begin no further configuration after so long."""
    share: str = "0/1"
    """Which part of the list: 1/4 is every fourth from the second on."""
    skip: tuple[Path, ...] = ()
    """Files of runs that need not be made again."""


@dataclass(frozen=True)
class Show:
    """Plan what was measured and write the table."""

    runs: tuple[Path, ...] = (Path("docs/measured/plan_runs.jsonl"),)
    device: str = "h200"
    write: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A page with the two marks between which the table stands, such as docs/planner.md; without it the table is printed."""


def main() -> None:
    """Measure, or show."""
    chosen = tyro.extras.subcommand_cli_from_dict({"measure": Measure, "table": Show}, args=process.command_line())
    measure(chosen) if isinstance(chosen, Measure) else show(chosen)


def setup_of(case: Case) -> Experiment:
    """Make the settings of a case."""
    preset = PRESETS[case.preset]
    model = dataclasses.replace(preset.model, layers=case.layers or preset.model.layers)
    rules = sharding_rules.load(case.rules)
    rows = math.prod(getattr(case.mesh, axis) for axis in rules.act["batch"])
    train = dataclasses.replace(
        preset.train, global_batch_size=rows * case.micro * case.accumulate, micro_batch_size=case.micro, seq_len=case.seq
    )
    chosen: Any = {"precision": case.precision, "compile": case.compile}
    setup = dataclasses.replace(preset, model=model, train=train, rules=case.rules, remat=case.remat, **chosen)
    setup = dataclasses.replace(setup, pipeline=PipelineSettings(case.schedule or None, layers_per_stage=case.split or None))
    return pipelining.settled(setup, rules, case.mesh)


def options_of(case: Case) -> StepOptions:
    """Say how a case's step runs."""
    return StepOptions(PRECISIONS[case.precision], case.remat, case.compile, clip=1.0)


def plan_of(case: Case, device: hardware.Device) -> Plan:
    """Plan a case."""
    setup, rules = setup_of(case), sharding_rules.load(case.rules)
    sizes = pretrain.sizes(setup, rules, case.mesh)
    engine = planning.by_engine(setup, case.mesh, device)
    return planning.plan(setup, planning.job_for(setup, rules, case.mesh, sizes, options_of(case), "meta", engine=engine), device)


def measure(asked: Measure) -> None:
    """Run every case once, until the time is up."""
    at, begun = process.place(), time.perf_counter()
    process.prepare_environment()
    if at.device.type != "cuda":
        raise UserError("plan_error.py measure needs CUDA devices: it reads the allocator's peak.")
    part, _, parts = asked.share.partition("/")
    mine = CASES.get(at.world, ())[int(part) :: int(parts or 1)]
    done = {json.dumps(x["case"]) for x in read([*([asked.out] if asked.out.exists() else []), *asked.skip])}
    name = torch.cuda.get_device_name(at.device)
    with process.process_group(at):
        for case in mine:
            written = dataclasses.asdict(case)
            late = torch.tensor(time.perf_counter() - begun > asked.seconds, device=at.device)
            if at.world > 1:
                torch.distributed.broadcast(late, 0)
            if json.dumps(written) in done or late.item():
                continue
            start = time.perf_counter()
            try:
                found = run(case, at, asked)
            except torch.OutOfMemoryError as error:
                found = {"failed": str(error).splitlines()[0]}
            gc.collect()
            copy_engine.release()
            torch.cuda.empty_cache()
            torch.compiler.reset()
            found |= {"wall_s": round(time.perf_counter() - start, 1), "device": name, "date": time.strftime("%Y-%m-%d"), **provenance()}
            if at.rank == 0:
                print(f"{case} {case.rules} {case.mesh}: {found}", flush=True)
                with asked.out.open("a") as file:
                    file.write(json.dumps({"case": written, **found}, default=str) + "\n")


def run(case: Case, at: process.Place, asked: Measure) -> dict[str, Any]:
    """Take some steps: the peak of the whole and of the steps after the second, the median time after the warm-up."""
    setup, rules, precision = setup_of(case), sharding_rules.load(case.rules), PRECISIONS[case.precision]
    par, total = pretrain.parallel(setup, rules, case.mesh, precision, at), setup.train.global_batch_size
    specs = decoder.specs(setup.model)
    optimizer = adamw(params.decayed(specs))
    rate, pipeline = schedule("constant", 3e-4, 1000, 5), pipelining.plan(setup, case.mesh)
    step = pipelining.make_steps(pipeline, setup.model, par, optimizer, rate, options_of(case), pipelining.Timing(0))
    torch.cuda.reset_peak_memory_stats(at.device)
    before = torch.cuda.memory_allocated(at.device)
    state = init_state(specs, rules, par.mesh, 0, precision, optimizer)
    samples = RandomTokens(setup.model.vocab, 0, total)
    batch = batch_at(par, samples, 0, BatchShape(total, case.micro, case.seq), precision.param)
    times: list[float] = []
    losses: list[float] = []
    first = 0
    for i in range(asked.steps):
        if i == 2:
            first = torch.cuda.max_memory_allocated(at.device)
            torch.cuda.reset_peak_memory_stats(at.device)
        torch.cuda.synchronize(at.device)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
        times.append(time.perf_counter() - start)
    slots, (free, used) = copy_engine.held(), torch.cuda.mem_get_info(at.device)
    return {
        "peak": torch.cuda.max_memory_allocated(at.device) - before + slots, "slots": slots, "peak_with_first_steps": first - before,
        "before": before, "engine": par.engine, "reserved": torch.cuda.memory_reserved(at.device),
        "used": used - free,
        "step": statistics.median(times[asked.warmup :]), "times": [round(t, 5) for t in times], "losses": losses,
    }  # fmt: skip


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read measured runs, the newest of each case."""
    newest: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise UserError(f"--runs {path} cannot be read: {error}.") from None
        for line in lines:
            found = json.loads(line)
            newest[json.dumps(found["case"])] = found
    return list(newest.values())


def case_of(values: dict[str, Any]) -> Case:
    """Make a case from a line."""
    fields: Any = {**values, "mesh": MeshShape(**values["mesh"])}
    return Case(**fields)


@dataclass(frozen=True)
class Row:
    """One configuration, planned and measured."""

    case: Case
    plan: Plan
    peak: float
    step: float

    @property
    def planned(self) -> int:
        """Give the planned peak of the device that was measured: of a pipeline, the first."""
        return self.plan.memory.peak if self.plan.piped is None else self.plan.piped.positions[0].memory.peak

    @property
    def errors(self) -> tuple[float, float]:
        """Give (planned - measured) / measured, of memory and of time."""
        return self.planned / self.peak - 1, (self.plan.step or 0.0) / self.step - 1


def rows(runs: Sequence[dict[str, Any]], device: hardware.Device) -> list[Row]:
    """Plan what was measured."""
    good = [(case_of(x["case"]), x) for x in runs if "failed" not in x]
    return [Row(case, plan_of(case, device), x["peak"], x["step"]) for case, x in good]


def show(asked: Show) -> None:
    """Write or print the table."""
    runs = read(asked.runs)
    text = table(rows(runs, hardware.load(asked.device)), runs)
    if asked.write is None:
        print(text)
        return
    page = asked.write.read_text()
    before, begun, rest = page.partition(START)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise UserError(f"--write {asked.write}: the page needs the marks {START!r} and {END!r}.")
    asked.write.write_text(f"{before}{START} -->\n{text}\n{END}{after}")


def table(found: list[Row], runs: Sequence[dict[str, Any]]) -> str:
    """Make the table, worst cases first in words."""
    if not found:
        return "No run has been measured."
    lines = ["| mesh, rules | run | peak measured | planned | error | step measured | planned | error |", "|---|---|" + "---:|" * 6]
    for row in found:
        memory, time_ = row.errors
        where = f"{row.case.mesh}, {row.case.rules}" if row.case.mesh.devices() > 1 else "one GPU"
        lines.append(
            f"| {where} | {row.case} | {row.peak / 2**30:.2f} GiB | {row.planned / 2**30:.2f} | {memory:+.1%} "
            f"| {row.step * 1e3:,.1f} ms | {(row.plan.step or 0) * 1e3:,.1f} | {time_:+.1%} |"
        )
    said: list[str] = []
    for i, (name, bound) in enumerate((("memory", 0.05), ("time", 0.10))):
        worst = max(found, key=lambda row: abs(row.errors[i]))
        inside = sum(abs(row.errors[i]) <= bound for row in found)
        middle = statistics.median(abs(row.errors[i]) for row in found)
        said.append(
            f"{name} within {bound:.0%} on {inside} of {len(found)}, median error {middle:.1%}, worst {worst.errors[i]:+.1%} "
            f"({worst.case.mesh}, {worst.case.rules}, {worst.case})"
        )
    versions = sorted({f"torch {x['versions']['torch']}, {x['device']}, {x['date']}" for x in runs if "versions" in x})
    failed = [f"{case_of(x['case'])} ({x['failed']})" for x in runs if "failed" in x]
    lines += ["", f"Of {len(found)} configurations: {'; '.join(said)}.", f"Measured with {'; '.join(versions)}."]
    return "\n".join(lines + ([f"Not measured: {'; '.join(failed)}."] if failed else []))


if __name__ == "__main__":
    process.guarded(main)
