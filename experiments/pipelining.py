"""Wire a run's pipeline: settle its numbers, check them, choose step and evaluation with or without one, write down measured times."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.settings import Experiment, PipelineSettings
from experiments.tuning import ALL, Tuning
from mtl import tree
from mtl.errors import UserError
from mtl.models import decoder
from mtl.pipeline.schedules import BUILDERS, build
from mtl.pipeline.simulate import simulate
from mtl.pipeline.split import costs, split_layers
from mtl.sharding.collectives import psum
from mtl.sharding.mesh import MeshShape
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.train.evaluate import make_evaluate
from mtl.train.pipelined import Pipeline, PipelinedStep, Watch, make_pipelined_evaluate, make_pipelined_step
from mtl.train.step import make_step

EMBED_SHARE = 0.05
"""The embedding's work as a share of the head's: a lookup multiplies nothing, but its gradient is as large."""

WATCHED = (2, 10, 100, 1000)
"""Steps whose times are written down, beside the last."""


def settled(setup: Experiment, rules: Rules, shape: MeshShape) -> Experiment:
    """Settle schedule, micro-batches and their size where they were left open; refuse settings that have no pipeline to act on."""
    chosen, train = setup.pipeline, setup.train
    if shape.pipe == 1:
        for name, value in vars(chosen).items():
            if value != getattr(PipelineSettings(), name):
                flag = name.replace("_", "-")
                raise UserError(f"--pipeline.{flag} is {value}, but there is no pipeline: set --mesh.pipe to 2 or more, or leave it out.")
        return setup
    schedule = chosen.schedule or "1f1b"
    share, rest = divmod(train.global_batch_size, math.prod(getattr(shape, axis) for axis in rules.act["batch"]))
    micros, size = chosen.microbatches, train.micro_batch_size
    if schedule not in BUILDERS and micros is None:
        micros = build(schedule, shape.pipe, None, chosen.virtual).microbatches
    if micros is not None and micros < 1:
        raise UserError(f"--pipeline.microbatches is {micros}: it must be at least 1.")
    if size is None and micros is None:
        size = max((n for n in range(1, 9) if share > 0 and share % n == 0 and share // n >= 4 * shape.pipe), default=1)
    elif size is None and micros is not None:
        if rest or share % micros or share < micros:
            raise UserError(
                f"--pipeline.microbatches is {micros}, but --train.global-batch-size {train.global_batch_size} gives each data-parallel "
                f"device {share} samples a step, which do not divide into as many micro-batches. Change one of them."
            )
        size = share // micros
    if size is not None and size > 0 and micros is not None and share != size * micros:
        raise UserError(
            f"--pipeline.microbatches is {micros}, but --train.global-batch-size {train.global_batch_size} makes {share / size:g} "
            f"micro-batches of --train.micro-batch-size {size} a device. Leave one of the three out, or make them agree."
        )
    return dataclasses.replace(
        setup,
        pipeline=dataclasses.replace(chosen, schedule=schedule, microbatches=micros or max(1, share // max(1, size or 1))),
        train=dataclasses.replace(train, micro_batch_size=size),
    )


def work(setup: Experiment) -> tuple[float, float]:
    """Say how many layers' work the head and the embedding are, by their products."""
    model, specs = setup.model, decoder.specs(setup.model)
    layer = sum(math.prod(s.shape) for s in tree.leaves(specs["layers"])) / model.layers
    layer += model.heads * model.head_size * setup.train.seq_len  # attention's square, halved
    head = model.vocab * model.embed / layer
    return head, EMBED_SHARE * head


def plan(setup: Experiment, shape: MeshShape) -> Pipeline | None:
    """Make the pipeline of settled settings, or refuse what cannot be; None where there is none."""
    chosen = setup.pipeline
    if shape.pipe == 1 or chosen.schedule is None:
        return None
    schedule, virtual = chosen.schedule, chosen.virtual
    known = {chosen.microbatches: build(schedule, shape.pipe, chosen.microbatches, virtual)}
    first = known[chosen.microbatches]

    def table(micros: int) -> Any:
        if micros not in known:
            known[micros] = build(schedule, shape.pipe, micros, virtual)
        return known[micros]

    layers = split_layers(setup.model.layers, first.stages, *work(setup), chosen.layers_per_stage, first)
    return Pipeline(table, layers, first.place)


