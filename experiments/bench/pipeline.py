"""Time pipeline schedules against FSDP on the same devices: `torchrun --nproc-per-node 4 experiments/bench/pipeline.py --preset llama3_8b`.

Each schedule over a pipeline of all devices, then FSDP over all of them, with every number of micro-batches, on the same random tokens.
Prints a line each, and at the end each schedule's share of what FSDP and the simulated bubble promise. With --out it writes one JSON
object a line, and pictures of the last step's times under the simulation.
"""

import dataclasses
import gc
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro

from experiments import pipelining, pretrain
from experiments.bench.step import RandomTokens
from experiments.presets import PRESETS
from experiments.provenance import provenance
from experiments.settings import Experiment, MeshSettings, PipelineSettings
from mtl import params
from mtl.data.batches import BatchShape, batch_at
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.pipeline.draw import write
from mtl.pipeline.simulate import Span, Timeline, simulate
from mtl.pipeline.split import costs
from mtl.pipeline.table import parse_action
from mtl.runtime import process
from mtl.sharding.mesh import make_mesh
from mtl.sharding.parallel import Parallel
from mtl.train.pipelined import PipelinedStep
from mtl.train.speed import peak_memory_gib
from mtl.train.state import init_state


@dataclass(frozen=True)
class Bench:
    """What to time."""

    preset: str = "llama3_8b"
    layers: int | None = None
    seq_len: int = 8192
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb_h1", "zb_v")
    microbatches: tuple[int, ...] = (8, 16, 32)
    precision: Literal["fp64", "fp32", "bf16"] = "bf16"
    transport: Literal["auto", "nccl"] = "auto"
    """How messages (and FSDP's weights) travel: auto takes the copy engines of one host's GPUs."""
    compile: Literal["none", "block", "step"] = "block"
    """How stages are compiled; FSDP is compiled as one step unless this is none."""
    remat: str = "none"
    fsdp: bool = True
    """Time FSDP too."""
    steps: int = 7
    warmup: int = 3
    out: Path | None = None


def main() -> None:
    """Time everything, one after the other."""
    bench = tyro.cli(Bench, args=process.command_line(), config=(tyro.conf.AvoidSubcommands,))
    at = process.place()
    process.prepare_environment()
    if bench.out and at.rank == 0:
        bench.out.mkdir(parents=True, exist_ok=True)
    with process.process_group(at):
        traced: dict[Any, Any] = {}  # layers are the same functions under every schedule: compiled once
        found = [timed(bench, name, at, traced) for name in (*bench.schedules, *((None,) if bench.fsdp else ()))]
        if bench.fsdp and at.rank == 0:
            compare(bench, found[:-1], {each["microbatches"]: each["speed"] for each in found[-1]})


def compare(bench: Bench, pipelines: list[list[dict[str, Any]]], base: dict[int, float]) -> None:
    """Print what pipelines reach of FSDP's speed less the simulated bubble."""
    for each in (each for found in pipelines for each in found):
        target = base[each["microbatches"]] * (1.0 - each["simulated_bubble"])
        print(
            f"m {each['microbatches']} {each['name']}: {each['speed']:,.0f} tokens/s/device, bubble {each['simulated_bubble']:.1%}, "
            f"{each['speed'] / base[each['microbatches']]:.1%} of FSDP, {each['speed'] / target:.1%} of FSDP x (1 - bubble)",
            flush=True,
        )
        if bench.out is not None:
            keep(bench.out, {**each, "of_target": each["speed"] / target})


def settings(bench: Bench, name: str | None, micros: int, world: int) -> Experiment:
    """Give a run's settings: a sample a micro-batch; FSDP takes as many samples a step."""
    preset = PRESETS[bench.preset]
    model = dataclasses.replace(preset.model, layers=bench.layers or preset.model.layers)
    train = dataclasses.replace(preset.train, global_batch_size=micros, micro_batch_size=1, seq_len=bench.seq_len)
    mesh = MeshSettings(fsdp=world) if name is None else MeshSettings(pipe=world)
    pipeline = PipelineSettings(schedule=name, microbatches=micros) if name else PipelineSettings()
    how = "step" if name is None and bench.compile != "none" else bench.compile
    return dataclasses.replace(
        preset, model=model, train=train, mesh=mesh, pipeline=pipeline, precision=bench.precision, remat=bench.remat, compile=how
    )


