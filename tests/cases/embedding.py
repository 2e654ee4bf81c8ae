"""Look tokens up in a table that rests in columns, on every rank, beside the whole table."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp
from torch.utils._python_dispatch import TorchDispatchMode

import sharding_rules
from mtl.ops.embedding import embedding
from mtl.precision import PRECISIONS
from mtl.sharding.collectives import all_gather
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.parallel import Parallel

COLUMNS = 8


class Sent(TorchDispatchMode):
    """Counts the elements that collectives give, by collective and whether they are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "_c10d_functional" in str(func) and "wait" not in str(func):
            self.elements[f"{func.__name__.partition('.')[0]} {str(out.dtype).removeprefix('torch.')}"] += out.numel()
        return out


def looked_up(table: str, mesh: dict[str, int], vocab: int, tokens: int, precision: str = "fp64", repeated: bool = False) -> dict[str, Any]:
    """Give the errors of the rows and of the table's gradient, its largest element, and what was sent; ``tokens`` lie on each device."""
    rules, shape, policy = sharding_rules.load(table), MeshShape(**mesh), PRECISIONS[precision]
    seqs = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), tokens * shape.devices())
    par = Parallel(make_mesh(shape, "cpu"), rules, {"vocab": vocab, "embed": COLUMNS, "batch": shape.devices(), **seqs}, policy.reduce)
    rng = torch.Generator().manual_seed(1)
    whole = torch.randn(vocab, COLUMNS, generator=rng, dtype=torch.float64).to(policy.param)
    devices, me = par.mesh.shape.devices(), par.mesh.index(par.mesh.shape.active())
    everyones = torch.randint(0, vocab, (devices, 1, tokens), generator=rng) if not repeated else torch.full((devices, 1, tokens), 3)
    grads = torch.ones(devices, 1, tokens, COLUMNS, dtype=policy.compute)
    grads = grads if repeated else torch.randn(grads.shape, generator=rng, dtype=torch.float64).to(policy.compute)
    axes = par.layout("VD", "store" if rules.gather == "layer" else "compute").dims[1]
    share = COLUMNS // par.mesh.size(axes)
    mine = whole.narrow(1, share * par.mesh.index(axes), share)
    with Sent() as sent:
        out, back = vjp(lambda t: embedding(par, everyones[me], t, policy.compute), mine)
        (grad,) = back(grads[me])
    copies = tuple(axis for axis in par.mesh.shape.active() if axis not in axes)
    grad = all_gather(grad.unsqueeze(0), copies, par.mesh).sum(0) if copies else grad
    want = torch.zeros(whole.shape, dtype=torch.float64).index_add_(0, everyones.flatten(), grads.double().flatten(0, 2))
    want = want.narrow(1, share * par.mesh.index(axes), share)

    def error(a: Tensor, b: Tensor) -> float:
        return (a.double() - b.double()).abs().max().item()

    errors = torch.tensor([error(out, F.embedding(everyones[me], whole.to(policy.compute))), error(grad, want)])
    errors = all_gather(errors.unsqueeze(0), par.mesh.shape.active(), par.mesh).amax(0)
    assert out.dtype == policy.compute and grad.dtype == policy.param
    return {"errors": errors.tolist(), "most": grad.max().item(), "sent": dict(sent.elements)}
