"""GPT-2: learned positions, layer norms, Conv1D weights ([in, out], where others have [out, in])."""

from typing import Any

from mtl.errors import UserError
from mtl.models.decoder import Config
from mtl.models.hf.family import Family, Names
from mtl.models.hf.fields import UNGATED, Fields
from mtl.models.hf.names import Heads, Row

UNUSED = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "reorder_and_upcast_attn",
    "n_ctx",
    "n_special",
    "predict_special_tokens",
    "hidden_act",
    "intermediate_size",
)
"""Heads for other tasks; an order of roundings (attention's scores are in float32 here anyway); what the first files had, and what
other families call activation_function and n_inner."""
OTHER_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
"""What some files say a second time."""


def read(fields: Fields) -> Config:
    """Read config.json."""
    embed, heads = fields.whole("n_embd"), fields.whole("n_head")
    for name in UNUSED:
        fields.raw(name)
    for name, own in OTHER_NAMES.items():
        if fields.raw(name) not in (None, fields.raw(own)):
            raise UserError(f"config.json: {name} is {fields.raw(name)!r}, but {own}, which is the same in GPT-2, is {fields.raw(own)!r}.")
    residual = fields.rate("resid_pdrop", 0.1)
    fields.rate("attn_pdrop", 0.1)
    return Config(
        vocab=fields.whole("vocab_size"), layers=fields.whole("n_layer"), embed=embed, heads=heads, kv_heads=heads,
        mlp=fields.whole("n_inner", 4 * embed), head_size=max(embed // heads, 1), norm="layer", norm_bias=True,
        norm_eps=fields.eps("layer_norm_epsilon", 1e-5), positions="learned", max_positions=fields.whole("n_positions", 1024),
        activation=fields.choice("activation_function", "gelu_new", UNGATED),  # pyright: ignore[reportArgumentType]
        qkv_bias=True, out_bias=True, mlp_bias=True, tied=fields.flag("tie_word_embeddings", True),
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
        scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False), init_std=fields.number("initializer_range", 0.02),
        dropout_embed=fields.rate("embd_pdrop", 0.1), dropout_attention=residual, dropout_mlp=residual,
    )  # fmt: skip


def write(cfg: Config) -> dict[str, Any]:
    """Write config.json."""
    return {
        "vocab_size": cfg.vocab,
        "n_layer": cfg.layers,
        "n_embd": cfg.embed,
        "n_head": cfg.heads,
        "n_inner": cfg.mlp,
        "n_positions": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": next((theirs for theirs, ours in UNGATED.items() if ours == cfg.activation), cfg.activation),
        "tie_word_embeddings": cfg.tied,
        "scale_attn_weights": cfg.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": cfg.scale_by_layer,
        "initializer_range": cfg.init_std,
        "embd_pdrop": cfg.dropout_embed,
        "resid_pdrop": cfg.dropout_mlp,
        "attn_pdrop": 0.0,
    }


def names(cfg: Config) -> Names:
    """Map our arrays to their tensors: c_attn holds all queries, then all keys, then all values."""
    layer = "transformer.h.{}."
    thirds = {part: Heads(i * cfg.heads, total=3 * cfg.heads) for i, part in enumerate(("query", "key", "value"))}
    letters = {"query": "H", "key": "G", "value": "G"}
    return {
        "embed.weight": Row("transformer.wte.weight", "VD"),
        "positions.weight": Row("transformer.wpe.weight", "PD"),
        "head.weight": Row("lm_head.weight", "VD"),
        **{f"norm.{kind}": Row(f"transformer.ln_f.{kind}", "W") for kind in ("weight", "bias")},
        **{f"layers.norm{i}.{kind}": Row(f"{layer}ln_{i}.{kind}", "W") for i in (1, 2) for kind in ("weight", "bias")},
        **{f"layers.{part}.weight": Row(layer + "attn.c_attn.weight", f"D{letters[part]}K", thirds[part]) for part in thirds},
        **{f"layers.{part}.bias": Row(layer + "attn.c_attn.bias", f"{letters[part]}K", thirds[part]) for part in thirds},
        "layers.out.weight": Row(layer + "attn.c_proj.weight", "HKD"),
        "layers.out.bias": Row(layer + "attn.c_proj.bias", "W"),
        "layers.up.weight": Row(layer + "mlp.c_fc.weight", "DF"),
        "layers.up.bias": Row(layer + "mlp.c_fc.bias", "F"),
        "layers.down.weight": Row(layer + "mlp.c_proj.weight", "FD"),
        "layers.down.bias": Row(layer + "mlp.c_proj.bias", "W"),
    }


FAMILY = Family("gpt2", ("gpt2",), ("GPT2LMHeadModel",), read, write, names, "transformer.", r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$")
