"""Time pipeline schedules against FSDP on the same devices: `torchrun --nproc-per-node 4 experiments/bench/pipeline.py --preset llama3_8b`.

FSDP over all devices, then each schedule over a pipeline of all of them, with every number of micro-batches, on the same random tokens.
Prints a line each and, with --out, writes one JSON object a line and pictures of the last step's times under the simulation.
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
from mtl.pipeline.simulate import Costs, Span, Timeline, simulate
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
        base = timed(bench, None, at, {})
        for name in bench.schedules:
            timed(bench, name, at, base)


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


def timed(bench: Bench, name: str | None, at: process.Place, base: dict[int, float]) -> dict[int, float]:
    """Time one schedule (None: FSDP) with every number of micro-batches and give its tokens a second and device."""
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
    speeds: dict[int, float] = {}
    for micros in bench.microbatches:
        now = settings(bench, name, micros, at.world)
        batch = batch_at(par, RandomTokens(setup.model.vocab, 0, 4 * micros), 0, BatchShape(micros, 1, bench.seq_len), precision.param)
        found = run(bench, step, state, batch)
        speeds[micros] = found["speed"] = micros * bench.seq_len / found["seconds"] / at.world
        report(bench, pretrain.with_micro_batch(now, rules, shape), pipeline, step, found, base.get(micros), at)
    del step, state
    gc.collect()
    if at.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    return speeds


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


def report(bench: Bench, setup: Experiment, pipeline: Any, step: Any, found: dict[str, Any], base: float | None, at: process.Place) -> None:
    """Print a line; write the object and the picture."""
    facts = pipelining.described(setup, pipeline)
    name, micros = setup.pipeline.schedule or f"fsdp {at.world}", setup.train.global_batch_size
    target = base * (1.0 - facts["simulated_bubble"]) if base is not None else None
    rows = pipelining.gathered(step, step.watch) if isinstance(step, PipelinedStep) and step.watch is not None else None
    if at.rank:
        return
    against = "" if target is None else f"  bubble {facts['simulated_bubble']:.1%}  {found['speed'] / target:.1%} of FSDP x (1 - bubble)"
    print(
        f"{bench.preset} x{setup.model.layers} m {micros} {name} seq {bench.seq_len}: first {found['first']:.0f} s  step "
        f"{found['seconds'] * 1e3:.0f} ms  {found['speed']:,.0f} tokens/s/device  peak {peak_memory_gib(at.device):.1f} GiB{against}",
        flush=True,
    )
    if bench.out is None:
        return
    line = {**found, **facts, "name": name, "microbatches": micros, "of_target": target and found["speed"] / target, **provenance()}
    with (bench.out / "pipeline.jsonl").open("a") as file:
        file.write(json.dumps(line | {"rows": rows}, default=str) + "\n")
    if rows is not None:
        spans = tuple(tuple(Span(d, parse_action(a, name), s, e) for a, s, e in row) for d, row in enumerate(rows))
        head, embed = pipelining.work(setup)
        load = [float(n) for n in facts["layers_per_stage"]]
        load[0], load[-1] = load[0] + embed, load[-1] + head
        simulated = simulate(pipeline.table(micros), Costs(work=tuple(load)))
        write([simulated, Timeline(f"{name}, measured", spans)], bench.out / f"{name}-{micros}.svg")


if __name__ == "__main__":
    process.guarded(main)
