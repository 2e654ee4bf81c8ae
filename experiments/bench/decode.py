"""Time decoding beside transformers (static cache, compiled) and the memory's bound: `python experiments/bench/decode.py [--tiny]`."""

import importlib
import time
from typing import Any

import torch

import sharding_rules
from experiments.presets import PRESETS
from mtl.errors import UserError
from mtl.generate.decode import generate
from mtl.generate.memory import cache_bytes
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.params import count, init
from mtl.precision import PRECISIONS
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape, make_mesh

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
"""Bytes a second, from the vendor's data sheets."""


def main() -> None:
    """Print tokens a second at batch 1 and 32 for an 8B shape (a tiny one with --tiny), and the share of the bound."""
    words = process.command_line()
    if words not in ([], ["--tiny"]):
        raise UserError(f"experiments/bench/decode.py got {' '.join(words)!r}: expected nothing, or --tiny.")
    at = process.place()
    config = PRESETS["llama3_8b"].model if not words else Config(512, 2, 64, 8, 2, 128, head_size=8)
    prompt, new = (512, 256) if not words else (8, 8)
    gpu = at.device.type == "cuda"
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if gpu and name in torch.cuda.get_device_name()), None)
    with process.process_group(at):
        for batch in (1, 32):
            ours = time_ours(config, at.device, batch, prompt, new)
            theirs = time_theirs(config, at.device, batch, prompt, new)
            specs = decoder.specs(config)
            kept = cache_bytes(decoder.cache_specs(config, batch, prompt + new), sharding_rules.load("single"), MeshShape(), torch.bfloat16)
            read = 2 * (count(specs) - count(specs["embed"])) + kept
            bound = None if bandwidth is None else batch * bandwidth / read
            share = "" if bound is None else f"  bound {bound:8.1f}  ours {ours / bound:.0%}  transformers {theirs / bound:.0%} of it"
            print(f"batch {batch:3d}  tokens/s: ours {ours:8.1f}  transformers {theirs:8.1f}{share}", flush=True)


def time_ours(config: Config, device: torch.device, batch: int, prompt: int, new: int) -> float:
    """Give tokens a second after the first two steps, which compile."""
    mesh, rules = make_mesh(MeshShape(), device.type), sharding_rules.load("single")
    params = init(decoder.specs(config), rules, mesh, 0, torch.bfloat16)
    backend = "inductor" if device.type == "cuda" else None
    prompts = [[(7 * i + j) % config.vocab for j in range(prompt)] for i in range(batch)]
    begin = 0.0
    for i, _ in enumerate(generate(decoder, config, mesh, rules, PRECISIONS["bf16"], params, prompts, new, backend=backend)):
        begin = time.perf_counter() if i == 2 else begin
    return batch * (new - 3) / (time.perf_counter() - begin)


def time_theirs(config: Config, device: torch.device, batch: int, prompt: int, new: int) -> float:
    """Give transformers' tokens a second, as the difference of a long and a short generation, both compiled before."""
    transformers: Any = importlib.import_module("transformers")
    like: Any = transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=config.embed, intermediate_size=config.mlp, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_size, rope_theta=config.rope_theta,
        max_position_embeddings=8192,
    )  # fmt: skip
    with device:
        model: Any = transformers.LlamaForCausalLM._from_config(like, dtype=torch.bfloat16).train(False)
    ids = torch.arange(batch * prompt, device=device).reshape(batch, prompt) % config.vocab
    how: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if device.type == "cuda":
        how["cache_implementation"] = "static"

    def took(count: int) -> float:
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **how)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    short = max(new // 8, 2)
    for n in (short, new, short, new):
        took(n)  # compiles, for both lengths of the static cache
    return batch * (new - short) / max(took(new) - took(short), 1e-9)


if __name__ == "__main__":
    process.guarded(main)
