"""Plans of runs: what a run's settings come to, and what can be planned."""

import dataclasses
import math
from collections.abc import Mapping

from experiments import pipelining, plan_pipeline
from experiments.recording import Job, record
from experiments.settings import Experiment
from mtl import params
from mtl.data.batches import BatchShape
from mtl.errors import UserError
from mtl.inspect import hardware
from mtl.inspect.plan import Plan, make_plan
from mtl.models import decoder
from mtl.optim.optimizers import adamw, sgd
from mtl.optim.schedules import schedule
from mtl.params import layouts
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules
from mtl.train.speed import flops_per_token
from mtl.train.step import StepOptions

PACKED = "where documents end is known in the run alone: attention is planned as if each row were one document, the most it can take"


def job_for(
    setup: Experiment, rules: Rules, shape: MeshShape, sizes: Mapping[str, int], options: StepOptions, kind: str,
    documents: bool = False, engine: bool = False,
) -> Job:  # fmt: skip
    """Describe a run's step."""
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    micro_batches = setup.train.global_batch_size // (rows * (setup.train.micro_batch_size or 1))
    mask = params.decayed(decoder.specs(setup.model))
    optimizer = adamw(mask, impl="plain") if setup.optim.name == "adamw" else sgd(mask, setup.optim.beta1)
    rate = schedule("constant", 1.0, 1)  # no plan depends on it
    return Job(setup.model, rules, shape, sizes, options, optimizer, rate, max(1, micro_batches), kind, documents, engine)


def plan(setup: Experiment, job: Job, device: hardware.Device | None) -> Plan:
    """Plan a run's step."""
    tokens = setup.train.global_batch_size * setup.train.seq_len
    flops = flops_per_token(decoder.specs(setup.model), setup.model, setup.train.seq_len)
    pipeline = pipelining.plan(setup, job.mesh)
    found = make_plan(record(job), device, tokens, flops) if pipeline is None else plan_pipeline.plan(job, pipeline, device, tokens, flops)
    return dataclasses.replace(found, notes=(*found.notes, PACKED)) if job.documents else found


def by_engine(setup: Experiment, shape: MeshShape, device: hardware.Device) -> bool:
    """Tell whether a run on such devices would move weights and gradients by their copy engines (what --transport says of auto)."""
    return takes_engines(setup, shape, device.reaches_peers and 1 < shape.devices() <= device.node_size)


def takes_engines(setup: Experiment, shape: MeshShape, able: bool) -> bool:
    """Tell whether a run takes copy engines where its devices are able to."""
    usual = setup.compile in ("auto", "step") and shape.pipe in (1, shape.devices())
    return setup.transport == "engine" or (setup.transport == "auto" and able and usual)


def refuses(setup: Experiment) -> str:
    """Say why there is no plan for a run; nothing where there is one."""
    return "plans do not cover adapters, lora.rank" if setup.lora.rank else ""


def check_sizes(setup: Experiment, rules: Rules, shape: MeshShape, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh that does not divide the model, the batch or the sequence."""
    train = setup.train
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    BatchShape(train.global_batch_size, 1 if train.micro_batch_size is None else train.micro_batch_size, train.seq_len).check(rows)
    if setup.model.positions == "learned" and train.seq_len > setup.model.max_positions:
        raise UserError(f"--train.seq-len {train.seq_len} is longer than the model's {setup.model.max_positions} learned positions.")
    for table in ("store", "compute"):
        layouts(decoder.specs(setup.model), rules, shape, table)
    split = math.prod(getattr(shape, axis) for axis in rules.act["seq"]) * (2 if rules.order == "zigzag" else 1)
    if math.prod(getattr(shape, axis) for axis in rules.act["seq"]) > 1 and train.seq_len % split:
        raise UserError(f"--train.seq-len {train.seq_len} does not divide by {split}, the pieces that rules {rules.name!r} cut it into.")
    for name in ("seq", "residual_seq", "query_seq", "key_seq", "heads", "core_heads", "kv_heads", "core_kv_heads", "mlp", "vocab"):
        what = "--train.seq-len, activation" if "seq" in name else f"--model.{name.removeprefix('core_').replace('_', '-')}, activation"
        rules.layout("act", (name,), (sizes[name],), shape, what)
