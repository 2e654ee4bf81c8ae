"""ZeRO-1: master weights and optimizer state are split, weights are gathered and gradients scattered once a step."""

BASE = "single"
STORE = {"embed": ("pipe", "replica", "fsdp")}
ACT = {"batch": ("replica", "fsdp")}
GATHER = "step"
