"""FSDP (and data parallelism) outside, tensor and sequence parallelism inside."""

BASE = "tensor"
STORE = {"embed": ("fsdp",)}
ACT = {"batch": ("replica", "fsdp")}
