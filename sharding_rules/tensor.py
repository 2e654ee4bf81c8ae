"""Tensor parallelism with sequence parallelism: heads, MLP and vocabulary split inside layers, the sequence between them."""

WHOLE = ("kv_heads", "core_kv_heads")
PAD = ("vocab", "layers")

STORE = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": ("pipe",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "experts": (),
    "positions": (),
    "norm": (),
    "whole": (),
}
COMPUTE = {
    "layers": ("pipe",),
    "vocab": ("tensor",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "experts": (),
    "positions": (),
    "norm": (),
    "whole": (),
}
ACT = {
    "batch": ("replica",),
    "residual_seq": ("tensor",),
    "seq": (),
    "query_seq": (),
    "key_seq": (),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "core_heads": ("tensor",),
    "core_kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "experts": (),
    "whole": (),
}
