"""What a device's stages compute: the model's own embed, block and head, as traced pieces (training) or as they are (evaluation)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from mtl import tree
from mtl.pipeline.pieces import Compile, Piece, fake, trace

Batch = Mapping[str, Tensor]
SHARED = ("slots", "key")
"""What all micro-batches of a batch have in common."""


@dataclass(frozen=True)
class Form:
    """Shape and type of a tensor, and whether it takes a gradient: a leaf of trees."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = True


Kind = Any
"""What makes layers different functions: their configuration, and whether they are computed again."""


class Functions(NamedTuple):
    """A model as the pipeline needs it.

    ``embed(params, batch)`` gives x; ``block(kind)(p, x, stream)`` gives x, where ``kind(layer)`` says which layers are alike;
    ``head(params, x, batch)`` gives the loss and extras; ``beside(batch)`` gives the stream; ``layer_key(key, layer)`` a layer's own key.
    """

    embed: Callable[[Any, Batch], Tensor]
    kind: Callable[[int], Kind]
    block: Callable[[Kind], Callable[[Any, Tensor, Any], Tensor]]
    head: Callable[[Any, Tensor, Batch], Sequence[Tensor]]
    beside: Callable[[Batch], dict[str, Tensor]]
    layer_key: Callable[[Tensor, int], Tensor]


class Pieces(NamedTuple):
    """The traced functions."""

    embed: Piece
    blocks: Mapping[Kind, Piece]
    head: Piece


def micro_batch(batch: Batch, i: int) -> dict[str, Tensor]:
    """Take one micro-batch."""
    return {name: x if name in SHARED else x[i] for name, x in batch.items()}


def trace_pieces(
    functions: Functions, kinds: Iterable[Kind], layer: tree.Tree, outer: tree.Tree, batch: Batch, compile: Compile | None
) -> Pieces:
    """Trace a model's pieces, of its layers those of some kinds.

    ``layer`` and ``outer`` are trees of `Form`: of one layer's and of the other parameters, of which some may stay as they are.
    """
    mode = detect_fake_mode() or FakeTensorMode()
    device = batch["tokens"].device

    def faked(forms: tree.Tree) -> tree.Tree:
        return tree.map(lambda form: fake(mode, form.shape, form.dtype, device), forms)

    here = faked({name: Form(tuple(x.shape), x.dtype) for name, x in micro_batch(batch, 0).items()})
    around, inside = ([form.trained for form in tree.leaves(forms)] for forms in (outer, layer))
    embed = trace(lambda p, x, rest: [functions.embed(p, rest)], faked(outer), (), here, compile, around)
    x = fake(mode, *embed.shape, device)
    with mode:
        stream = functions.beside(here)
    blocks = {kind: _block(functions.block(kind), faked(layer), x, stream, compile, inside) for kind in kinds}
    head = trace(lambda p, x, rest: functions.head(p, x[0], rest), faked(outer), (x,), here, compile, around)
    return Pieces(embed, blocks, head)


def _block(function: Any, layer: tree.Tree, x: Tensor, stream: Any, compile: Compile | None, trained: Sequence[bool]) -> Piece:
    return trace(lambda p, x, rest: [function(p, x[0], rest)], layer, (x,), stream, compile, trained)


