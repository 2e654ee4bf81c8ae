"""The fields of a Hugging Face config.json, read one by one: each is used, known to change nothing, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any, cast

from mtl.errors import UserError
from mtl.ops.rotary import RopeScaling

INERT = frozenset(
    (
        "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path", "auto_map", "dtype", "torch_dtype",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "tokenizer_class",
        "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "problem_type", "id2label",
        "label2id", "num_labels", "finetuning_task", "task_specific_params", "prefix", "decoder_start_token_id", "pretraining_tp",
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "_flash_attn_2_enabled", "tie_encoder_decoder", "use_flash_attn", "unsloth_version", "unsloth_fixed", "model_max_length",
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature", "top_k", "top_p",
        "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
        "max_new_tokens", "min_new_tokens", "gradient_checkpointing", "is_llama_config", "transformers.js_config",
        "_num_labels", "output_past", "max_sequence_length", "type_vocab_size", "hidden_dropout_prob", "attention_probs_dropout_prob",
        "classifier_dropout",
    )
)  # fmt: skip
"""Fields that do not change what the weights compute: they travel as they are."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (False, True), "is_encoder_decoder": (False,), "add_cross_attention": (False,), "cross_attention_hidden_size": (),
    "chunk_size_feed_forward": (0,), "pruned_heads": ({},), "use_mrope": (False,), "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,), "apply_residual_connection_post_layernorm": (False,), "num_experts": (0,), "num_local_experts": (),
    "tie_last_hidden_states": (True, False), "per_layer_config": ({},),
}  # fmt: skip
"""Fields that change nothing at these values, or unset; any other value is refused."""

DTYPES = ("float64", "float32", "float16", "bfloat16")


UNGATED = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu",
    "swish": "silu", "gelu_python": "gelu", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
"""Activations of MLPs without a gate; where several have one meaning, the first is written."""


