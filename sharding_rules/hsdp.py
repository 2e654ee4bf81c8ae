"""FSDP inside groups (fsdp), data parallelism between them (replica)."""

BASE = "fsdp"
ACT = {"batch": ("replica", "fsdp")}
