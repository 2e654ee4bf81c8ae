"""The same documents packed into rows or each in a row of its own: the loss and every gradient, on whatever mesh."""

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
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.optim.optimizers import adamw
from mtl.optim.schedules import schedule
from mtl.params import decayed
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import Rules
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.train import parallel
from tests.small import BATCH, LLAMA, MESHES, MODELS, SEQ


def documents(vocab: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Draw (text, weights) of documents that fill rows exactly; a text is one longer than its weights. Some have a single token."""
    rng = np.random.default_rng(11)
    rows = []
    for row in range(BATCH):
        ends = np.sort(rng.choice(np.arange(1, SEQ), rng.integers(0, 7), replace=False)) if row else np.arange(1, SEQ)
        lengths = np.diff([0, *ends, SEQ])
        rows.append([(rng.integers(0, vocab, n + 1), (rng.random(n) < 0.7).astype(np.float64)) for n in lengths])
    return rows


def gradients(config: Config, rules: Rules, shape: MeshShape, micro: int, remat: str, how: str, arrays: dict[str, np.ndarray]) -> Any:
    """Give the loss and all gradients of one step: Adam's mean after it is a tenth of each."""
    precision = PRECISIONS["fp64"]
    par = parallel(config, rules, shape, micro, precision)
    optimizer = adamw(decayed(decoder.specs(config)))
    state = init_state(decoder.specs(config), rules, par.mesh, 7, precision, optimizer)
    step = make_step(
        decoder, config, par, optimizer, schedule("constant", 1e-3, 1, 0), StepOptions(precision, remat, how, "aot_eager", 0.0)
    )
    count, index = par.mesh.size(par.axes("B")), par.mesh.index(par.axes("B"))
    rows = np.arange(len(arrays["tokens"]) // count).reshape(-1, micro)
    rows = (rows // micro * count + index) * micro + rows % micro
    extra = {name: a[rows] for name, a in arrays.items() if name not in ("tokens", "targets")}
    batch = to_device(par, arrays["tokens"][rows], arrays["targets"][rows], rows, torch.float64, extra)
    state, metrics = step(state, batch)
    found = {f"grad.{path}": g.full_tensor().clone() for path, g in tree.paths(state.opt_state["optimizer"][0]["mean"])}
    return found | {"loss": metrics["loss"].clone(), "tokens": metrics["tokens"].clone()}


def model(name: str) -> Config:
    """Give a small model without what depends on the whole row: dropout's masks, and positions stretched by the longest of a row."""
    return replace(MODELS[name], rope_scaling=LLAMA.rope_scaling, dropout_embed=0.0, dropout_attention=0.0, dropout_mlp=0.0)


def alone(name: str, path: str) -> None:
    """Write what one device gets from every document in a row of its own, padded, and told of no documents."""
    config = model(name)
    each = [d for row in documents(config.vocab) for d in row]
    arrays = {"tokens": np.zeros((len(each), SEQ), np.int64), "targets": np.zeros((len(each), SEQ), np.int64)}
    arrays["weights"] = np.zeros((len(each), SEQ))
    for i, (text, weights) in enumerate(each):
        for key, part in {"tokens": text[:-1], "targets": text[1:], "weights": weights}.items():
            arrays[key][i, : len(part)] = part
    found: dict[str, Tensor] = gradients(config, sharding_rules.load("single"), MeshShape(), len(each), "none", "none", arrays)
    save_file({k: v.contiguous() for k, v in found.items()}, path)


def packed(name: str, table: str, world: int, remat: str, how: str, path: str, apart: bool = True) -> dict[str, Any]:
    """Give the largest relative error of packed rows on a mesh against documents alone on one device."""
    config, rules, shape = model(name), sharding_rules.load(table), MESHES[table][world]
    rows = documents(config.vocab)
    arrays = {
        "tokens": np.stack([np.concatenate([text[:-1] for text, _ in row]) for row in rows]),
        "targets": np.stack([np.concatenate([text[1:] for text, _ in row]) for row in rows]),
        "weights": np.stack([np.concatenate([w for _, w in row]) for row in rows]),
        "positions": np.stack([np.concatenate([np.arange(len(w)) for _, w in row]) for row in rows]),
        "segments": np.stack([np.repeat(np.arange(len(row)), [len(w) for _, w in row]) for row in rows]),
    }
    if not apart:
        del arrays["segments"]
    micro = BATCH // math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    got, want = gradients(config, rules, shape, micro, remat, how, arrays), load_file(Path(path))
    idle = {k for k in want if config.positions == "learned" and k.endswith("key.bias")}  # softmax does not see it: rounding alone
    errors = {k: ((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)).item() for k in want.keys() - idle}
    worst = max(errors, key=lambda k: errors[k] if errors[k] == errors[k] else float("inf"))
    return {"error": errors[worst], "where": worst, "loss": got["loss"].item(), "tokens": got["tokens"].item()}


def weighed(name: str, factor: float) -> dict[str, float]:
    """Compare a step on weights times a factor with the step on the weights: a mean does not see the factor."""
    config, rng = model(name), np.random.default_rng(3)
    arrays = {key: rng.integers(0, config.vocab, (BATCH, SEQ)) for key in ("tokens", "targets")}
    weights = (rng.random((BATCH, SEQ)) < 0.1).astype(np.float64)

    def step(weights: np.ndarray) -> Any:
        return gradients(config, sharding_rules.load("single"), MeshShape(), 1, "none", "none", arrays | {"weights": weights})

    want, got, nothing = step(weights), step(weights * factor), step(weights * 0)
    errors = [((got[k] - want[k]).abs().max() / want[k].abs().max()).item() for k in want if k != "tokens"]
    return {"error": max(errors), "tokens": got["tokens"].item(), "sum": weights.sum() * factor, "loss of nothing": nothing["loss"].item()}
