"""Ulysses: the sequence split between attentions, heads split inside them (an all-to-all each way)."""

BASE = "context"
ACT = {"query_seq": (), "core_heads": ("context",), "core_kv_heads": ("context",)}
WHOLE = ("core_kv_heads",)
ORDER = "contiguous"