@dataclass(eq=False)
class Training:
    """One step's work of a device's stages. ``layers[s]`` are stage s's layers; ``params`` holds those of this device's stages alone.

    Gradients add up in ``grads``, a tree like ``params`` with None for those that ``trained`` says stay as they are; ``shares`` [A, 2]
    are the loss and its extra where the last stage is here.
    """

    functions: Functions
    pieces: Pieces
    layers: Sequence[Sequence[int]]
    own: Sequence[int]
    params: tree.Tree
    batch: Batch
    scale: Tensor
    reduce: torch.dtype
    trained: tree.Tree
    grads: tree.Tree = None
    _rows: dict[int, tuple[list[Any], list[Any]]] = field(default_factory=dict[int, tuple[list[Any], list[Any]]])

    def __post_init__(self) -> None:
        """Make room for the gradients."""

        def room(w: Tensor, trained: bool) -> Tensor | None:
            return torch.zeros_like(w, dtype=torch.promote_types(w.dtype, self.reduce)) if trained else None

        self.grads = tree.map(room, self.params, self.trained)
        self._outer, self._outer_grads = (tree.leaves({k: v for k, v in t.items() if k != "layers"}) for t in (self.params, self.grads))
        numbers = sorted(n for s in self.own for n in self.layers[s])
        nothing = [None] * len(numbers)
        stacked = [[nothing if x is None else x.unbind(0) for x in tree.leaves(t["layers"])] for t in (self.params, self.grads)]
        for row, layer in enumerate(numbers):
            self._rows[layer] = ([x[row] for x in stacked[0]], [x[row] for x in stacked[1]])
        self.shares = torch.zeros(self.batch["tokens"].shape[0], 2, dtype=self.scale.dtype, device=self.scale.device)

    def forward(self, stage: int, micro: int, x: Tensor | None) -> tuple[Tensor | None, Any]:
        """Run a stage's layers, with the embedding before the first and the head after the last."""
        batch, saved = micro_batch(self.batch, micro), list[Any]()
        stream = self.functions.beside(batch)
        if x is None:
            (x,), kept = self.pieces.embed.run_forward([*self._outer, *tree.leaves(batch)])
            saved.append((self.pieces.embed, kept, self._outer_grads))
        for layer in self.layers[stage]:
            piece = self.pieces.blocks[self.functions.kind(layer)]
            extra = {"key": self.functions.layer_key(stream["key"], layer)} if "key" in stream else {}
            weights, grads = self._rows[layer]
            (x,), kept = piece.run_forward([*weights, x, *tree.leaves({**stream, **extra})])
            saved.append((piece, kept, grads))
        if stage + 1 < len(self.layers):
            return x, saved
        (loss, *extras), kept = self.pieces.head.run_forward([*self._outer, x, *tree.leaves(batch)])
        saved.append((self.pieces.head, kept, self._outer_grads))
        self.shares[micro] = torch.stack([loss, *extras]).to(self.shares.dtype)
        return None, saved

    def backward(self, saved: Any, grad: Tensor | None) -> Tensor | None:
        """Go back through what forward saved, letting go of it on the way."""
        while saved:
            piece, kept, totals = saved.pop()
            grad, grads = piece.run_backward(kept, self._tangent(piece, grad))
            _add(totals, grads)
        return grad

    def inputs(self, saved: Any, grad: Tensor | None) -> tuple[Tensor | None, Any]:
        """Go back for the gradient of the input alone."""
        left: list[Any] = []
        while saved:
            piece, kept, totals = saved.pop()
            grad, kept = piece.run_inputs(kept, self._tangent(piece, grad))
            left.append((piece, kept, totals))
        return grad, left

    def weights(self, saved: Any) -> None:
        """Add up the gradients of the weights that `inputs` left."""
        saved.reverse()
        while saved:
            piece, kept, totals = saved.pop()
            _add(totals, piece.run_weights(kept))

    def _tangent(self, piece: Piece, grad: Tensor | None) -> Tensor:
        return self.scale.to(piece.shape[1]) if grad is None else grad


def _add(totals: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    for total, grad in zip(totals, grads, strict=True):
        if total is not None and grad is not None:
            total.add_(grad)


@dataclass(eq=False)
class Forward:
    """Forwards alone, without anything saved. ``finish(params, x, batch)`` takes what the last stage gives; ``found`` collects it."""

    functions: Functions
    layers: Sequence[Sequence[int]]
    own: Sequence[int]
    params: tree.Tree
    batch: Batch
    finish: Callable[[Any, Tensor, Batch], Tensor]
    found: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __post_init__(self) -> None:
        """Find each layer's row."""
        leaves, structure = tree.flatten(self.params["layers"])
        numbers = sorted(n for s in self.own for n in self.layers[s])
        self._layers = {n: tree.unflatten(structure, [x[row] for x in leaves]) for row, n in enumerate(numbers)}

    def forward(self, stage: int, micro: int, x: Tensor | None) -> tuple[Tensor | None, Any]:
        """Run a stage's layers."""
        batch = micro_batch(self.batch, micro)
        stream = self.functions.beside(batch)
        x = self.functions.embed(self.params, batch) if x is None else x
        for layer in self.layers[stage]:
            extra = {"key": self.functions.layer_key(stream["key"], layer)} if "key" in stream else {}
            x = self.functions.block(self.functions.kind(layer))(self._layers[layer], x, {**stream, **extra})
        if stage + 1 < len(self.layers):
            return x, None
        self.found[micro] = self.finish(self.params, x, batch)
        return None, None

    def backward(self, saved: Any, grad: Tensor | None) -> Tensor | None:
        """Refuse."""
        raise RuntimeError("an evaluation goes forward alone: its table has no backward")

    def inputs(self, saved: Any, grad: Tensor | None) -> tuple[Tensor | None, Any]:
        """Refuse."""
        raise RuntimeError("an evaluation goes forward alone: its table has no backward")

    def weights(self, saved: Any) -> None:
        """Refuse."""
        raise RuntimeError("an evaluation goes forward alone: its table has no backward")
