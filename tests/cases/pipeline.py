"""Train a small model through a pipeline on whatever mesh, and compare with one device."""

import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sharding_rules
from mtl import tree
from mtl.generate.decode import generate
from mtl.lora import adapters
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import decayed, init
from mtl.pipeline import links
from mtl.pipeline.schedules import build
from mtl.pipeline.simulate import simulate
from mtl.pipeline.split import split_layers
from mtl.pipeline.stage import Training
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from mtl.train import pipelined
from mtl.train.evaluate import make_evaluate
from mtl.train.frozen import beside, hold
from mtl.train.pipelined import Pipeline, make_pipelined_evaluate, make_pipelined_step
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.lora import ADAPTERS, started
from tests.cases.train import SCHEDULE, batch, parallel
from tests.compare import same
from tests.small import MODELS

ROWS = 24
Found = dict[str, Tensor]


def train(
    model: str, layers: int, mesh: dict[str, int], micros: int, schedule: str | None = None, virtual: int | None = None,
    split: list[int] | None = None, rules: str | None = None, remat: str = "none", how: str = "none",
    fused: bool = False, lora: float | None = None,
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """Take steps and evaluate; give losses, norms, gradients of the first step and parameters as whole arrays, and what was counted.

    With ``fused`` the head keeps no logits, as on GPUs. With ``lora`` adapters alone are trained, which drop so much of their inputs.
    """
    config = replace(MODELS[model], layers=layers, loss_impl="fused" if fused else MODELS[model].loss_impl, dropout_lora=lora or 0.0)
    shape, policy = MeshShape(**mesh), PRECISIONS["fp64"]
    table_name = rules or sharding_rules.choose(shape)
    rows = math.prod(getattr(shape, axis) for axis in sharding_rules.load(table_name).act["batch"])
    micro = ROWS // (rows * micros)
    par = parallel(config, sharding_rules.load(table_name), shape, micro, policy)
    options = StepOptions(policy, remat=remat, compile=how, backend="aot_eager", clip=0.5, seed=3)
    fns, whole = (decoder, decoder) if lora is None else (adapters.trained(decoder, ADAPTERS), adapters.whole(decoder, ADAPTERS))
    specs = fns.specs(config) if lora is None else started(fns.specs(config))
    optimizer = adamw(decayed(specs))
    state = init_state(specs, par.rules, par.mesh, 7, policy, optimizer)
    counted: dict[str, Any] = {}
    if schedule is None:
        step = make_step(fns, config, par, optimizer, SCHEDULE, options)
        evaluate = make_evaluate(whole, config, par, policy)
    else:
        table = build(schedule, shape.pipe, micros, virtual)
        pipeline = Pipeline(
            lambda m: build(schedule, shape.pipe, m, virtual), split_layers(layers, table.stages, 1.0, 0.1, split), table.place
        )
        step = make_pipelined_step(fns, config, par, optimizer, SCHEDULE, options, pipeline, whole)
        evaluate = make_pipelined_evaluate(whole, config, par, policy, pipeline)
        counted["simulated"] = simulate(table).stored[par.mesh.coordinates["pipe"]]
    still, base, run = adapters.frozen(decoder, ADAPTERS), None, step
    if lora is not None:
        base = init(still.specs(config), par.rules, par.mesh, 9, policy.param)
        run = beside(step, hold(still, config, par, policy, base))
        kept = tree.map(lambda x: x.to_local().clone(), base)
    segments = model in ("mistral", "llama_tied")
    found: Found = {}
    for i in range(3):
        state, metrics = run(state, batch(par, config, i, micro, segments, ROWS, policy.param))
        found |= {f"loss.{i}": metrics["loss"], f"norm.{i}": metrics["grad_norm"], f"entropy.{i}": metrics["entropy"]}
        found |= {f"losses.{i}": metrics["losses"]}
        if i == 0:  # Adam's mean is now a tenth of the clipped gradient
            found |= {f"grad.{path}": g.full_tensor().clone() for path, g in tree.paths(state.opt_state["optimizer"][0]["mean"])}
    data = batch(par, config, 99, micro, segments, ROWS, policy.param)
    everything = tree.join(base, state.params)
    found["eval"] = torch.tensor(evaluate(everything, [data]), dtype=torch.float64)
    prompts = [[1, 2, 3], [4]]
    text = list(generate(whole, config, par.mesh, par.rules, policy, everything, prompts, 5))
    found["text"] = torch.tensor(text, dtype=torch.float64)
    counted["stored"] = getattr(step, "stored", None)
    assert lora is None or same(tree.map(lambda x: x.to_local(), base), kept), "a frozen parameter changed"
    return found | {f"param.{path}": p.full_tensor() for path, p in tree.paths(state.params)}, counted


def reference(path: str, **choices: Any) -> None:
    """Write what one device gets."""
    save_file({k: v.clone().contiguous() for k, v in train(mesh={}, **choices)[0].items()}, path)


def parity(path: str, groups: bool = False, **choices: Any) -> dict[str, Any]:
    """Give the largest relative error against one device, and where it is; and what was stored, on all devices.

    With ``groups`` every channel is a group of its own, without tags, as on GPUs.
    """
    want, tagged = load_file(Path(path)), links.TAGGED
    links.TAGGED = () if groups else tagged
    try:
        got, counted = train(**choices)
    finally:
        links.TAGGED = tagged
    # without rotary positions softmax does not see the key bias: its exact gradient is 0, and what is there is rounding
    idle = {k for k in want if choices["model"] == "gpt" and k.endswith("key.bias")}
    assert got.keys() == want.keys()
    assert all(t[k].abs().max() < 1e-9 for k in idle for t in (got, want))
    errors = {k: ((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)).item() for k in want.keys() - idle}
    worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    sizes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(sizes, [counted["stored"], counted["simulated"]])
    return {
        "error": errors[worst],
        "where": worst,
        "moved": max((want[f"loss.{i}"] - want["loss.0"]).abs().item() for i in (1, 2)),
        "stored": sizes,
    }


def stored(schedule: str, devices: int, micros: int, remat: str) -> dict[str, Any]:
    """Count, by looking at the tensors themselves, of how many (stage, micro-batch) pairs a device holds what forward saved."""
    config, policy = replace(MODELS["llama"], layers=4), PRECISIONS["fp64"]
    par = parallel(config, sharding_rules.load("single"), MeshShape(pipe=devices), 2, policy)
    optimizer = adamw(decayed(decoder.specs(config)))
    state = init_state(decoder.specs(config), par.rules, par.mesh, 7, policy, optimizer)
    table = build(schedule, devices, micros)
    pipeline = Pipeline(lambda m: table, split_layers(4, table.stages, 0.0, 0.0), table.place)
    step: Any = make_pipelined_step(decoder, config, par, optimizer, SCHEDULE, StepOptions(policy, remat), pipeline)
    alive: dict[tuple[int, int], list[Any]] = {}
    most = 0

    class Counted(Training):
        def forward(self, stage: int, micro: int, x: Tensor | None) -> Any:
            nonlocal most
            out, saved = super().forward(stage, micro, x)
            constant = {id(t) for t in tree.leaves((self.params, self.batch)) if isinstance(t, Tensor)}
            held = [t for _, kept, _ in saved for t in kept.values() if t.is_floating_point() and id(t) not in constant and t._base is None]
            alive[stage, micro] = [weakref.ref(t) for t in held if t is not x]
            most = max(most, sum(any(r() is not None for r in refs) for refs in alive.values()))
            return out, saved

    pipelined.Training = Counted
    try:
        step(state, batch(par, config, 0, 2, False, 2 * micros))
    finally:
        pipelined.Training = Training
    left = sum(r() is not None for refs in alive.values() for r in refs)
    return {"most": most, "counted": step.stored, "simulated": simulate(table).stored[par.mesh.coordinates["pipe"]], "left": left}


def all_stored(**choices: Any) -> list[dict[str, Any]]:
    """Give every rank's counts."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, stored(**choices))
    return found
