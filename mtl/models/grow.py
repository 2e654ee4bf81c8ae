"""A larger vocabulary for a trained model: old rows stay as they are, new ones start at the mean of the old."""

from torch import Tensor
from torch.distributed.tensor import DTensor

from mtl import tree
from mtl.axes import names
from mtl.errors import UserError
from mtl.params import ParamSpec
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global


def grow(params: tree.Tree, specs: tree.Tree, rules: Rules, mesh: Mesh) -> tree.Tree:
    """Give parameters of the shapes that ``specs`` declare, from parameters with a smaller vocabulary.

    Every array with a vocab axis (embedding and head) keeps its rows and gets new ones behind them, each the mean of all old rows, taken in
    float64: a new token starts as an average one, with an average logit. Any mesh gives the same bits. The old array is gathered whole,
    one at a time.
    """
    held = dict(tree.paths(params))
    return tree.map_paths(lambda path, spec: _grown(path, spec, held[path], rules, mesh), specs)


def _grown(path: str, spec: ParamSpec, old: DTensor, rules: Rules, mesh: Mesh) -> DTensor:
    if tuple(old.shape) == spec.shape:
        return old
    dim = spec.axes.find("V")
    if dim < 0 or tuple(old.shape) != (*spec.shape[:dim], min(old.shape[dim], spec.shape[dim]), *spec.shape[dim + 1 :]):
        raise UserError(
            f"parameter {path!r} has shape {tuple(old.shape)}, but the model needs {spec.shape}: "
            "a vocabulary can grow, nothing else can differ."
        )
    layout = rules.layout("store", names(spec.axes), spec.shape, mesh.shape, f"parameter {path!r}")
    offset, shape = box(spec.shape, layout, mesh)
    return to_global(_part(old.full_tensor(), dim, offset, shape), spec.shape, layout, mesh)


def _part(whole: Tensor, dim: int, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Cut a box out of the old array with means behind it."""
    mean = whole.double().mean(dim, keepdim=True).to(whole.dtype)
    for other, (start, size) in enumerate(zip(offset, shape, strict=True)):
        if other != dim:
            whole, mean = whole.narrow(other, start, size), mean.narrow(other, start, size)
    out = mean.expand(shape).contiguous()
    kept = min(max(whole.shape[dim] - offset[dim], 0), shape[dim])
    out.narrow(dim, 0, kept).copy_(whole.narrow(dim, min(offset[dim], whole.shape[dim]), kept))
    return out
