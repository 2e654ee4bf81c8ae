"""Held-out loss, and logits of whole sequences."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mtl import tree
from mtl.ops.linear import gather_step
from mtl.ops.scales import weight_scales
from mtl.precision import Precision
from mtl.runtime.compile import compiled
from mtl.sharding.collectives import psum
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.loss import Batch, Model, Remat, make_fold, make_loss


def make_evaluate(
    model: Model, config: Any, par: Parallel, precision: Precision, backend: Any = None
) -> Callable[[Any, Iterable[Batch]], float]:
    """Make ``evaluate(params, batches)``: the mean cross-entropy a token, in nats, over whole batches of shape [A, b, S]."""
    config = model.for_evaluation(config)
    loss = make_loss(model, config, par, precision, Remat("none"))

    def share(params: Any, batch: Batch) -> Tensor:
        entropy = loss(params, batch)[1]
        count = batch["weights"].sum() / par.copies("BS")
        return psum(torch.stack([entropy, count.to(entropy.dtype)]), par.mesh.shape.active(), par.mesh)

    run = share if backend is None else compiled(share, backend)

    def evaluate(params: Any, batches: Iterable[Batch]) -> float:
        with torch.no_grad():
            local = in_use(model, config, par, precision, params)
            local = tree.join(weight_scales(par, model.projections(config), local["layers"], precision.compute), local)
            sums = [run(local, _micro(batch, i)) for batch in batches for i in range(batch["tokens"].shape[0])]
        entropy, count = torch.stack(sums).sum(0).tolist()
        return entropy / count

    return evaluate


def make_logits(model: Model, config: Any, par: Parallel, precision: Precision) -> Callable[[Any, Batch], Tensor]:
    """Make ``logits(params, batch)`` for this device's rows of a micro-batch [b, S]: (b, local S, vocab), from params at rest."""
    config = model.for_evaluation(config)
    fold = make_fold(model, config, par, precision, Remat("none"))

    def logits(params: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            local = in_use(model, config, par, precision, params)
            return model.logits(config, par, local, fold(local, batch))

    return logits


def in_use(model: Model, config: Any, par: Parallel, precision: Precision, params: Any) -> Any:
    """Take local parameters from DTensors, gathered where the rules gather once a step."""
    local = tree.map(to_local, params)
    if par.rules.gather != "step":
        return local
    return tree.map(lambda s, p: gather_step(par, s.axes, p, precision.compute), model.specs(config), local)


def _micro(batch: Batch, i: int) -> Batch:
    quiet = {k: v if k == "slots" else v[i] for k, v in batch.items()}
    return quiet | {"key": torch.zeros((), dtype=torch.int64, device=batch["tokens"].device)}
