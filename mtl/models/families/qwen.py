"""Qwen 2, 2.5 and 3 (dense): Llama's layers with query, key and value biases (2, 2.5) or norms (3), and windows for some layers."""

from typing import Any

from mtl.errors import UserError
from mtl.models.decoder import Config
from mtl.models.families import llama
from mtl.models.hf.family import Family
from mtl.models.hf.fields import Fields


def read(fields: Fields) -> Config:
    """Read config.json."""
    newer = fields.raw("model_type") == "qwen3" or "Qwen3ForCausalLM" in (fields.raw("architectures") or ())
    shape = llama.read_shape(fields, 32768, 32, 128 if newer else None)
    fields.rate("attention_dropout")
    bias = fields.flag("attention_bias", False) if newer else True
    return Config(**shape, **_windows(fields, shape["layers"]), qkv_bias=bias, out_bias=bias and newer, qk_norm=newer)


def write(cfg: Config) -> dict[str, Any]:
    """Write config.json."""
    written = {**llama.write_shape(cfg), "use_sliding_window": cfg.window is not None, "sliding_window": cfg.window}
    if cfg.window is not None:
        written["layer_types"] = ["full_attention" if i in cfg.full_layers else "sliding_attention" for i in range(cfg.layers)]
    if cfg.qk_norm:
        return {**written, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": cfg.qkv_bias}
    return {**written, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def _windows(fields: Fields, layers: int) -> dict[str, Any]:
    """Read which layers see a window: those that layer_types names, else those from max_window_layers on."""
    used, size, start = (
        fields.flag("use_sliding_window", False),
        fields.maybe_whole("sliding_window", 4096),
        fields.raw("max_window_layers"),
    )
    start = 28 if start is None else start
    if not isinstance(start, int) or start < 0:
        raise UserError(f"config.json: max_window_layers is {start!r}; expected a whole number from 0 on.")
    size = size if used else None
    kinds = fields.raw("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if size is not None and i >= start else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise UserError(f"config.json: layer_types is {kinds!r}; expected {layers} times full_attention or sliding_attention.")
    if "sliding_attention" not in kinds:
        return {}
    if size is None:
        raise UserError("config.json: layer_types names sliding_attention, but use_sliding_window is false or sliding_window is null.")
    return {"window": size, "full_layers": tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")}


FAMILY = Family("qwen", ("qwen2", "qwen3"), ("Qwen2ForCausalLM", "Qwen3ForCausalLM"), read, write, llama.names)
