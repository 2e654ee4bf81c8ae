"""The one legend: which letter stands for which logical axis.

Models spell every layout in these letters (``"BRD"`` is the residual stream, ``"DHK"`` a query projection) and rules tables give each
logical axis its mesh axes. Several letters stand for one dimension at different places in a layer, so that a table can lay it out
differently there: the sequence is ``R`` in the residual stream, ``S`` inside a layer, ``Q`` and ``T`` inside attention.
"""

from collections.abc import Mapping
from types import MappingProxyType

MESH_AXES = ("pipe", "replica", "fsdp", "expert", "context", "tensor")
"""Every mesh has these axes, in this order, most of them of size 1."""

LETTERS: Mapping[str, str] = MappingProxyType(
    {
        "L": "layers",  # stacked equal layers
        "V": "vocab",
        "D": "embed",
        "H": "heads",  # query heads
        "G": "kv_heads",
        "K": "head",  # the size of one head
        "F": "mlp",
        "E": "experts",
        "P": "positions",  # rows of a learned position table
        "W": "norm",  # weights of norms, and biases as long as the residual stream
        "B": "batch",
        "R": "residual_seq",  # the sequence between layers (and under norms)
        "S": "seq",  # the sequence inside a layer
        "Q": "query_seq",  # queries inside attention
        "T": "key_seq",  # keys and values inside attention
        "M": "core_heads",  # query heads inside attention
        "N": "core_kv_heads",
        "_": "whole",  # never sharded
    }
)

PARAM_AXES = tuple(LETTERS[c] for c in "LVDHGKFEPW_")
"""Logical axes that parameters have: the keys of STORE and COMPUTE."""

ACTIVATION_AXES = tuple(LETTERS[c] for c in "BRSQTDHGKMNFVE_")
"""Logical axes that activations have: the keys of ACT."""


def names(letters: str) -> tuple[str, ...]:
    """Spell a layout out: ``names("BRD") == ("batch", "residual_seq", "embed")``."""
    return tuple(LETTERS[c] for c in letters)
