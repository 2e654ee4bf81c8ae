"""Products with a head and what lies between them, a tile of tokens at a time: logits turn into their gradient where they lie.

Left to the compiler, the same took three tiles of logits and two gradients of the head at once.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from mtl.precision import wide

_library: Any = torch.library.Library("mtl_head", "DEF")
_ANY = (torch.Tag.flexible_layout,)  # else the compiler casts the head anew for every tile
_library.define("head_logits(Tensor x, Tensor w, Tensor targets, int real, Tensor? after) -> (Tensor, Tensor, Tensor, Tensor)", tags=_ANY)
_library.define(
    "head_pull_(Tensor(a!) logits, Tensor(b!)? dw, Tensor(c!)? dx, Tensor x, Tensor w, Tensor targets, Tensor lse, Tensor share, "
    "Tensor hit, int real, int row) -> ()",
    tags=_ANY,
)


def head_logits(x: Tensor, w: Tensor, targets: Tensor, real: int, after: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give logits x @ w and of each row the largest, the sum of exp(logit - largest), and that of its target (0 where it is not here).

    Columns from ``real`` on are padding. Targets count from this device's first column. No compiler starts this
    before there is ``after``.
    """
    op: Any = torch.ops.mtl_head.head_logits
    return op(x, w, targets, real, after)


def head_pull_(
    logits: Tensor, dw: Tensor | None, dx: Tensor | None, x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, share: Tensor, hit: Tensor,
    real: int, row: int,
) -> None:  # fmt: skip
    """Turn logits, which are lost, into gradients: exp(logit - lse) x share, less ``hit`` at the target.

    That of x, a tile, is written to ``dx``, which has all tokens, from a ``row`` on. That of w is written to ``dw`` by the tile at row 0,
    and added to it by the others, in dw's type.
    """
    op: Any = torch.ops.mtl_head.head_pull_
    op(logits, dw, dx, x, w, targets, lse, share, hit, real, row)


def _head_logits(x: Tensor, w: Tensor, targets: Tensor, real: int, after: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = x @ w
    if logits.device.type == "cuda" and logits.dtype != torch.float64 and real > 0:
        return logits, *_triton().statistics(logits, targets, real)
    values = logits[:, : max(real, 0)].to(wide(logits.dtype))
    if real <= 0:  # padding alone
        none = torch.zeros(logits.shape[0], dtype=values.dtype, device=logits.device)
        return logits, none - float("inf"), none, none.clone()
    top = values.amax(-1)
    here = (targets >= 0) & (targets < real)
    picked = values.gather(-1, targets.clamp(0, real - 1).unsqueeze(-1)).squeeze(-1)
    return logits, top, (values - top.unsqueeze(-1)).exp().sum(-1), torch.where(here, picked, 0.0)


def _head_pull_(
    logits: Tensor, dw: Tensor | None, dx: Tensor | None, x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, share: Tensor, hit: Tensor,
    real: int, row: int,
) -> None:  # fmt: skip
    if logits.device.type == "cuda" and logits.dtype != torch.float64:
        _triton().to_gradient_(logits, targets, lse, share, hit, real)
    else:
        _to_gradient_(logits, targets, lse, share, hit, real)
    if dw is not None and dw.dtype == x.dtype:
        torch.addmm(dw, x.t(), logits, beta=1 if row else 0, out=dw)
    elif dw is not None and x.device.type == "cuda":  # 16-bit factors, summed and kept in float32: cuBLAS adds where the sum lies
        torch.ops.aten.addmm.dtype_out(dw, x.t(), logits, dw.dtype, beta=1 if row else 0, out=dw)  # pyright: ignore
    elif dw is not None:
        part = x.t().to(dw.dtype) @ logits.to(dw.dtype)
        dw.add_(part) if row else dw.copy_(part)
    if dx is not None:
        torch.mm(logits, w.t(), out=dx[row : row + x.shape[0]])


def _to_gradient_(logits: Tensor, targets: Tensor, lse: Tensor, share: Tensor, hit: Tensor, real: int) -> None:
    columns = torch.arange(logits.shape[1], device=logits.device)
    values = (logits.to(lse.dtype) - lse.unsqueeze(-1)).exp() * share.unsqueeze(-1)
    values = values - torch.where(columns == targets.unsqueeze(-1), hit.unsqueeze(-1), 0.0)
    logits.copy_(torch.where(columns < real, values, 0.0))


def _triton() -> Any:
    return importlib.import_module("mtl.kernels.logits_triton")


def _logits_shape(x: Tensor, w: Tensor, targets: Tensor, real: int, after: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, total, picked = (x.new_empty(x.shape[0], dtype=wide(x.dtype)) for _ in range(3))
    return x.new_empty(x.shape[0], w.shape[1]), top, total, picked


def _pull_shape(
    logits: Tensor, dw: Tensor | None, dx: Tensor | None, x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, share: Tensor, hit: Tensor,
    real: int, row: int,
) -> None:  # fmt: skip
    pass


for _name, _run, _shape in (("head_logits", _head_logits, _logits_shape), ("head_pull_", _head_pull_, _pull_shape)):
    for _key in ("CPU", "CUDA", "XPU", "MPS"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"mtl_head::{_name}", _shape, lib=_library)
