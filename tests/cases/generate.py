"""Continue prompts on whatever mesh: logits at every position, greedy and sampled tokens, against one device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sharding_rules
from mtl import random, tree
from mtl.generate.decode import generate, make_prefill, make_step, prompt_batch, start
from mtl.generate.memory import cache_bytes, parallels, room
from mtl.generate.sampling import Sampling
from mtl.generate.weights import lay_side_by_side, ready
from mtl.kernels import few_rows
from mtl.models import decoder, token
from mtl.models.decoder import Config
from mtl.params import count, init
from mtl.precision import PRECISIONS
from mtl.sharding.mesh import Mesh, MeshShape, make_mesh
from mtl.sharding.parallel import Parallel
from mtl.sharding.rules import Rules
from mtl.train.evaluate import make_logits
from tests.small import MESHES
from tests.small import MODELS as ALL_MODELS

LENGTHS, NEW = (3, 9, 1), 11  # 20 places at most: past mistral's window of 7
FP64 = PRECISIONS["fp64"]
MODELS = {
    # dynamic scaling turns keys by the length at the time they are made: a later full forward turns them differently
    name: replace(c, rope_scaling=replace(c.rope_scaling, kind="llama3")) if c.rope_scaling.kind == "dynamic" else c
    for name, c in ALL_MODELS.items()
}
MODELS["qwen"] = replace(MODELS["llama"], qkv_bias=True, qk_norm=True, window=7)


def text(config: Config) -> list[list[int]]:
    """Make texts that are prompts and what is forced to follow them."""
    return [random.bits(random.key("text", i), torch.arange(n + NEW)).remainder(config.vocab).tolist() for i, n in enumerate(LENGTHS)]


def lively(config: Config, rules: Rules, mesh: Mesh) -> Any:
    """Make weights large enough that every token counts, and biases that are there."""
    specs = decoder.specs(config)
    params = init(specs, rules, mesh, 5, torch.float64)
    return tree.map(lambda s, p: p + 0.1 if s.std == s.fill == 0 else p * 8 if p.dim() > 2 else p, specs, params)


def reference(model: str, path: str) -> None:
    """Write the logits of full forwards over each text alone on one device."""
    config, rules, mesh = MODELS[model], sharding_rules.load("single"), make_mesh(MeshShape(), "cpu")
    params, found = lively(config, rules, mesh), {}
    for i, words in enumerate(text(config)):
        par = Parallel(mesh, rules, decoder.sizes(config), torch.float64)
        tokens = torch.tensor([words])
        batch = {"tokens": tokens, "positions": torch.arange(len(words)).unsqueeze(0)}
        found[str(i)] = make_logits(decoder, config, par, FP64)(params, batch)[0]
    save_file(found, path)


def cached(table: str, world: int, model: str, path: str, compiled: bool = False, beside: bool = True) -> dict[str, Any]:
    """Force the texts through the cache: the largest error of any logit against the full forward, and what the cache takes."""
    config, rules, shape = decoder.for_evaluation(MODELS[model]), sharding_rules.load(table), MESHES[table][world]
    mesh, words = make_mesh(shape, "cpu"), text(config)
    prompts = [w[:n] for w, n in zip(words, LENGTHS, strict=True)]
    space = room(rules, shape, len(prompts), max(LENGTHS), NEW)
    wide, narrow = parallels(decoder, config, mesh, rules, space, FP64)
    forced = torch.tensor([[*w[n:], 0] for w, n in zip(words, LENGTHS, strict=True)])
    seen: list[Tensor] = []

    def pick(logits: Tensor, state: dict[str, Any]) -> Tensor:
        state["logits"].copy_(logits)
        return state["forced"].index_select(1, state["count"].unsqueeze(0))[:, 0]

    with torch.no_grad():
        params = lively(config, rules, mesh)
        if beside:
            lay_side_by_side(decoder, config, mesh, rules, params)
        params = ready(decoder, config, wide, FP64, params)
        state = start(decoder, config, wide, narrow, FP64, prompts, space)
        mine = state["rows"].remainder(len(prompts)) * (state["rows"] < len(prompts))
        state["logits"] = torch.zeros(len(mine), config.vocab, dtype=torch.float64)
        state["forced"] = forced[mine]
        make_prefill(decoder, config, wide, narrow, FP64, pick)(params, state, prompt_batch(wide, prompts, space))
        seen.append(state["logits"].clone())
        step = make_step(decoder, config, narrow, FP64, pick, space, "aot_eager" if compiled else None)
        for _ in range(NEW):
            step(params, state)
            seen.append(state["logits"].clone())
    want = load_file(Path(path))
    pairs = [
        (torch.stack([s[i] for s in seen]), want[str(int(row))][LENGTHS[row] - 1 :]) for i, row in enumerate(mine)
    ]  # fmt: skip
    error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    held = sum(x.numel() * x.itemsize for x in tree.leaves(state["layers"]))
    specs = decoder.cache_specs(config, space.rows, space.slots)
    said, whole = cache_bytes(specs, rules, shape, torch.float64), count(specs) * 8
    together = sorted(name for name in params["layers"] if "+" in name)
    return {"error": error, "held": held, "said": said, "whole": whole, "together": together}


def in_few_kernels(table: str, world: int, model: str, path: str, compiled: bool = False) -> dict[str, Any]:
    """Do the same through the operation for few rows, as on a GPU, and count how often it is used a step."""
    calls: list[bool] = []
    refuses, multiply = few_rows.refuses, token.multiply
    few_rows.refuses = lambda x, w: None
    token.multiply = lambda *args, **more: (calls.append("more" in more), multiply(*args, **more))[1]
    try:
        found = cached(table, world, model, path, compiled)
    finally:
        few_rows.refuses, token.multiply = refuses, multiply
    return found | {"products": len(calls), "sums": sum(calls)}


def continued(table: str, world: int, model: str, backend: str | None = None) -> dict[str, Any]:
    """Give greedy, sampled and filtered tokens."""
    config, rules, mesh = MODELS[model], sharding_rules.load(table), make_mesh(MESHES[table][world], "cpu")
    prompts = [w[:n] for w, n in zip(text(config), LENGTHS, strict=True)]
    params = lively(config, rules, mesh)
    ways = {"greedy": Sampling(), "sampled": Sampling(1.5, seed=1), "filtered": Sampling(1.5, 40, 0.9, 2)}
    return {k: list(generate(decoder, config, mesh, rules, FP64, params, prompts, NEW, how, backend=backend)) for k, how in ways.items()}


def on_gpu(backend: str | None = None) -> dict[str, Any]:
    """Give greedy and sampled tokens of a float32 model on a GPU."""
    config, rules, mesh = MODELS["llama"], sharding_rules.load("single"), make_mesh(MeshShape(), "cuda")
    prompts = [w[:n] for w, n in zip(text(config), LENGTHS, strict=True)]
    params = tree.map(lambda p: p * 8 if p.dim() > 2 else p, init(decoder.specs(config), rules, mesh, 5, torch.float32))
    ways = {"greedy": Sampling(), "sampled": Sampling(1.5, 40, 0.9, 2)}
    fp32 = PRECISIONS["fp32"]
    return {k: list(generate(decoder, config, mesh, rules, fp32, params, prompts, 40, how, backend=backend)) for k, how in ways.items()}
