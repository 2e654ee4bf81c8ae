"""Overlap of communication with compute: a pass over the compiled graph that starts weight gathers ahead and collects sums behind.

Gather i starts where gather i - DISTANCE is waited for, so that it travels while the products before it run; the sum of gradients j is
waited for where sum j + DISTANCE starts. Nothing else moves, so at most DISTANCE extra weights and gradients are alive.
"""

import importlib
from typing import Any

from torch.fx import Graph, Node

from mtl.runtime.rolled import roll

DISTANCE = 2

GATHERS = ("_c10d_functional.all_gather_into_tensor.default", "mtl_engine.gather.default")
SUMS = ("_c10d_functional.reduce_scatter_tensor.default", "_c10d_functional.all_to_all_single.default", "mtl_engine.send.default")
ENDS = ("_c10d_functional.wait_tensor.default", "mtl_engine.collect.default")
HEAVY = ("mm", "attention", "all_", "reduce_scatter", "wait_tensor", "mtl_engine")
"""Parts of names of operations that take time, or that wait."""


def overlap(graph: Graph, distance: int = DISTANCE) -> None:
    """Move gathers of parameters ahead and waits for sums behind, in place."""
    order = _order(graph)
    gathers = [n for n in graph.nodes if str(n.target) in GATHERS and _from_inputs(n)]
    waits = [_end_of(n) for n in gathers]
    for wait in waits:
        if wait is not None and wait.users:
            min(wait.users, key=lambda user: order[user]).prepend(wait)
    order = _order(graph)
    for i in range(distance, len(gathers)):
        anchor = waits[i - distance]
        if anchor is not None and order[anchor] < order[gathers[i]]:
            for node in sorted(_ancestry(gathers[i]), key=lambda n: order[n]):
                if order[node] > order[anchor]:
                    anchor.prepend(node)
    sums = [n for n in graph.nodes if str(n.target) in SUMS]
    for j, node in enumerate(sums):
        end = _end_of(node)
        if end is not None and end.users:
            _delay(end, sums[j + distance] if j + distance < len(sums) else next(iter(reversed(graph.nodes))), _order(graph))
    graph.lint()


def _delay(end: Node, later: Node, order: dict[Node, int]) -> None:
    """Move the end of a sum, and what is made of it before ``later``, to there; or, where that is work, to its first use."""
    moved = sorted((n for n in _descent(end, order[later], order)), key=lambda n: order[n])
    if later in moved or any(part in str(n.target) for n in moved[1:] for part in HEAVY):
        first = min(end.users, key=lambda user: order[user])
        if order[first] > order[end] + 1:
            first.prepend(end)
    elif order[later] > order[end]:
        for node in moved:
            later.prepend(node)


def options() -> dict[str, Any]:
    """Give inductor's options that run the pass, and keep the order it chose."""
    base: Any = importlib.import_module("torch._inductor.custom_graph_pass").CustomGraphPass

    class Pass(base):
        """The pass, with a name for the compiler's cache."""

        def __call__(self, graph: Graph) -> None:
            overlap(graph)
            roll(graph)

        def uuid(self) -> str:
            return f"mtl.overlap.3.{DISTANCE}"

    return {"post_grad_custom_post_pass": Pass(), "reorder_for_peak_memory": False}


def _order(graph: Graph) -> dict[Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _end_of(node: Node) -> Node | None:
    return next((user for user in node.users if str(user.target) in ENDS), None)


def _ancestry(node: Node) -> set[Node]:
    found: set[Node] = set()
    left = [node]
    while left:
        n = left.pop()
        if n not in found and n.op != "placeholder":
            found.add(n)
            left += n.all_input_nodes
    return found


def _descent(node: Node, limit: int, order: dict[Node, int]) -> set[Node]:
    """Give a node and what follows from it up to a place in the order, that place included."""
    found: set[Node] = set()
    left = [node]
    while left:
        n = left.pop()
        if n not in found and order[n] <= limit and n.op != "output":
            found.add(n)
            left += n.users
    return found


def _from_inputs(node: Node, limit: int = 40) -> bool:
    """Tell whether a gather needs no compute: few steps from the graph's inputs, none of them a product or a collective."""
    found = _ancestry(node) - {node}
    return len(found) <= limit and not any(part in str(n.target) for n in found for part in HEAVY)
