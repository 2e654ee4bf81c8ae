"""Small models of transformers, one for every switch of every family: ``CASES`` maps a name to (config class, model class, settings)."""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, LAYERS, EMBED, HEADS = 50, 3, 32, 4
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "hidden_size": EMBED, "num_attention_heads": HEADS}
LIKE_LLAMA: dict[str, Any] = {
    **SHAPE, "intermediate_size": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-3, "max_position_embeddings": 24, "bos_token_id": 3,
    "eos_token_id": [4, 5], "pad_token_id": 6,
}  # fmt: skip
FALCON: dict[str, Any] = {**SHAPE, "layer_norm_epsilon": 1e-3, "max_position_embeddings": 24}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 80,
    "n_embd": EMBED,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "layer_norm_epsilon": 1e-3,
}


def rope(kind: str, **said: Any) -> dict[str, Any]:
    """Spell a rope scaling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **said}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LIKE_LLAMA),
    "llama_switches": (
        "Llama",
        {**LIKE_LLAMA, **rope("default"), "head_dim": 6, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1,
         "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ),
    "llama_linear": ("Llama", {**LIKE_LLAMA, **rope("linear", factor=2.5)}),
    "llama_dynamic": ("Llama", {**LIKE_LLAMA, **rope("dynamic", factor=3.0)}),
    "llama_yarn": ("Llama", {**LIKE_LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=12)}),
    "llama_yarn_mscale": (
        "Llama",
        {**LIKE_LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=12, mscale=0.7, mscale_all_dim=0.3, beta_fast=8.0,
                              beta_slow=2.0, truncate=False)},
    ),
    "llama_3_1": (
        "Llama",
        {**LIKE_LLAMA, **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)},
    ),
    "code_llama": ("Llama", {**LIKE_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {**LIKE_LLAMA, "sliding_window": 7, "head_dim": 10}),
    "mistral_whole": ("Mistral", {**LIKE_LLAMA, "sliding_window": None}),
    "mistral_window_yarn": (
        "Mistral", {**LIKE_LLAMA, "sliding_window": 7, **rope("yarn", factor=2.0, original_max_position_embeddings=12)},
    ),
    "falcon_7b": ("Falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon_40b": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 48}),
    "falcon_180b": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 4, "tie_word_embeddings": False}),
    "falcon_11b": (
        "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, **rope("default")},
    ),
    "falcon_rw": ("Falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_alibi": ("Falcon", {**FALCON, "alibi": True, "multi_query": True, "parallel_attn": False, "activation": "relu2"}),
    "falcon_many_heads": ("Falcon", {**FALCON, "multi_query": False, "parallel_attn": True, **rope("linear", factor=2.0)}),
    "gpt2": ("GPT2", GPT2),
    "gpt2_switches": (
        "GPT2",
        {**GPT2, "n_inner": 48, "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False,
         "reorder_and_upcast_attn": False, "resid_pdrop": 0.2},
    ),
    "gpt2_unscaled": ("GPT2", {**GPT2, "scale_attn_weights": False}),
    "qwen2": ("Qwen2", LIKE_LLAMA),
    "qwen2_windows": (
        "Qwen2", {**LIKE_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2_layer_types": (
        "Qwen2",
        {**LIKE_LLAMA, "use_sliding_window": True, "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3": ("Qwen3", {**LIKE_LLAMA, "head_dim": 12}),
    "qwen3_switches": (
        "Qwen3",
        {**LIKE_LLAMA, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True,
         **rope("yarn", factor=4.0, original_max_position_embeddings=12)},
    ),
}  # fmt: skip
CLASSES = {"GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Make a model with random weights, norms and biases."""
    kind, settings = CASES[name]
    config, model = CLASSES.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    made = made.to(dtype).eval()
    made.config.dtype = dtype
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.3)
    return made


def write(name: str, folder: Path, dtype: torch.dtype = torch.float64, shard: str = "20KB") -> Any:
    """Make a model and save it as transformers does, in several files."""
    made = make(name, dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    return made
