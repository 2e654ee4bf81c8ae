"""mtl: train transformers as pure functions over sharded parameter trees."""

__version__ = "0.1.0"
