"""Llama 1, 2, 3, 3.1 and later, and Code Llama."""

from typing import Any

from mtl.models.decoder import Config
from mtl.models.hf.family import Family, Names
from mtl.models.hf.fields import Fields, read_rope, write_rope
from mtl.models.hf.names import Row

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
    "gelu_python": "geglu",
    "gelu_accurate": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
}


def read(fields: Fields) -> Config:
    """Read config.json."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias", False)
    fields.rate("attention_dropout")
    return Config(**shape, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def write(cfg: Config) -> dict[str, Any]:
    """Write config.json."""
    return {**write_shape(cfg), "attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}


def read_shape(fields: Fields, positions: int = 2048, kv_heads: int | None = None, head_size: int | None = None) -> dict[str, Any]:
    """Read what Llama's relatives share; the defaults are transformers' for the family."""
    embed, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    longest = fields.whole("max_position_embeddings", positions)
    theta, scaling = read_rope(fields, longest)
    return {
        "vocab": fields.whole("vocab_size"),
        "layers": fields.whole("num_hidden_layers"),
        "embed": embed,
        "heads": heads,
        "kv_heads": fields.whole("num_key_value_heads", kv_heads or heads),
        "mlp": fields.whole("intermediate_size"),
        "head_size": fields.whole("head_dim", head_size or max(embed // heads, 1)),
        "norm_eps": fields.eps("rms_norm_eps", 1e-6),
        "max_positions": longest,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "activation": fields.choice("hidden_act", "silu", ACTIVATIONS),
        "tied": fields.flag("tie_word_embeddings", False),
        "init_std": fields.number("initializer_range", 0.02),
    }


def write_shape(cfg: Config) -> dict[str, Any]:
    """Write what Llama's relatives share."""
    return {
        "vocab_size": cfg.vocab,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.embed,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "intermediate_size": cfg.mlp,
        "head_dim": cfg.head_size,
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        **write_rope(cfg.rope_theta, cfg.rope_scaling),
        "hidden_act": next((theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg.activation), cfg.activation),
        "tie_word_embeddings": cfg.tied,
        "initializer_range": cfg.init_std,
    }


def names(cfg: Config) -> Names:
    """Map our arrays to their tensors."""
    turned, layer = cfg.rope_pairs == "interleaved", "model.layers.{}."
    return {
        "embed.weight": Row("model.embed_tokens.weight", "VD"),
        "norm.weight": Row("model.norm.weight", "W"),
        "head.weight": Row("lm_head.weight", "VD"),
        "layers.norm1.weight": Row(layer + "input_layernorm.weight", "W"),
        "layers.norm2.weight": Row(layer + "post_attention_layernorm.weight", "W"),
        "layers.query.weight": Row(layer + "self_attn.q_proj.weight", "HKD", turned=turned),
        "layers.key.weight": Row(layer + "self_attn.k_proj.weight", "GKD", turned=turned),
        "layers.value.weight": Row(layer + "self_attn.v_proj.weight", "GKD"),
        "layers.out.weight": Row(layer + "self_attn.o_proj.weight", "DHK"),
        "layers.query.bias": Row(layer + "self_attn.q_proj.bias", "HK", turned=turned),
        "layers.key.bias": Row(layer + "self_attn.k_proj.bias", "GK", turned=turned),
        "layers.value.bias": Row(layer + "self_attn.v_proj.bias", "GK"),
        "layers.out.bias": Row(layer + "self_attn.o_proj.bias", "W"),
        "layers.query_norm.weight": Row(layer + "self_attn.q_norm.weight", "K", turned=turned),
        "layers.key_norm.weight": Row(layer + "self_attn.k_norm.weight", "K", turned=turned),
        "layers.gate.weight": Row(layer + "mlp.gate_proj.weight", "FD"),
        "layers.up.weight": Row(layer + "mlp.up_proj.weight", "FD"),
        "layers.down.weight": Row(layer + "mlp.down_proj.weight", "DF"),
        "layers.gate.bias": Row(layer + "mlp.gate_proj.bias", "F"),
        "layers.up.bias": Row(layer + "mlp.up_proj.bias", "F"),
        "layers.down.bias": Row(layer + "mlp.down_proj.bias", "W"),
    }


FAMILY = Family("llama", ("llama", "code_llama"), ("LlamaForCausalLM", "CodeLlamaForCausalLM"), read, write, names)
