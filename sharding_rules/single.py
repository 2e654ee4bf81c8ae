"""One device: nothing is split."""

PAD = ("layers",)

STORE = {
    "layers": ("pipe",),
    "vocab": (),
    "embed": ("pipe",),
    "heads": (),
    "kv_heads": (),
    "head": (),
    "mlp": (),
    "experts": (),
    "positions": (),
    "norm": (),
    "whole": (),
}
COMPUTE = {
    "layers": ("pipe",),
    "vocab": (),
    "embed": (),
    "heads": (),
    "kv_heads": (),
    "head": (),
    "mlp": (),
    "experts": (),
    "positions": (),
    "norm": (),
    "whole": (),
}
ACT = {
    "batch": (),
    "residual_seq": (),
    "seq": (),
    "query_seq": (),
    "key_seq": (),
    "embed": (),
    "heads": (),
    "kv_heads": (),
    "head": (),
    "core_heads": (),
    "core_kv_heads": (),
    "mlp": (),
    "vocab": (),
    "experts": (),
    "whole": (),
}
