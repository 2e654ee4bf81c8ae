"""Named optimizers: short aliases of chains, or torch's fused kernel."""

from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.errors import UserError, unknown
from mtl.optim.transforms import Optimizer, add_decayed_weights, chain, descend, momentum, scale_by_adam

_fused_adamw_: Any = torch._fused_adamw_  # pyright: ignore


def adamw(
    decay_mask: tree.Tree, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.1, impl: str = "plain"
) -> Optimizer:
    """Adam with decoupled weight decay where ``decay_mask`` is true.

    impl is "plain" (compiled into one pass) or "fused" (torch's kernel).
    """
    if impl not in ("plain", "fused"):
        raise unknown("--optim.impl", impl, ("plain", "fused"))
    if impl == "fused":
        return _fused_adamw(decay_mask, b1, b2, eps, weight_decay)
    return descend(chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, decay_mask)))


def sgd(decay_mask: tree.Tree, decay: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> Optimizer:
    """Stochastic gradient descent with momentum; weight decay is added to the gradient, as torch.optim.SGD does."""
    return descend(chain(add_decayed_weights(weight_decay, decay_mask), momentum(decay, nesterov)))


def _fused_adamw(decay_mask: tree.Tree, b1: float, b2: float, eps: float, weight_decay: float) -> Optimizer:
    """Run torch's fused kernel in place. Its state is the plain one's, so a run may change impl when it resumes."""
    plain = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay, decay_mask))
    mask = tree.leaves(decay_mask)

    def update(grads: tree.Tree, state: Any, params: tree.Tree, rate: Tensor, good: Tensor) -> tuple[tree.Tree, Any]:
        moments, rest = state
        columns = [tree.leaves(t) for t in (params, grads, moments["mean"], moments["square"])]
        if columns[0][0].device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise UserError(f"--optim.impl fused has no kernel for {columns[0][0].device.type}: choose plain.")
        count = moments["count"] + good.to(moments["count"].dtype)
        lr = rate if rate.device.type == "cpu" else rate.to(torch.float32)  # what accelerators' kernels read
        for yes in (True, False):
            p, g, m, s = ([x for x, y in zip(c, mask, strict=True) if y is yes] for c in columns)
            if p:
                steps = [moments["count"] + 1.0 for _ in p]
                _fused_adamw_(
                    p, g, m, s, [], steps, lr=lr, beta1=b1, beta2=b2, weight_decay=weight_decay if yes else 0.0,
                    eps=eps, amsgrad=False, maximize=False, found_inf=1.0 - good.to(torch.float32),
                )  # fmt: skip
        return params, ({"mean": moments["mean"], "square": moments["square"], "count": count}, rest)

    return Optimizer(plain.init, update, compiles=False)
