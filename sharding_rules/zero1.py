"""ZeRO-1: master weights and optimizer state are split, weights are gathered and gradients scattered once a step."""

BASE = "single"
STORE = {"embed": ("replica", "fsdp")}
ACT = {"batch": ("replica", "fsdp")}
GATHER = "step"
