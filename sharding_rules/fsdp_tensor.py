"""FSDP (and data parallelism) outside, tensor and sequence parallelism inside."""

BASE = "tensor"
STORE = {"embed": ("pipe", "fsdp")}
ACT = {"batch": ("replica", "fsdp")}