def timed(bench: Bench, name: str | None, at: process.Place, traced: dict[Any, Any]) -> list[dict[str, Any]]:
    """Time one schedule (None: FSDP) with every number of micro-batches and give what was found."""
    setup = settings(bench, name, bench.microbatches[0], at.world)
    rules, shape = pretrain.choose_layout(setup, at.world)
    setup = pretrain.with_micro_batch(setup, rules, shape)
    precision = pretrain.choose_precision(setup, at.device)
    pretrain.check(setup, rules, shape, precision, at.device)
    engine = bench.transport == "auto" and process.copy_engines(at)
    par = Parallel(make_mesh(shape, at.device.type), rules, pretrain.sizes(setup, rules, shape), precision.reduce, engine=engine)
    specs, pipeline = decoder.specs(setup.model), pipelining.plan(setup, shape)
    optimizer, rate = adamw(params.decayed(specs)), schedule("constant", 3e-4, 1000, 5)
    options = pretrain.make_step_options(setup, precision, at.device)
    step = pipelining.make_steps(pipeline, setup.model, par, optimizer, rate, options, pipelining.Timing(0))
    state = init_state(specs, rules, par.mesh, 0, precision, optimizer)
    if isinstance(step, PipelinedStep):
        step.staging.traced = traced
    results: list[dict[str, Any]] = []
    for micros in bench.microbatches:
        now = settings(bench, name, micros, at.world)
        batch = batch_at(par, RandomTokens(setup.model.vocab, 0, 4 * micros), 0, BatchShape(micros, 1, bench.seq_len), precision.param)
        found = run(bench, step, state, batch)
        found["speed"] = micros * bench.seq_len / found["seconds"] / at.world
        results.append(report(bench, pretrain.with_micro_batch(now, rules, shape), pipeline, step, found, at))
    del step, state
    gc.collect()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    return results


def run(bench: Bench, step: Any, state: Any, batch: Any) -> dict[str, Any]:
    """Take some steps; give their times."""
    times: list[float] = []
    losses: list[float] = []
    for i in range(bench.steps):
        if isinstance(step, PipelinedStep):
            step.watched = i + 1 == bench.steps  # the last, which is not counted
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(times[bench.warmup : -1]), "first": times[0], "losses": losses}


def report(bench: Bench, setup: Experiment, pipeline: Any, step: Any, found: dict[str, Any], at: process.Place) -> dict[str, Any]:
    """Print a line; write the object and the picture."""
    facts = pipelining.described(setup, pipeline)
    name, micros = setup.pipeline.schedule or f"fsdp {at.world}", setup.train.global_batch_size
    rows = pipelining.gathered(step, step.watch) if isinstance(step, PipelinedStep) and step.watch is not None else None
    line = {**found, **facts, "name": name, "microbatches": micros, "peak_gib": peak_memory_gib(at.device)}
    if at.rank:
        return line
    timelines = [] if rows is None else both(setup, pipeline, name, rows)
    print(
        f"{bench.preset} x{setup.model.layers} m {micros} {name} seq {bench.seq_len}: first {found['first']:.0f} s  step "
        f"{found['seconds'] * 1e3:.0f} ms  {found['speed']:,.0f} tokens/s/device  peak {line['peak_gib']:.1f} GiB"
        + "".join(f"  bubble {what} {timeline.bubble:.1%}" for what, timeline in zip(("simulated", "measured"), timelines, strict=False)),
        flush=True,
    )
    if bench.out is not None:
        keep(bench.out, line | {"rows": rows, **provenance()})
        if timelines:
            write(timelines, bench.out / f"{name}-{micros}.svg")
    return line


def both(setup: Experiment, pipeline: Any, name: str, rows: Any) -> list[Timeline]:
    """Give the timeline as simulated, stages weighed by their layers, and as measured."""
    spans = tuple(tuple(Span(d, parse_action(a, name), s, e) for a, s, e in row) for d, row in enumerate(rows))
    return [
        simulate(
            pipeline.table(setup.train.global_batch_size), costs([len(layers) for layers in pipeline.layers], *pipelining.work(setup))
        ),
        Timeline(f"{name}, measured (seconds)", spans),
    ]


def keep(folder: Path, line: dict[str, Any]) -> None:
    """Write a line of results."""
    with (folder / "pipeline.jsonl").open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    process.guarded(main)
