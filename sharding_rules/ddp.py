"""Data parallelism: every device holds the whole model and a part of the batch."""

BASE = "single"
ACT = {"batch": ("replica",)}
