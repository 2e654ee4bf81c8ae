"""Presets: a model and settings that suit it, by name."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from experiments.settings import Experiment, OptimSettings, TrainSettings
from mtl.models.decoder import Config


def _gpt(layers: int, embed: int, heads: int, vocab: int = 50257, positions: int = 1024) -> Config:
    return Config(
        vocab, layers, embed, heads, heads, 4 * embed, embed // heads, norm="layer", norm_bias=True, positions="learned",
        max_positions=positions, activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tied=True,
    )  # fmt: skip


def _llama(vocab: int, layers: int, embed: int, heads: int, kv_heads: int, mlp: int, theta: float = 10000.0, eps: float = 1e-5) -> Config:
    return Config(vocab, layers, embed, heads, kv_heads, mlp, embed // heads, norm_eps=eps, rope_theta=theta)


def _falcon(layers: int, embed: int, heads: int, kv_heads: int, norms: str) -> Config:
    return Config(
        65024, layers, embed, heads, kv_heads, 4 * embed, 64, norm="layer", norm_bias=True, activation="gelu", tied=True,
        parallel="two_norms" if norms == "two" else "one_norm",
    )  # fmt: skip


def _large(model: Config, seq_len: int, lr: float = 3e-4, batch: int = 8) -> Experiment:
    return Experiment(model, train=TrainSettings(1000, batch, 1, seq_len), optim=OptimSettings(lr=lr, warmup_steps=100))


PRESETS: Mapping[str, Experiment] = MappingProxyType(
    {
        "tiny": Experiment(
            Config(256, 4, 256, 8, 2, 640, 32, tied=True, init_std=0.03),
            train=TrainSettings(steps=360, global_batch_size=8, seq_len=256, eval_every=120, eval_samples=64),
            optim=OptimSettings(lr=3e-3, warmup_steps=20, weight_decay=0.1),
        ),
        "gpt2_124m": _large(_gpt(12, 768, 12), 1024, 6e-4, 32),
        "gpt3_175b": _large(_gpt(96, 12288, 96, positions=2048), 2048, 6e-5),
        "llama_1b": _large(_llama(128256, 16, 2048, 32, 8, 8192, 500000.0), 4096),
        "llama2_7b": _large(_llama(32000, 32, 4096, 32, 32, 11008), 4096),
        "llama2_70b": _large(_llama(32000, 80, 8192, 64, 8, 28672), 4096, 1.5e-4),
        "llama3_8b": _large(_llama(128256, 32, 4096, 32, 8, 14336, 500000.0), 8192),
        "llama3_70b": _large(_llama(128256, 80, 8192, 64, 8, 28672, 500000.0), 8192, 1.5e-4),
        "mistral_7b": _large(Config(32000, 32, 4096, 32, 8, 14336, 128, window=4096), 8192),
        "qwen2_5_7b": _large(replace(_llama(152064, 28, 3584, 28, 4, 18944, 1e6, 1e-6), qkv_bias=True), 8192),
        "qwen3_8b": _large(replace(_llama(151936, 36, 4096, 32, 8, 12288, 1e6, 1e-6), qk_norm=True), 8192),
        "falcon_7b": _large(_falcon(32, 4544, 71, 1, "one"), 2048),
        "falcon_40b": _large(_falcon(60, 8192, 128, 8, "two"), 2048),
    }
)
