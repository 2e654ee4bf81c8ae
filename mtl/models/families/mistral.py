"""Mistral: Llama's layers with a sliding window."""

from typing import Any

from mtl.errors import UserError
from mtl.models.decoder import Config
from mtl.models.families import llama
from mtl.models.hf.family import Family
from mtl.models.hf.fields import Fields


def read(fields: Fields) -> Config:
    """Read config.json. A window that is not named is 4096 tokens; null is none."""
    shape = llama.read_shape(fields, 131072, 8)
    window = fields.maybe_whole("sliding_window", 4096)
    wanted, kinds = ["full_attention" if window is None else "sliding_attention"] * shape["layers"], fields.raw("layer_types")
    if kinds is not None and kinds != wanted:
        raise UserError(f"config.json: layer_types is {kinds!r}, but with sliding_window {window} every layer of Mistral is {wanted[0]}.")
    fields.rate("attention_dropout")
    return Config(**shape, window=window)


def write(cfg: Config) -> dict[str, Any]:
    """Write config.json."""
    return {**llama.write_shape(cfg), "sliding_window": cfg.window}


FAMILY = Family("mistral", ("mistral",), ("MistralForCausalLM",), read, write, llama.names)