def described(setup: Experiment, pipeline: Pipeline | None) -> dict[str, Any]:
    """Say what the pipeline came to, with its simulated bubble."""
    if pipeline is None or setup.pipeline.microbatches is None:
        return {}
    counts = [len(layers) for layers in pipeline.layers]
    table = pipeline.table(setup.pipeline.microbatches)
    found = simulate(table, costs(counts, *work(setup)))
    return {
        "schedule": table.name,
        "stages": table.stages,
        "microbatches": table.microbatches,
        "layers_per_stage": counts,
        "simulated_bubble": round(found.bubble, 4),
        "simulated_stored": list(found.stored),
    }


class Timing:
    """Which steps' actions are timed, and the pipelined steps that time them."""

    def __init__(self, steps: int) -> None:
        """Choose some early steps and the last of ``steps``."""
        self.chosen = {*WATCHED, steps}
        self.made: list[PipelinedStep] = []
        self.watched = 1 in self.chosen

    def add(self, step: PipelinedStep) -> PipelinedStep:
        """Take a step in."""
        self.made.append(step)
        step.watched = self.watched
        return step

    def hook(self, folder: Path, first: bool) -> Callable[[int, Any, dict[str, Any]], None]:
        """Make the hook that writes measured times to the folder's pipeline.jsonl."""

        def hook(i: int, state: Any, record: dict[str, Any]) -> None:
            self.watched = i + 1 in self.chosen
            for step in self.made:
                if step.watch is not None:
                    rows = gathered(step, step.watch)
                    step.watch = None
                    if first:
                        with (folder / "pipeline.jsonl").open("a") as file:
                            file.write(json.dumps({"step": i, "rows": rows}) + "\n")
                step.watched = self.watched

        return hook


def make_steps(
    pipeline: Pipeline | None, config: Any, par: Parallel, optimizer: Any, rate: Any, options: Any, timing: Timing, tuned: Tuning = ALL,
    weights: Any = None,
) -> Any:  # fmt: skip
    """Make the step, through the pipeline if there is one, of what is trained; ``weights`` are those that steps with offload share."""
    if pipeline is None:
        return tuned.step(make_step(tuned.model, config, par, optimizer, rate, options, weights))
    return tuned.step(timing.add(make_pipelined_step(tuned.model, config, par, optimizer, rate, options, pipeline, tuned.whole)))


def make_evaluation(pipeline: Pipeline | None, config: Any, par: Parallel, precision: Any, model: Any = decoder) -> Any:
    """Make the evaluation of a model, through the pipeline if there is one."""
    if pipeline is None:
        return make_evaluate(model, config, par, precision)
    return make_pipelined_evaluate(model, config, par, precision, pipeline)


def said(setup: Experiment, pipeline: Pipeline | None) -> list[str]:
    """Say in a line what the pipeline came to, where there is one."""
    found = described(setup, pipeline)
    return ["pipeline " + ", ".join(f"{name} {value}" for name, value in found.items())] if found else []


def gathered(step: PipelinedStep, watch: Watch) -> list[list[tuple[str, float, float]]]:
    """Bring the times of a pipeline's devices together: rows of (action, start, end), in seconds from the first start."""
    par, table = step.staging.par, step.table
    assert table is not None
    spans = watch.spans(step.staging.device)
    times = torch.zeros(table.devices, max(len(row) for row in table.rows), 2, dtype=torch.float64)
    times[step.staging.device, : len(spans)] = torch.tensor([(s.start, s.end) for s in spans], dtype=torch.float64)
    times = psum(times.to(par.mesh.device_type), ("pipe",), par.mesh).tolist()
    begun = min(row[0][0] for row in times)
    return [
        [(str(action), at[0] - begun, at[1] - begun) for action, at in zip(row, ends, strict=False)]
        for row, ends in zip(table.rows, times, strict=True)
    ]
