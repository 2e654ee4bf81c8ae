"""Pieces of a stage, taken apart: a forward, and a backward whose gradients of inputs and of weights may run at different times.

A piece is traced once, through autograd, on shapes alone. What it computes before the gradient comes is its forward; the rest is its
backward, in two parts: what the gradient of its input needs, and what is left for the gradients of its weights. So nothing is computed
twice, and nothing again unless a remat inside asks for it. All that one part hands to the next is an explicit list of tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mtl import tree

_aten: Any = torch.ops.aten
_VIEWS = tuple(
    getattr(_aten, name)
    for name in (
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "alias",
        "detach",
        "slice",
        "select",
    )
)
"""Operations that cost nothing: backward does them again instead of being handed their results."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Part:
    """A function of some values of a trace, by number, that gives others."""

    takes: tuple[int, ...]
    gives: tuple[int, ...]
    run: Callable[..., Any]

    def __call__(self, values: dict[int, Tensor], keep: Sequence[int] = ()) -> dict[int, Tensor]:
        """Compute; give the results and those of the values that are to be kept."""
        out = dict(zip(self.gives, self.run(*(values[i] for i in self.takes)), strict=True)) if self.gives else {}
        return out | {i: values[i] for i in keep if i in values}


@dataclass(frozen=True)
class Piece:
    """One traced function of (params, x, rest): ``results`` are numbers of its output and extras, ``grads`` of its parameters' gradients.

    ``grads`` has None for parameters that the function does not use, or that take none; ``grad_x`` is None where it takes no x.
    """

    forward: Part
    backward: Part
    inputs: Part
    weights: Part
    results: tuple[int, ...]
    tangent: int
    grads: tuple[int | None, ...]
    grad_x: int | None
    shape: tuple[tuple[int, ...], torch.dtype]
    graphs: tuple[GraphModule, ...]

    @property
    def used(self) -> list[bool]:
        """Say which parameters the function uses."""
        taken = {*self.forward.takes, *self.backward.takes}
        return [i in taken for i in range(len(self.grads))]

    def run_forward(self, leaves: Sequence[Tensor]) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Give the results, and what backward needs."""
        values = dict(enumerate(leaves))
        values |= self.forward(values)
        return [values[i] for i in self.results], {i: values[i] for i in self.backward.takes if i != self.tangent}

    def run_backward(self, saved: dict[int, Tensor], grad: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Give the gradients of x and of the parameters."""
        found = self.backward(saved | {self.tangent: grad})
        return self._grad_x(found), self._grads(found)

    def run_inputs(self, saved: dict[int, Tensor], grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Give the gradient of x, and what the parameters' gradients need."""
        found = self.inputs(saved | {self.tangent: grad}, keep=self.weights.takes)
        return self._grad_x(found), {i: found[i] for i in self.weights.takes}

    def run_weights(self, saved: dict[int, Tensor]) -> list[Tensor | None]:
        """Give the parameters' gradients."""
        return self._grads(self.weights(saved))

    def _grad_x(self, found: dict[int, Tensor]) -> Tensor | None:
        return None if self.grad_x is None else found[self.grad_x]

    def _grads(self, found: dict[int, Tensor]) -> list[Tensor | None]:
        return [None if i is None else found[i] for i in self.grads]


def trace(
    fn: Callable[..., Sequence[Tensor]],
    params: tree.Tree,
    x: tuple[Tensor, ...],
    rest: tree.Tree,
    compile: Compile | None,
    trained: Sequence[bool] | None = None,
) -> Piece:
    """Trace ``fn(params, x, rest)``, which gives an output to differentiate, and extras. All are fake tensors; ``x`` is () or (x,).

    ``trained`` says which leaves of params take a gradient: by default all.
    """
    leaves, structure = tree.flatten((params, x, rest))
    count = len(tree.leaves(params)) + len(x)
    takes = [*(trained or [True] * (count - len(x))), *(True for _ in x)]

    def joint(*flat: Tensor) -> list[Any]:
        with torch.enable_grad():
            given = [t.detach().requires_grad_(need) for t, need in zip(flat[:count], takes, strict=True)]
            out, *extras = fn(*tree.unflatten(structure, [*given, *flat[count:]]))
            results = [t.detach() for t in (out, *extras)]
            grad = torch.empty_like(out)  # stands for the gradient that will come: forward ends here
            wanted = [t for t, need in zip(given, takes, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True) if wanted else ())
        return [*results, grad, *(next(found) if need else None for need in takes)]

    with torch.no_grad():
        traced = make_fx(joint, tracing_mode="fake")(*leaves)
    results, grad, grads = _outputs(traced, count)
    return _take_apart(traced, results, grad, grads, len(x), compile)


def fake(mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor without memory for a trace."""
    with mode:
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def _outputs(traced: GraphModule, count: int) -> tuple[list[Node], Node, list[Node | None]]:
    out: list[Any] = list(next(n for n in traced.graph.nodes if n.op == "output").args[0])
    results, grad, grads = out[: len(out) - count - 1], out[len(out) - count - 1], out[len(out) - count :]
    return results, grad, grads


def _take_apart(
    traced: GraphModule, results: list[Node], grad: Node, grads: list[Node | None], has_x: int, compile: Compile | None
) -> Piece:
    order = {node: i for i, node in enumerate(traced.graph.nodes)}  # placeholders come first: their numbers are the leaves'
    writers = _writers(order, grad)
    whole = [g for g in grads if g is not None]
    grad_x = grads[-1] if has_x else None
    late = {n for n in order if order[n] > order[grad]}
    behind = _ancestors(whole, late, writers)
    first = _ancestors([grad_x], late, writers) if grad_x is not None else set[Node]()
    second = behind - first

    def part(nodes: set[Node], wanted: list[Node]) -> Part:
        """Build the function of some nodes; views of what it is given are made again in it."""
        body, takes = set(nodes), set[Node]()
        left = [i for n in nodes for i in n.all_input_nodes] + [n for n in wanted if n not in nodes]
        while left:
            node = left.pop()
            if node in body or node in takes:
                continue
            again = node.op == "get_attr" or _is_view(node)
            if again and node not in late:
                body.add(node)
                left += node.all_input_nodes
            else:
                takes.add(node)
        return _extract(traced, sorted(body, key=lambda n: order[n]), sorted(takes, key=lambda n: order[n]), wanted, order, compile)

    needs = part(behind, whole)  # decides what forward hands over
    early = {n for n in order if order[n] < order[grad] and n.op not in ("placeholder", "output")}
    saved = [n for n in order if order[n] in needs.takes and n is not grad and n.op != "placeholder"]
    outs = list(dict.fromkeys([*results, *saved]))
    forward = _extract_forward(traced, _ancestors(outs, early, writers), outs, order, compile)
    rest = [g for g in whole if g is not grad_x]
    weights = part(second, list(dict.fromkeys(rest)))
    carried = [n for n in first if order[n] in weights.takes]
    inputs = part(first, list(dict.fromkeys([*([grad_x] if grad_x is not None else []), *carried])))
    numbers = [None if g is None else order[g] for g in grads]
    value = results[0].meta["val"]
    return Piece(
        forward, needs, inputs, weights, tuple(order[n] for n in results), order[grad], tuple(numbers[: len(grads) - has_x]),
        numbers[-1] if has_x else None, (tuple(value.shape), value.dtype), (traced,),
    )  # fmt: skip


def _extract_forward(traced: GraphModule, body: set[Node], outs: list[Node], order: dict[Node, int], compile: Compile | None) -> Part:
    takes = sorted({i for n in body for i in n.all_input_nodes if i.op == "placeholder"}, key=lambda n: order[n])
    return _extract(traced, sorted(body, key=lambda n: order[n]), takes, outs, order, compile)


def _ancestors(nodes: Sequence[Node], inside: set[Node], writers: Mapping[Node, list[Node]]) -> set[Node]:
    found: set[Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node in inside and node not in found:
            found.add(node)
            left += [*node.all_input_nodes, *writers.get(node, ())]
    return found


def _writers(order: Mapping[Node, int], grad: Node) -> dict[Node, list[Node]]:
    """List, by tensor, the operations that write into it: whoever needs it needs them too. It must be made and written in the same half."""
    found: dict[Node, list[Node]] = {}
    for node in order:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or not getattr(schema, "is_mutable", False):
            continue
        for place, argument in enumerate(cast("Any", schema).arguments):
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write or not isinstance(value, Node):
                continue
            while _is_view(value):
                value = value.all_input_nodes[0]
            if value.op == "placeholder" or (order[value] < order[grad]) != (order[node] < order[grad]):
                raise ValueError(f"{node.target} writes into {value}, which is not its own: a pipeline's stage must be a pure function")
            found.setdefault(value, []).append(node)
    return found


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in _VIEWS


def _extract(
    traced: GraphModule, body: list[Node], takes: list[Node], gives: list[Node], order: dict[Node, int], compile: Compile | None
) -> Part:
    """Copy part of a trace into a function of its own."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in takes:
        copies[node] = graph.placeholder(f"v{order[node]}")
    for node in body:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    own = [n for n in gives if n in copies]
    graph.output(tuple(copies[n] for n in own))
    module = GraphModule(traced, graph)
    run: Callable[..., Any] = module
    if compile is not None and any(n.op == "call_function" for n in body):

        def piece(*values: Tensor) -> Any:
            return module(*values)

        run = compile(piece)
    return Part(tuple(order[n] for n in takes), tuple(order[n] for n in own), run)
