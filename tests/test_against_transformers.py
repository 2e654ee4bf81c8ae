"""The decoder's logits against the models of transformers, with the same random weights, in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from mtl import tree
from mtl.data.batches import document_ends
from mtl.models import decoder
from mtl.models.decoder import Config
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.train.evaluate import make_logits
from tests.compare import close

One = Callable[..., Parallel]
Weights = Mapping[str, Tensor]
VOCAB, LAYERS, EMBED, HEADS, SEQ, BOUND = 50, 3, 32, 4, 17, 1e-9
ROPE = {"rope_type": "default", "rope_theta": 500.0}


class Float64(type(torch)):
    """torch, but float32 means float64: Llama's and Mistral's norms and softmax say float32 whatever type the weights have."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (modeling_llama, modeling_mistral):
        monkeypatch.setattr(module, "torch", Float64("torch"))


def randomised(model: Any) -> Any:
    """Give every weight, norm and bias a random value."""
    rng = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.3)
    return model


def stack(weights: Weights, name: str, fit: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Put the layers' weights of one name together; ``fit`` brings each to our shape."""
    return torch.stack([fit(weights[name.format(i)]) for i in range(LAYERS)])


def into_heads(heads: int) -> Callable[[Tensor], Tensor]:
    """Bring a projection's [heads x K, D] to [D, heads, K], or its bias to [heads, K]."""
    return lambda w: (w.t() if w.dim() == 2 else w).unflatten(-1, (heads, -1))


def out_of_heads(w: Tensor) -> Tensor:
    """Bring an output projection's [D, heads x K] to [D, heads, K]; its bias stays."""
    return w.unflatten(1, (HEADS, -1)) if w.dim() == 2 else w


def pair(weights: Weights, name: str) -> dict[str, Tensor]:
    """Take a norm that stands once."""
    return {kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in weights}


def pairs(weights: Weights, name: str, fit: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """Take a norm or product of every layer: weight, and bias where there is one."""
    has_bias = f"{name}.bias".format(0) in weights
    return {"weight": stack(weights, f"{name}.weight", fit)} | ({"bias": stack(weights, f"{name}.bias", fit)} if has_bias else {})


def transposed(w: Tensor) -> Tensor:
    return w.t() if w.dim() == 2 else w


def llama_tree(weights: Weights, kv_heads: int, tied: bool) -> Any:
    layer = "model.layers.{}."
    found = {
        "embed": {"weight": weights["model.embed_tokens.weight"]},
        "norm": pair(weights, "model.norm"),
        "layers": {
            "norm1": pairs(weights, f"{layer}input_layernorm"),
            "norm2": pairs(weights, f"{layer}post_attention_layernorm"),
            "query": pairs(weights, f"{layer}self_attn.q_proj", into_heads(HEADS)),
            "key": pairs(weights, f"{layer}self_attn.k_proj", into_heads(kv_heads)),
            "value": pairs(weights, f"{layer}self_attn.v_proj", into_heads(kv_heads)),
            "out": pairs(weights, f"{layer}self_attn.o_proj", out_of_heads),
            "gate": pairs(weights, f"{layer}mlp.gate_proj", transposed),
            "up": pairs(weights, f"{layer}mlp.up_proj", transposed),
            "down": pairs(weights, f"{layer}mlp.down_proj"),
        },
    }
    return found if tied else found | {"head": {"weight": weights["lm_head.weight"].t()}}


def gpt2_tree(weights: Weights) -> Any:
    layer = "transformer.h.{}."

    def third(i: int) -> Callable[[Tensor], Tensor]:  # Conv1D: weights are [in, out], queries, keys and values side by side
        return lambda w: w.chunk(3, -1)[i].unflatten(-1, (HEADS, -1))

    return {
        "embed": {"weight": weights["transformer.wte.weight"]},
        "positions": {"weight": weights["transformer.wpe.weight"]},
        "norm": pair(weights, "transformer.ln_f"),
        "layers": {
            "norm1": pairs(weights, f"{layer}ln_1"),
            "norm2": pairs(weights, f"{layer}ln_2"),
            "query": pairs(weights, f"{layer}attn.c_attn", third(0)),
            "key": pairs(weights, f"{layer}attn.c_attn", third(1)),
            "value": pairs(weights, f"{layer}attn.c_attn", third(2)),
            "out": pairs(weights, f"{layer}attn.c_proj", lambda w: out_of_heads(transposed(w))),
            "up": pairs(weights, f"{layer}mlp.c_fc"),
            "down": pairs(weights, f"{layer}mlp.c_proj", transposed),
        },
    }


def falcon_tree(weights: Weights, kv_heads: int, norms: tuple[str, ...]) -> Any:
    layer = "transformer.h.{}."

    def part(which: slice) -> Callable[[Tensor], Tensor]:
        """Take from every group, which holds its query heads, then a key head, then a value head: [groups x (n + 2) x K, D]."""

        def take(w: Tensor) -> Tensor:
            grouped = w.unflatten(0, (kv_heads, HEADS // kv_heads + 2, -1))[:, which]
            heads = grouped.flatten(0, 1)
            return heads.movedim(-1, 0) if w.dim() == 2 else heads

        return take

    qkv = f"{layer}self_attention.query_key_value"
    return {
        "embed": {"weight": weights["transformer.word_embeddings.weight"]},
        "norm": pair(weights, "transformer.ln_f"),
        "layers": {
            **{f"norm{i + 1}": pairs(weights, f"{layer}{name}") for i, name in enumerate(norms)},
            "query": pairs(weights, qkv, part(slice(0, -2))),
            "key": pairs(weights, qkv, part(slice(-2, -1))),
            "value": pairs(weights, qkv, part(slice(-1, None))),
            "out": pairs(weights, f"{layer}self_attention.dense", out_of_heads),
            "up": pairs(weights, f"{layer}mlp.dense_h_to_4h", transposed),
            "down": pairs(weights, f"{layer}mlp.dense_4h_to_h"),
        },
    }


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))


def compare(one: One, model: Any, config: Config, params: Any, positions: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Give our logits after comparing them with theirs, and the trees' shapes with what the decoder declares."""
    want_shapes = {path: spec.shape for path, spec in tree.paths(decoder.specs(config))}
    assert {path: tuple(p.shape) for path, p in tree.paths(params)} == want_shapes
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tree.leaves(params)), "every weight has its place"
    par = one(**decoder.sizes(config), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ), batch=2)
    places = torch.arange(SEQ).expand(2, SEQ) if positions is None else positions
    batch = {"tokens": tokens(), "positions": places} | (
        {} if segments is None else {"documents": torch.from_numpy(document_ends(segments.numpy()))}
    )
    got = make_logits(decoder, config, par, PRECISIONS["fp64"])(params, batch)
    with torch.no_grad():
        want = model(tokens(), use_cache=False, **({} if positions is None else {"position_ids": positions})).logits
    assert want.dtype == torch.float64
    close(got, want, BOUND)
    return got


def llama_config(kv_heads: int, **other: Any) -> Config:
    return Config(**{"mlp": 40, "head_size": 6, "norm_eps": 1e-3, "rope_theta": 500.0, **SIZES, "kv_heads": kv_heads, **other})


SIZES: dict[str, Any] = {"vocab": VOCAB, "layers": LAYERS, "embed": EMBED, "heads": HEADS}
THEIRS: dict[str, Any] = {
    "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "hidden_size": EMBED, "num_attention_heads": HEADS, "attn_implementation": "eager",
}  # fmt: skip
LIKE_LLAMA: dict[str, Any] = {**THEIRS, "intermediate_size": 40, "head_dim": 6, "rms_norm_eps": 1e-3, "rope_parameters": ROPE}


@pytest.mark.parametrize(("kv_heads", "tied", "bias"), [(4, False, False), (2, False, False), (1, True, False), (2, True, True)])
def test_llama(one: One, kv_heads: int, tied: bool, bias: bool) -> None:
    theirs = LlamaConfig(**LIKE_LLAMA, num_key_value_heads=kv_heads, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = randomised(LlamaForCausalLM(theirs))
    config = llama_config(kv_heads, tied=tied, qkv_bias=bias, out_bias=bias, mlp_bias=bias)
    compare(one, model, config, llama_tree(model.state_dict(), kv_heads, tied))


def test_llama_with_documents_in_one_sequence(one: One) -> None:
    """Positions that start again make documents to transformers; we are told both."""
    model = randomised(LlamaForCausalLM(LlamaConfig(**LIKE_LLAMA, num_key_value_heads=2)))
    params, config = llama_tree(model.state_dict(), 2, False), llama_config(2)
    lengths = [[5, 4, 8], [1, 14, 2]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    packed = compare(one, model, config, params, positions, segments)
    whole = compare(one, model, config, params)
    close(packed[0, :5], whole[0, :5], BOUND)
    assert (packed[0, 5:] - whole[0, 5:]).abs().amax(-1).min() > 1e-3, "documents matter"


def test_gpt2(one: One) -> None:
    theirs = GPT2Config(
        vocab_size=VOCAB, n_positions=20, n_embd=EMBED, n_layer=LAYERS, n_head=HEADS, n_inner=40, layer_norm_epsilon=1e-3,
        attn_implementation="eager",
    )  # fmt: skip
    model = randomised(GPT2LMHeadModel(theirs))
    config = Config(
        **SIZES, kv_heads=HEADS, mlp=40, head_size=8, norm="layer", norm_bias=True, norm_eps=1e-3, positions="learned", max_positions=20,
        activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tied=True,
    )  # fmt: skip
    compare(one, model, config, gpt2_tree(model.state_dict()))


@pytest.mark.parametrize("window", [None, 5, 1])
def test_mistral(one: One, window: int | None) -> None:
    model = randomised(MistralForCausalLM(MistralConfig(**LIKE_LLAMA, num_key_value_heads=2, sliding_window=window)))
    params = llama_tree(model.state_dict(), 2, False)
    compare(one, model, llama_config(2, window=window), params)
    if window is not None:
        with pytest.raises(AssertionError, match="error"):
            compare(one, model, llama_config(2), params)


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_7b_style(one: One, bias: bool) -> None:
    """One key head, attention and MLP side by side after one norm."""
    theirs = FalconConfig(**THEIRS, multi_query=True, parallel_attn=True, bias=bias, layer_norm_epsilon=1e-3, rope_parameters=ROPE)
    model = randomised(FalconForCausalLM(theirs))
    config = falcon_config(1, "one_norm", bias)
    compare(one, model, config, falcon_tree(model.state_dict(), 1, ("input_layernorm",)))


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_40b_style(one: One, bias: bool) -> None:
    """Groups of query heads, attention and MLP side by side after a norm each."""
    theirs = FalconConfig(**THEIRS, new_decoder_architecture=True, num_kv_heads=2, bias=bias, layer_norm_epsilon=1e-3, rope_parameters=ROPE)
    model = randomised(FalconForCausalLM(theirs))
    compare(one, model, falcon_config(2, "two_norms", bias), falcon_tree(model.state_dict(), 2, ("ln_attn", "ln_mlp")))


def test_falcon_one_after_the_other(one: One) -> None:
    """Attention, then MLP, each after its norm, as in Falcon-RW (which has no rotary positions; here it has)."""
    theirs = FalconConfig(**THEIRS, multi_query=True, parallel_attn=False, layer_norm_epsilon=1e-3, rope_parameters=ROPE)
    model = randomised(FalconForCausalLM(theirs))
    compare(
        one, model, falcon_config(1, "none", False), falcon_tree(model.state_dict(), 1, ("input_layernorm", "post_attention_layernorm"))
    )


def falcon_config(kv_heads: int, parallel: Any, bias: bool) -> Config:
    return Config(
        **SIZES, kv_heads=kv_heads, mlp=4 * EMBED, head_size=8, norm="layer", norm_bias=True, norm_eps=1e-3, rope_theta=500.0,
        activation="gelu", qkv_bias=bias, out_bias=bias, mlp_bias=bias, tied=True, parallel=parallel,
    )  # fmt: skip
