"""Time decoding beside transformers (static cache, compiled) and the memory's bound: `python experiments/bench/decode.py [--tiny]`.

`--side ours` or `--side transformers` times one of them. It needs torch alone (transformers for its side).
"""

import importlib
import time
from collections.abc import Iterator
from typing import Any

import torch

import sharding_rules
from mtl.errors import UserError
from mtl.generate.decode import Tokens, generate
from mtl.generate.memory import cache_bytes
from mtl.generate.weights import lay_side_by_side
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.params import count, init
from mtl.precision import PRECISIONS
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape, make_mesh

BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
"""Bytes a second, from the vendor's data sheets."""
LLAMA3_8B = Config(128256, 32, 4096, 32, 8, 14336, head_size=128, rope_theta=500000.0)
SIDES = ("ours", "transformers")
WARM = 8
"""Tokens before the clock starts: both sides compile and record within them."""


def main() -> None:
    """Print tokens a second for every batch, and their share of the bound: weights and the filled cache read once a token."""
    words = process.command_line()
    tiny, sides = "--tiny" in words, [word for word in words if word != "--tiny"]
    if sides and (len(sides) != 2 or sides[0] != "--side" or sides[1] not in SIDES):
        raise UserError(
            f"experiments/bench/decode.py got {' '.join(words)!r}: expected --tiny, --side {' or --side '.join(SIDES)}, or nothing."
        )
    at = process.place()
    config = Config(512, 2, 64, 8, 2, 128, head_size=8) if tiny else LLAMA3_8B
    prompt, new = (8, 24) if tiny else (512, 128)
    gpu = at.device.type == "cuda"
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if gpu and name in torch.cuda.get_device_name()), None)
    specs = decoder.specs(config)
    with process.process_group(at):
        for batch in (1, 32):
            held = decoder.cache_specs(config, batch, prompt + new // 2)
            kept = cache_bytes(held, sharding_rules.load("single"), MeshShape(), torch.bfloat16)
            read = 2 * (count(specs) - count(specs["embed"])) + kept
            for side, run in (("ours", time_ours), ("transformers", time_theirs)):
                if side in (sides[1:] or SIDES):
                    begun = time.perf_counter()
                    rate = run(config, at.device, batch, prompt, new)
                    share = (
                        "" if bandwidth is None else f", {rate * read / batch / bandwidth:.1%} of the bound {batch * bandwidth / read:.1f}"
                    )
                    whole = time.perf_counter() - begun
                    print(
                        f"batch {batch:3d}  {side:12s} {rate:8.1f} tokens/s{share}  ({whole:.0f} s with all that comes before)", flush=True
                    )
                    if gpu:
                        torch.cuda.empty_cache()


def time_ours(config: Config, device: torch.device, batch: int, prompt: int, new: int) -> float:
    """Give tokens a second."""
    count, begin, end = 0, 0.0, 0.0
    for count, _ in enumerate(ours(config, device, batch, prompt, new)):
        end = time.perf_counter()
        begin = end if count == WARM else begin
    return batch * (count - WARM) / (end - begin)


def ours(config: Config, device: torch.device, batch: int, prompt: int, new: int) -> Iterator[Tokens]:
    """Decode with random weights."""
    mesh, rules = make_mesh(MeshShape(), device.type), sharding_rules.load("single")
    params = init(decoder.specs(config), rules, mesh, 0, torch.bfloat16)
    lay_side_by_side(decoder, config, mesh, rules, params)
    prompts = [[(7 * i + j) % config.vocab for j in range(prompt)] for i in range(batch)]
    return generate(decoder, config, mesh, rules, PRECISIONS["bf16"], params, prompts, new, backend="inductor")


def time_theirs(config: Config, device: torch.device, batch: int, prompt: int, new: int) -> float:
    """Give transformers' tokens a second: it waits for every token on the host, where a stopping criterion looks at the clock."""
    transformers: Any = importlib.import_module("transformers")
    like: Any = transformers.LlamaConfig(
        vocab_size=config.vocab, hidden_size=config.embed, intermediate_size=config.mlp, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_size, rope_theta=config.rope_theta,
        max_position_embeddings=8192,
    )  # fmt: skip
    with device:
        model: Any = transformers.LlamaForCausalLM._from_config(like, dtype=torch.bfloat16).train(False)
    ids = torch.arange(batch * prompt, device=device).reshape(batch, prompt) % config.vocab
    times: list[float] = []

    def look(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens[:, -1].tolist()
        times.append(time.perf_counter())
        return torch.zeros(batch, dtype=torch.bool, device=device)

    how: dict[str, Any] = {"cache_implementation": "static"} if device.type == "cuda" else {}
    known: Any = torch._dynamo  # pyright: ignore[reportPrivateUsage]
    known.reset()  # otherwise the second batch size would compile with sizes left open
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
        pad_token_id=0, stopping_criteria=transformers.StoppingCriteriaList([look]), **how,
    )  # fmt: skip
    return batch * (len(times) - 1 - WARM) / (times[-1] - times[WARM])


if __name__ == "__main__":
    process.guarded(main)
