"""Rope scalings and ALiBi against transformers' own functions, bit by bit, and what differs from layer to layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from mtl.errors import UserError
from mtl.models import decoder
from mtl.ops.alibi import attended_size, extend, slopes
from mtl.ops.attention import attention
from mtl.ops.rotary import RopeScaling, frequencies
from mtl.sharding.parallel import Parallel
from tests.small import LLAMA

CPU = torch.device("cpu")
SCALINGS: dict[str, tuple[RopeScaling, dict[str, Any]]] = {
    "linear": (RopeScaling("linear", 2.5), {"factor": 2.5}),
    "dynamic": (RopeScaling("dynamic", 3.0, 64), {"factor": 3.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, 64, beta_fast=20.0, beta_slow=2.0, truncate=False, attention_factor=1.2),
        {
            "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False,
            "attention_factor": 1.2,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [6, 8, 64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers(kind: str, size: int) -> None:
    ours, theirs = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 5e5, **theirs},
    )  # fmt: skip
    for length in (10, 64, 65, 1000):
        want, factor = ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=torch.tensor(length))
        got = frequencies(size, 5e5, ours, CPU, torch.tensor([[length]]))
        assert torch.equal(got.reshape(-1), want)
        assert factor == ours.attention_factor
    plain = frequencies(size, 5e5, RopeScaling(), CPU)
    assert not torch.equal(got.reshape(-1), plain)


def test_alibi_is_falcons() -> None:
    for heads in range(1, 130):
        want = build_alibi_tensor(torch.ones(1, 600, dtype=torch.long), heads, torch.float64).view(heads, 600)
        got = torch.tensor(slopes(heads)).bfloat16().unsqueeze(1) * torch.arange(600)
        assert torch.equal(got.double(), want), heads


def test_alibi_channels_add_the_bias_to_the_scores(one: Callable[..., Parallel]) -> None:
    par = one(heads=6, kv_heads=2, core_heads=6, core_kv_heads=2, seq=9, query_seq=9, key_seq=9, batch=2)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, n, 5, generator=rng, dtype=torch.float64) for n in (6, 2, 2))
    positions = torch.arange(9).expand(2, 9) + 300
    longer = extend(par, q, k, v, positions)
    assert {x.shape[-1] for x in longer} == {attended_size(5, 6, 2)} == {8}
    got = attention(par, *longer, scale=0.3)[..., :5]
    bias = (torch.tensor(slopes(6)).bfloat16().unsqueeze(1) * positions[0]).double()
    scores = torch.einsum("bqhk,bthk->bhqt", q, k.repeat_interleave(3, 2)) + bias.unsqueeze(1)
    scores = (scores * 0.3).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), float("-inf"))
    want = torch.einsum("bhqt,bthk->bqhk", scores.softmax(-1), v.repeat_interleave(3, 2))
    assert (got - want).abs().max() < 1e-12


def test_layers_may_differ() -> None:
    config = replace(LLAMA, window=7, full_layers=(1,), scale_by_layer=True)
    assert [decoder.at_layer(config, i).window for i in range(2)] == [7, None]
    assert [decoder.at_layer(config, i).attention_scale for i in range(2)] == [0.5, 0.25]
    assert len({decoder.at_layer(LLAMA, i) for i in range(2)}) == 1, "equal layers share one block"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(LLAMA, full_layers=(0,)), "a model that has a window"),
        (lambda: replace(LLAMA, full_layers=(2,), window=3), "--model.full-layers"),
        (lambda: RopeScaling("linear", 0.5), "at least 1"),
        (lambda: RopeScaling("yarn", 2.0), "original"),
        (lambda: RopeScaling("llama3", 2.0, 64, 4.0, 1.0), "low-freq-factor"),
        (lambda: RopeScaling("ntk", 2.0, 64), "unknown"),  # pyright: ignore[reportArgumentType]
        (lambda: replace(LLAMA, head_size=2, rope_scaling=RopeScaling("dynamic", 2.0, 64)), "at least 4"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        change()
