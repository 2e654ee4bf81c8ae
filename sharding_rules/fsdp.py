"""ZeRO-3: parameters are split at rest, gathered layer by layer, and gathered again in backward."""

BASE = "single"
STORE = {"embed": ("pipe", "fsdp")}
ACT = {"batch": ("fsdp",)}