class Fields:
    """A config.json and which of its fields were used."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Take the parsed file."""
        self.values, self.used = values, set[str]()

    def whole(self, name: str, default: int | None = None) -> int:
        """Take a whole number from 1 on."""
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(name, value, "a whole number from 1 on")
        return value

    def maybe_whole(self, name: str, default: int | None = None) -> int | None:
        """Take a whole number from 1 on, or None where the field is unset or null."""
        self.used.add(name)
        return None if self.values.get(name, default) is None else self.whole(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """Take a finite number."""
        value = self._take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise wrong(name, value, "a number")
        return float(value)

    def eps(self, name: str, default: float) -> float:
        """Take what a norm adds before its root."""
        value = self.number(name, default)
        if value < 0:
            raise wrong(name, value, "a number from 0 on")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Take true or false."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def choice(self, name: str, default: str | None, known: Mapping[str, str]) -> str:
        """Take a name and give what we call it."""
        value = self._take(name, default)
        if not isinstance(value, str) or value not in known:
            raise wrong(name, value, f"one of {', '.join(known)}")
        return known[value]

    def raw(self, name: str) -> Any:
        """Take a field as it is, or None."""
        self.used.add(name)
        return self.values.get(name)

    def rate(self, name: str, default: float = 0.0) -> float:
        """Take a dropout rate."""
        value = self.number(name, default)
        if not 0.0 <= value < 1.0:
            raise wrong(name, value, "a rate from 0 to under 1")
        return value

    def finish(self, family: str) -> None:
        """Refuse every field that nobody used and that may mean something."""
        unknown: list[str] = []
        for name, value in self.values.items():
            if name in self.used or name in INERT or value is None or (name in ONLY and value in ONLY[name]):
                continue
            unknown.append(f"{name} = {value!r}")
        if unknown:
            raise UserError(
                f"config.json of family {family} has fields that mtl cannot keep: {'; '.join(unknown)}. "
                "They may change what the model computes; remove them only if you know that they do not."
            )

    def _take(self, name: str, default: Any) -> Any:
        self.used.add(name)
        value = self.values.get(name)
        if value is None and default is None:
            raise UserError(f"config.json has no field {name!r}, which this family needs.")
        return default if value is None else value


def wrong(name: str, value: Any, expected: str) -> UserError:
    """Describe a field whose value cannot be."""
    return UserError(f"config.json: {name} is {value!r}; expected {expected}.")


def dtype(values: Mapping[str, Any]) -> str | None:
    """Give the type that config.json declares for the weights, under its new or its old name."""
    found = {str(values[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if values.get(name) is not None}
    if len(found) > 1:
        raise UserError(f"config.json: dtype is {values['dtype']!r} but torch_dtype is {values['torch_dtype']!r}; keep one of them.")
    for name in found - set(DTYPES):
        raise UserError(f"config.json: dtype is {name!r}; expected one of {', '.join(DTYPES)}.")
    return found.pop() if found else None


_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        "finetuned",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def read_rope(fields: Fields, max_positions: int) -> tuple[float, RopeScaling]:
    """Read theta and scaling from rope_theta and rope_scaling, as configs were until transformers 4, or from rope_parameters."""
    old, new = fields.raw("rope_scaling") or {}, fields.raw("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise wrong(name, value, "an object, or null")
    said = cast("dict[str, Any]", {k: v for k, v in (old or new).items() if v is not None})
    if old and new:
        rest = cast("dict[str, Any]", {k: v for k, v in new.items() if v is not None})
        for key in said.keys() & rest.keys():
            if said[key] != rest[key]:
                raise UserError(f"config.json: rope_scaling.{key} is {said[key]!r} but rope_parameters.{key} is {rest[key]!r}.")
        said = rest | said
    kind = said.get("rope_type", said.get("type", "default"))
    if said.get("type", kind) != kind:
        raise UserError(f"config.json: the rope scaling's rope_type is {kind!r} but its type is {said['type']!r}.")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"config.json: rope type {kind!r} is not known. Known: {', '.join(_KEYS)}.")
    extra = said.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind]}
    if extra:
        raise UserError(f"config.json: rope type {kind!r} has no fields {', '.join(sorted(extra))}.")
    if said.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"config.json: partial_rotary_factor is {said['partial_rotary_factor']}; this family turns whole heads (1.0).")
    outside = fields.raw("original_max_position_embeddings")
    if outside is not None and said.get("original_max_position_embeddings", outside) != outside:
        raise UserError(
            f"config.json: original_max_position_embeddings is {outside}, but inside the rope scaling it is "
            f"{said['original_max_position_embeddings']}."
        )
    scaling = Fields(said if outside is None else {**said, "original_max_position_embeddings": outside})
    top = fields.raw("rope_theta")
    theta = Fields({"rope_theta": said.get("rope_theta", top)}).number("rope_theta", 10000.0)
    if theta <= 0 or (theta == 1 and kind == "yarn"):
        raise wrong("rope_theta", theta, "a number above 0, and for yarn not 1")
    if top is not None and top != theta:
        raise UserError(f"config.json: rope_theta is {top}, but inside the rope scaling it is {theta}.")
    return theta, _scaling(str(kind), scaling, max_positions)


def _scaling(kind: str, said: Fields, max_positions: int) -> RopeScaling:
    if kind == "default":
        return RopeScaling()
    original = said.whole("original_max_position_embeddings", max_positions)
    if kind == "dynamic" and original != max_positions:
        raise UserError(
            f"config.json: dynamic rope scaling starts after max_position_embeddings {max_positions}; "
            f"original_max_position_embeddings {original} contradicts it."
        )
    factor = said.number("factor", max_positions / original if kind == "yarn" else None)
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, factor, original if kind == "dynamic" else 0)  # pyright: ignore[reportArgumentType]
    if kind == "llama3":
        return RopeScaling("llama3", factor, original, said.number("low_freq_factor"), said.number("high_freq_factor"))
    given = said.raw("attention_factor")
    attention = _yarn_factor(factor, said) if given is None else said.number("attention_factor")
    fast, slow = (said.number(name, default) or default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    return RopeScaling(
        "yarn", factor, original, beta_fast=fast, beta_slow=slow, truncate=said.flag("truncate", True), attention_factor=attention
    )


def _yarn_factor(factor: float, said: Fields) -> float:
    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    above, below = said.number("mscale", 0.0), said.number("mscale_all_dim", 0.0)
    return grown(above) / grown(below) if above and below else grown(1.0)


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """Say theta and scaling in the words that every version of transformers reads."""
    if scaling.kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    said: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3"):
        said["original_max_position_embeddings"] = scaling.original
    if scaling.kind == "llama3":
        said |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        said |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")}
    return {"rope_theta": theta, "rope_scaling": said}
