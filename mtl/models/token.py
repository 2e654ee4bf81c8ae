"""One token a row through a layer in five kernels: what stands around a product runs inside it (`mtl.kernels.few_rows`).

The same as `mtl.models.decoder.block`, for the layers and the places where the kernels can do it: a root-mean-square norm before gated
products without biases, weights that rest as they are used, few rows, a GPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mtl.kernels import few_rows
from mtl.kernels.few_rows import multiply
from mtl.ops.linear import at_hand, columns_here, joined
from mtl.sharding.parallel import Parallel

QUERY = {"query": "DHK", "key": "DGK", "value": "DGK"}
GATE = {"gate": "DF", "up": "DF"}
OUT, DOWN = "DHK", "DF"
BARE = ("out", "gate", "up", "down")
"""Projections that may have nothing but their weight."""


def fits(cfg: Any, par: Parallel, p: Mapping[str, Any], x: Tensor) -> bool:
    """Tell whether a layer's products can be taken with what stands around them."""
    if cfg.norm != "rms" or cfg.norm_bias or cfg.activation != "swiglu" or cfg.parallel != "none":
        return False
    if joined(QUERY) not in p or joined(GATE) not in p:
        return False
    if any(set(p.get(name, {})) - {"weight"} for name in BARE) or any("lora" in p.get(name, {}) for name in QUERY):
        return False
    rest = all(at_hand(par, letters, p[name]["weight"], x.dtype) for name, letters in (("out", OUT), ("down", DOWN)))
    return rest and all(few_rows.refuses(x.flatten(0, 1), w) is None for w in _matrices(p))


def block(cfg: Any, par: Parallel, p: Mapping[str, Any], x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Apply one layer to the residual stream (B, 1, D); ``attend`` takes query, key and value to what attention makes of them."""
    query, gate, out, down = _matrices(p)
    y = multiply(x.flatten(0, 1), query, p["norm1"]["weight"], cfg.norm_eps)
    sizes = [columns_here(par, letters, "D", query) for letters in QUERY.values()]
    parts = [part.unflatten(1, size).unsqueeze(1) for part, size in zip(y.split([a * b for a, b in sizes], 1), sizes, strict=True)]
    biases = [p.get(name, {}).get("bias") for name in QUERY]
    q, k, v = (part if bias is None else part + bias.to(part.dtype) for part, bias in zip(parts, biases, strict=True))
    x = _added(par, x, attend(q, k, v).flatten(2), out, OUT[1:])
    inner = multiply(x.flatten(0, 1), gate, p["norm2"]["weight"], cfg.norm_eps, True)
    return _added(par, x, inner.unsqueeze(1), down, DOWN[1:])


def _matrices(p: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give a layer's weights as matrices that rows are multiplied by."""
    return p[joined(QUERY)]["weight"], p[joined(GATE)]["weight"], p["out"]["weight"].flatten(1).t(), p["down"]["weight"].t()


def _added(par: Parallel, x: Tensor, y: Tensor, w: Tensor, shared: str) -> Tensor:
    """Add y @ w to x, summed over the devices that hold parts of what is contracted."""
    partial = tuple(axis for letter in shared for axis in par.axes(letter, "compute"))
    if not partial:
        return multiply(y.flatten(0, 1), w, more=x.flatten(0, 1)).unsqueeze(1)
    return x + par.reshard(multiply(y.flatten(0, 1), w).unsqueeze(1), "BSD", "BRD", partial)
