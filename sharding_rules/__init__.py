"""Parallel layouts as tables, one a file, and `load`, which finds them."""

from sharding_rules._load import choose, load, names, world_axis

__all__ = ["choose", "load", "names", "world_axis"]
