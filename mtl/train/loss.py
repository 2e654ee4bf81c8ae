"""From a model's four functions to one loss: the layers folded, rematerialised and, if asked, compiled block by block."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from mtl import tree
from mtl.errors import UserError
from mtl.ops.remat import remat
from mtl.precision import Precision
from mtl.runtime.compile import compiled
from mtl.sharding.parallel import Parallel

Batch = Mapping[str, Tensor]
Loss = Callable[[tree.Tree, Batch], tuple[Tensor, Tensor]]


class Model(Protocol):
    """What a model module offers: pure functions of (config, parallel, parameters, activations)."""

    specs: Any
    sizes: Any
    embed: Any
    beside: Any
    at_layer: Any
    projections: Any
    block: Any
    head: Any
    logits: Any
    layer_key: Any
    for_evaluation: Any


@dataclass(frozen=True)
class Remat:
    """What is computed again in backward: nothing, layers' insides (selective), MLPs (mlp), all but attention (dense), layers (full).

    Of mlp and full it is every n-th layer. With gather, what products gather of the sequence is gathered again; with selective too.
    With ``away`` the inputs of layers that are computed again wait in host memory, but for the last one's, which is needed at once.
    """

    kind: str
    every: int = 1
    away: bool = False


def parse_remat(text: str, away: bool = False) -> Remat:
    """Read none, gather, selective, mlp, mlp:N, dense, full or every:N; ``away`` brings what layers keep to the host."""
    kind, _, number = text.partition(":")
    if away and (text in ("none", "gather", "selective", "dense") or kind == "mlp"):
        raise UserError(
            f"--offload activations brings to the host what layers computed again in backward keep, their inputs, but --remat is {text!r}, "
            "which computes no whole layer again. Take --remat full or every:N."
        )
    if text in ("none", "gather", "selective", "mlp", "dense", "full"):
        return Remat(text, away=away)
    if kind in ("mlp", "every") and number.isdecimal() and int(number) > 0:
        return Remat("mlp" if kind == "mlp" else "full", int(number), away)
    raise UserError(
        f"--remat is {text!r}: expected none, gather, selective, mlp, mlp:N (the MLP of each N-th layer, N at least 1), dense (all but "
        "attention), full or every:N (each N-th layer in full)."
    )


def make_blocks(model: Model, layer: Any, par: Parallel, again: Remat) -> tuple[Any, Any, Any]:
    """Make the block of a layer's configuration, and as ``again`` says the one that is computed again, and that for the last layer."""
    par = replace(par, parts=again.kind in ("gather", "selective"))

    def plain(p: Any, x: Tensor, stream: Any) -> Tensor:
        return model.block(layer, par, p, x, stream)

    def inside(p: Any, x: Tensor, stream: Any) -> Tensor:
        return model.block(layer, par, p, x, stream, again=again.kind)

    def kept(p: Any, x: Tensor, stream: Any) -> Tensor:
        return model.block(layer, par.keeping(), p, x, stream)

    def but_attention(p: Any, x: Tensor, stream: Any, results: Any) -> Tensor:
        return model.block(layer, par.keeping(), p, x, stream, results=results)

    if again.kind != "full":
        dense = remat(but_attention, par.late, waits=1, keeps=True)
        chosen = {"selective": inside, "mlp": inside, "dense": dense}.get(again.kind, plain)
        return plain, chosen, chosen
    return plain, remat(kept, par.late, 1 if again.away else None, waits=1), remat(kept, par.late, waits=1)


def make_fold(model: Model, config: Any, par: Parallel, precision: Precision, again: Remat, backend: Any = None) -> Any:
    """Make ``fold(params, batch)``, the residual stream after the last layer. With ``backend``, each block is compiled (once for all).

    Layers are stacked tensors, or a list of each one's.
    """
    if par.mesh.shape.pipe > 1:
        raise ValueError("layers lie on a pipeline: mtl.train.pipelined makes steps and evaluations for it")

    inner = replace(par, late=backend is not None)

    def runner(layer: Any, which: int) -> Any:
        block = make_blocks(model, layer, inner, again)[which]
        return block if backend is None else compiled(block, backend, blockwise=True)

    known: dict[Any, Any] = {}  # equal layers share one block, which is compiled once

    def fold(params: Any, batch: Batch) -> Tensor:
        x, stream = model.embed(config, par, params, batch, precision.compute)
        layers: Any = params["layers"]
        layers = layers if isinstance(layers, list) else tree.unstack(layers)
        for i, p in enumerate(layers):
            which = 0 if i % again.every else 2 if again.away and i == len(layers) - 1 else 1
            kind = model.at_layer(config, i), which
            if kind not in known:
                known[kind] = runner(*kind)
            extra = {"key": model.layer_key(stream["key"], i)} if "key" in stream else {}
            x = known[kind](p, x, stream | extra)
        return x

    return fold


def make_loss(model: Model, config: Any, par: Parallel, precision: Precision, again: Remat, backend: Any = None) -> Loss:
    """Make ``loss(params, batch)``: this device's share of (loss, cross-entropy), summed over its target tokens.

    A batch may hold ``frozen`` parameters, which the model has beside ``params`` and which take no gradient, and ``scales`` of weights.
    """
    fold = make_fold(model, config, par, precision, again, backend)

    def loss(params: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        params = tree.join(tree.join(batch.get("frozen"), batch.get("scales")), params)
        return model.head(config, par, params, fold(params, batch), batch)

    return loss
