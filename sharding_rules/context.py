"""Context parallelism: the sequence split over devices, keys and values gathered. Weights are split over the same devices."""

BASE = "hsdp"
STORE = {"embed": ("pipe", "fsdp", "context")}
ACT = {"residual_seq": ("context",), "seq": ("context",), "query_seq": ("context",)}
ORDER = "zigzag"
