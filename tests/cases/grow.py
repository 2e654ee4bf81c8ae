"""Grow the vocabulary of a model on whatever mesh, and train on."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sharding_rules
from mtl import tree
from mtl.data.batches import to_device
from mtl.errors import UserError
from mtl.models import decoder
from mtl.models.grow import grow
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed, init
from mtl.precision import PRECISIONS
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import parallel
from tests.small import BATCH, MESHES, MODELS, SEQ

OLD, NEW = 250, 263


def grown(table: str, world: int, model: str) -> dict[str, Tensor]:
    """Give the old parameters, the grown ones, and these after a step on tokens of the new vocabulary."""
    config = replace(MODELS[model], vocab=NEW, dropout_embed=0.0, dropout_attention=0.0, dropout_mlp=0.0)
    rules, shape, precision = sharding_rules.load(table), MESHES[table][world], PRECISIONS["fp64"]
    micro = BATCH // math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    par = parallel(config, rules, shape, micro, precision)
    old = init(decoder.specs(replace(config, vocab=OLD)), rules, par.mesh, 7, precision.param)
    found = {f"old.{path}": p.full_tensor().clone() for path, p in tree.paths(old)}
    specs = decoder.specs(config)
    params = grow(old, specs, rules, par.mesh)
    found |= {f"new.{path}": p.full_tensor().clone() for path, p in tree.paths(params)}
    try:
        grow(params, decoder.specs(replace(config, vocab=OLD)), rules, par.mesh)
    except UserError as error:
        assert "a vocabulary can grow, nothing else can differ" in str(error)
    else:
        raise AssertionError("a vocabulary shrank")
    optimizer = adamw(decayed(specs))
    state = init_state(specs, rules, par.mesh, 7, precision, optimizer)._replace(params=params)
    step = make_step(decoder, config, par, optimizer, schedule("constant", 1e-2, 1, 0), StepOptions(precision, clip=0.0))
    text = np.random.default_rng(0).integers(0, NEW, (BATCH, SEQ + 1))
    text[0, : NEW - OLD] = np.arange(OLD, NEW)
    count, index = par.mesh.size(par.axes("B")), par.mesh.index(par.axes("B"))
    rows = np.arange(BATCH // count).reshape(-1, micro) + index * micro
    state, metrics = step(state, to_device(par, text[:, :-1][rows], text[:, 1:][rows], rows, torch.float64))
    return found | {f"after.{path}": p.full_tensor().clone() for path, p in tree.paths(state.params)} | {"loss": metrics["loss"].clone()}


def reference(model: str, path: str) -> None:
    """Write what one device gets."""
    save_file({k: v.contiguous() for k, v in grown("single", 1, model).items()}, path)


def equal(table: str, world: int, model: str, path: str) -> dict[str, Any]:
    """Say whether the grown parameters have one device's bits, and how far those after a step are off."""
    got, want = grown(table, world, model), load_file(Path(path))
    idle = {k for k in want if k.startswith("after.") and model == "gpt" and k.endswith("key.bias")}
    after = {k for k in want if k.startswith("after.") or k == "loss"} - idle
    return {
        "same": all(torch.equal(got[k], want[k]) for k in want if k.startswith(("old.", "new."))),
        "error": max(((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)).item() for k in after),
    }
