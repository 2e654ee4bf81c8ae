"""What ranks really hold, to hold layouts and plans against."""

import collections
import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2_dense
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

import sharding_rules
from experiments.plan_pipeline import Drawn
from experiments.recording import Job, record, slots
from mtl import tree
from mtl.kernels.copy_engine import room
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import decayed, init
from mtl.pipeline.schedules import build
from mtl.pipeline.split import split_layers
from mtl.pipeline.stage import Training
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train import pipelined
from mtl.train.pipelined import Pipeline, make_pipelined_step
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import SCHEDULE, batch
from tests.small import BATCH, MESHES, MODELS, SEQ

WORDS = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"} | dict.fromkeys(
    ("all_to_all", "permute"), "all_to_all_single"
)
"""The planner's names of collectives, and those of torch's operations."""


def local_shapes(table: str, world: int, model: str) -> list[dict[str, list[int]]]:
    """Give every rank's local shapes of all parameters."""
    mesh = make_mesh(MESHES[table][world], "cpu")
    held = init(decoder.specs(MODELS[model]), sharding_rules.load(table), mesh, 0, torch.float64)
    mine = {path: list(to_local(x).shape) for path, x in tree.paths(held)}
    every: list[Any] = [None] * world
    dist.all_gather_object(every, mine)
    return every


