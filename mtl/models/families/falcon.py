"""Falcon: 7B (one key head, one norm), 40B and 180B (the new decoder architecture), 11B (that with one norm), RW (ALiBi)."""

from typing import Any

from mtl.errors import UserError
from mtl.models.decoder import Config
from mtl.models.hf.family import Family, Names
from mtl.models.hf.fields import UNGATED, Fields, read_rope, write_rope
from mtl.models.hf.names import Heads, Row


def read(fields: Fields) -> Config:
    """Read config.json."""
    embed, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    alibi, longest = fields.flag("alibi", False), fields.whole("max_position_embeddings", 2048)
    theta, scaling = read_rope(fields, longest)
    bias = fields.flag("bias", False)
    for name in ("hidden_act", "intermediate_size", "ff_factor"):
        fields.raw(name)  # not Falcon's names: its files have activation and ffn_hidden_size, which count
    if embed % heads:
        raise UserError(f"config.json: hidden_size {embed} does not divide by num_attention_heads {heads}.")
    return Config(
        vocab=fields.whole("vocab_size"), layers=fields.whole("num_hidden_layers"), embed=embed, heads=heads,
        mlp=fields.whole("ffn_hidden_size", 4 * embed), head_size=embed // heads, **_architecture(fields, heads),
        norm="layer", norm_bias=True, norm_eps=fields.eps("layer_norm_epsilon", 1e-5), max_positions=longest,
        positions="alibi" if alibi else "rotary", rope_theta=theta, rope_scaling=scaling,
        activation=fields.choice("activation", "gelu", UNGATED),  # pyright: ignore[reportArgumentType]
        qkv_bias=bias, out_bias=bias, mlp_bias=bias, tied=fields.flag("tie_word_embeddings", True),
        init_std=fields.number("initializer_range", 0.02),
        dropout_attention=fields.rate("attention_dropout"), dropout_mlp=fields.rate("hidden_dropout"),
    )  # fmt: skip


def write(cfg: Config) -> dict[str, Any]:
    """Write config.json."""
    grouped = cfg.parallel == "two_norms" or (cfg.parallel == "one_norm" and 1 < cfg.kv_heads < cfg.heads)
    return {
        "vocab_size": cfg.vocab,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.embed,
        "num_attention_heads": cfg.heads,
        "num_kv_heads": cfg.kv_heads if grouped else None,
        "ffn_hidden_size": cfg.mlp,
        "new_decoder_architecture": grouped,
        "num_ln_in_parallel_attn": {"two_norms": 2, "one_norm": 1}[cfg.parallel] if grouped else None,
        "multi_query": cfg.kv_heads == 1,
        "parallel_attn": cfg.parallel != "none",
        "layer_norm_epsilon": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "alibi": cfg.positions == "alibi",
        **write_rope(cfg.rope_theta, cfg.rope_scaling),
        "activation": next((theirs for theirs, ours in UNGATED.items() if ours == cfg.activation), cfg.activation),
        "bias": cfg.qkv_bias,
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
        "attention_dropout": cfg.dropout_attention,
        "hidden_dropout": cfg.dropout_mlp,
    }


def names(cfg: Config) -> Names:
    """Map our arrays to their tensors: query_key_value holds, for every key head, its query heads, the key head, the value head."""
    layer, turned = "transformer.h.{}.", cfg.rope_pairs == "interleaved"
    qkv, size = layer + "self_attention.query_key_value.", cfg.heads // cfg.kv_heads
    stride, total = size + 2, cfg.kv_heads * (size + 2)
    query, key, value = Heads(0, size, stride, total), Heads(size, 1, stride, total), Heads(size + 1, 1, stride, total)
    norms = {
        "two_norms": {"norm1": "ln_attn", "norm2": "ln_mlp"},
        "one_norm": {"norm1": "input_layernorm"},
        "none": {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    }[cfg.parallel]
    return {
        "embed.weight": Row("transformer.word_embeddings.weight", "VD"),
        "head.weight": Row("lm_head.weight", "VD"),
        **{f"norm.{kind}": Row(f"transformer.ln_f.{kind}", "W") for kind in ("weight", "bias")},
        **{f"layers.{ours}.{kind}": Row(f"{layer}{theirs}.{kind}", "W") for ours, theirs in norms.items() for kind in ("weight", "bias")},
        "layers.query.weight": Row(qkv + "weight", "HKD", query, turned),
        "layers.key.weight": Row(qkv + "weight", "GKD", key, turned),
        "layers.value.weight": Row(qkv + "weight", "GKD", value),
        "layers.query.bias": Row(qkv + "bias", "HK", query, turned),
        "layers.key.bias": Row(qkv + "bias", "GK", key, turned),
        "layers.value.bias": Row(qkv + "bias", "GK", value),
        "layers.out.weight": Row(layer + "self_attention.dense.weight", "DHK"),
        "layers.out.bias": Row(layer + "self_attention.dense.bias", "W"),
        "layers.up.weight": Row(layer + "mlp.dense_h_to_4h.weight", "FD"),
        "layers.up.bias": Row(layer + "mlp.dense_h_to_4h.bias", "F"),
        "layers.down.weight": Row(layer + "mlp.dense_4h_to_h.weight", "DF"),
        "layers.down.bias": Row(layer + "mlp.dense_4h_to_h.bias", "W"),
    }


def _architecture(fields: Fields, heads: int) -> dict[str, Any]:
    """Read how many key heads there are and how attention and MLP follow each other."""
    newer, parallel = fields.flag("new_decoder_architecture", False), fields.flag("parallel_attn", True)
    single, count, norms = (
        fields.flag("multi_query", True),
        fields.maybe_whole("num_kv_heads"),
        fields.maybe_whole("num_ln_in_parallel_attn"),
    )
    if norms not in (None, 1, 2) or (norms == 2 and not newer) or (newer and not parallel):
        raise UserError(
            f"config.json: num_ln_in_parallel_attn {norms}, parallel_attn {parallel} and new_decoder_architecture {newer} contradict each "
            "other: two norms are the new decoder architecture's, which always has parallel attention."
        )
    if newer:
        return {"kv_heads": count or heads, "parallel": "one_norm" if norms == 1 else "two_norms"}
    if not single and count not in (None, heads):
        raise UserError(f"config.json: num_kv_heads is {count}, but without multi_query and new_decoder_architecture there are {heads}.")
    return {"kv_heads": 1 if single else heads, "parallel": "one_norm" if parallel else "none"}


FAMILY = Family("falcon", ("falcon",), ("FalconForCausalLM",), read, write, names, "transformer.")