class Tally(TorchDispatchMode):
    """Count what reaches the device while a step runs, compiled or not: written apart from the planner's recorder."""

    def __init__(self, axes_of: dict[str, str]) -> None:
        super().__init__()
        self.axes_of = axes_of
        self.times: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.flops = 0

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator):  # a graph's way to call an operation that writes
            with self:
                return auto_functionalized_v2_dense(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.times["matmul"] += 1
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        if packet is torch.ops.mtl_head.head_logits:
            self.times["matmul"] += 1
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        if packet is torch.ops.mtl_head.head_pull_:  # the gradients of the head and of its input
            assert args[1] is not None and args[2] is not None
            self.times["matmul"] += 1
            self.flops += 2 * 2 * args[0].numel() * args[3].shape[-1]
        for op in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single"):
            if packet is getattr(torch.ops._c10d_functional, op):
                key = f"{op} {self.axes_of[args[-1]]}"
                self.times[key] += 1
                self.bytes[key] += max(args[0].nbytes, out.nbytes)
        return out

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def step_counts(table: str, world: int, model: str, remat: str, how: str, micros: int = 1, layers: int = 3) -> dict[str, Any]:
    """Run two whole steps on real ranks and count the second; in compiled modes, what the captured graphs run."""
    job = job_of(table, world, model, remat, how, micros, layers)
    graphs = collections.Counter[str]()

    def keep(graph: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            graphs["runs"] += 1
            return graph.forward(*inputs)

        return make_boxed_func(run)

    options = replace(job.options, backend=aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition))
    par = Parallel(make_mesh(job.mesh, "cpu"), job.rules, job.sizes, job.options.precision.reduce)
    specs = decoder.specs(job.config)
    state = init_state(specs, job.rules, par.mesh, 0, options.precision, job.optimizer)
    step = make_step(decoder, job.config, par, job.optimizer, job.schedule, options)
    data = batch(par, job.config, 0, job.rows(), False)
    state, _ = step(state, data)
    warm = graphs["runs"]
    tally = Tally({name: "+".join(axes) for axes, name in par.mesh.groups.items()})
    with tally:
        step(state, data)
    assert graphs["runs"] == 2 * warm, "the counted step ran the captured graphs"
    assert (warm > 0) == (how != "none")
    return {"times": dict(tally.times), "bytes": dict(tally.bytes), "flops": tally.flops}


def job_of(
    table: str, world: int, model: str, remat: str, how: str, micros: int = 1, layers: int = 3, mesh: MeshShape | None = None
) -> Job:
    """Describe a small step in float64 on the CPU."""
    config, rules, shape = replace(MODELS[model], layers=layers), sharding_rules.load(table), mesh or MESHES[table][world]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    names = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ)
    sizes = {**decoder.sizes(config), **names, "batch": BATCH // micros}
    assert BATCH % (rows * micros) == 0
    options = StepOptions(PRECISIONS["fp64"], remat, how, clip=0.5)
    return Job(config, rules, shape, sizes, options, adamw(decayed(decoder.specs(config))), SCHEDULE, micros, "cpu")


def planned_counts(table: str, world: int, model: str, remat: str, how: str, micros: int = 1, layers: int = 3, device: int = 0) -> Any:
    """Plan the same step without ranks, in the words of `step_counts`."""
    found = record(job_of(table, world, model, remat, how, micros, layers), device).total()

    def spell(values: Any) -> dict[str, int]:
        spelled: collections.Counter[str] = collections.Counter()
        for (name, axes), n in values.items():
            spelled[f"{WORDS.get(name, name)} {'+'.join(axes)}"] += n
        return dict(spelled)

    times = {**spell(found.times), "matmul": found.matmuls}
    return {"times": times, "bytes": spell(found.bytes), "flops": found.matmul_flops}


def engine_transfers(table: str, world: int, model: str, remat: str, precision: str) -> dict[str, Any]:
    """Run a whole step whose weights and gradients move as copy engines move them; list what took slots, beside what is planned."""
    job = job_of(table, world, model, remat, "none")
    policy = PRECISIONS[precision]
    job = replace(job, engine=True, options=replace(job.options, precision=policy))
    par = Parallel(make_mesh(job.mesh, "cpu"), job.rules, job.sizes, policy.reduce, engine=True, fp8=policy.fp8)
    axes_of = {name: "+".join(axes) for axes, name in par.mesh.groups.items()}
    seen: list[tuple[str, str, int]] = []

    class Slots(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.mtl_engine.gather.default:
                shards, scale, dtype, *_, group = args
                itemsize = dtype.itemsize if scale is None else 1
                seen.append(("gather", axes_of[group], sum(x.numel() for x in shards) * itemsize))
            if func is torch.ops.mtl_engine.send.default:
                seen.append(("sum", axes_of[args[2]], args[0].nbytes))
            return func(*args, **(kwargs or {}))

    state = init_state(decoder.specs(job.config), job.rules, par.mesh, 0, job.options.precision, job.optimizer)
    step = make_step(decoder, job.config, par, job.optimizer, job.schedule, job.options)
    with Slots():
        step(state, batch(par, job.config, 0, job.rows(), False, dtype=policy.param))
    records = record(job, dist.get_rank())
    return {
        "ran": sorted(seen), "planned": sorted(slots(records.few, *[records.more] * (records.rounds > 0))),
        "room": room(seen), "part": records.rest.get("transfer slots", 0),
    }  # fmt: skip


def pipeline_of(mesh: dict[str, int], table: str, model: str, schedule: str, micros: int, remat: str, layers: int) -> tuple[Job, Pipeline]:
    """Describe a small step through a pipeline."""
    job = job_of(table, 0, model, remat, "none", micros, layers, MeshShape(**mesh))
    rows = build(schedule, job.mesh.pipe, micros)
    return job, Pipeline(lambda m: rows, split_layers(layers, rows.stages, 1.0, 0.1), rows.place)


def pipeline_counts(**choices: Any) -> list[dict[str, Any]]:
    """Run two steps through a pipeline on real ranks; give of the second what every rank computed, sent and stored."""
    job, pipeline = pipeline_of(**choices)
    par, policy = Parallel(make_mesh(job.mesh, "cpu"), job.rules, job.sizes, job.options.precision.reduce), job.options.precision
    state = init_state(decoder.specs(job.config), job.rules, par.mesh, 0, policy, job.optimizer)
    step: Any = make_pipelined_step(decoder, job.config, par, job.optimizer, job.schedule, job.options, pipeline)
    data, stored, sends, send = batch(par, job.config, 0, job.rows(), False), dict[str, int](), list[int](), dist.isend

    def memory(values: Any) -> set[tuple[int, int]]:
        return {(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tree.leaves(values)}

    class Weighed(Training):
        """Weighs what a stage keeps by the memory of the tensors themselves."""

        def forward(self, stage: int, micro: int, x: Any) -> Any:
            out, saved = super().forward(stage, micro, x)
            kept = memory([list(values.values()) for _, values, _ in saved]) - memory((self.params, self.batch))
            stored[str(stage)] = sum(size for _, size in kept)
            return out, saved

    def count(x: Any, **rest: Any) -> Any:
        sends.append(x.nbytes)
        return send(x, **rest)

    state, _ = step(state, data)
    tally = Tally({name: "+".join(axes) for axes, name in par.mesh.groups.items()})
    dist.isend, pipelined.Training = count, Weighed
    try:
        with tally:
            step(state, data)
    finally:
        dist.isend, pipelined.Training = send, Training
    every: list[Any] = [None] * dist.get_world_size()
    mine = {"times": dict(tally.times), "bytes": dict(tally.bytes), "flops": tally.flops, "sends": [len(sends), sum(sends)]}
    dist.all_gather_object(every, {**mine, "stored": stored})
    return every


def planned_pipeline(**choices: Any) -> list[dict[str, Any]]:
    """Plan the same step without ranks, in the words of `pipeline_counts`: one for each device of the pipeline."""
    job, pipeline = pipeline_of(**choices)
    drawn, found = Drawn(job, pipeline, None), list[dict[str, Any]]()
    for d in range(job.mesh.pipe):
        times, sizes, sends = collections.Counter[str](), collections.Counter[str](), [0, 0]
        for row in drawn.sent(d):
            if row.collective == "message":
                sends = [row.times, row.bytes]
                continue
            key = f"{WORDS.get(row.collective, row.collective)} {'+'.join(row.axes)}"
            times[key], sizes[key] = times[key] + row.times, sizes[key] + row.bytes
        work = drawn.work(d)
        times["matmul"] = work.matmuls
        stored = {str(s): sum(c.kept for c in drawn.stages[s]) + max(c.beside for c in drawn.stages[s]) for s in drawn.table.on(d)}
        found.append({"times": dict(times), "bytes": dict(sizes), "flops": work.matmul_flops, "sends": sends, "stored": stored})
    return found
