"""Overlap of communication with compute: a pass over the compiled graph that starts weight gathers ahead and collects sums behind.

Gather i starts where gather i - DISTANCE is waited for, so that it travels while the products before it run; the sum of gradients j is
waited for where sum j + DISTANCE starts. Nothing else moves, so at most DISTANCE extra weights and gradients are alive.
"""

import importlib
from typing import Any

import torch
from torch.fx import Graph, Node

DISTANCE = 2

_gather: Any = torch.ops._c10d_functional.all_gather_into_tensor.default  # pyright: ignore
_scatter: Any = torch.ops._c10d_functional.reduce_scatter_tensor.default  # pyright: ignore
_wait: Any = torch.ops._c10d_functional.wait_tensor.default  # pyright: ignore


def overlap(graph: Graph, distance: int = DISTANCE) -> None:
    """Move gathers of parameters ahead and waits for sums behind, in place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    gathers = [n for n in graph.nodes if n.target is _gather and _from_inputs(n)]
    waits = [_wait_of(n) for n in gathers]
    for wait in waits:
        if wait is not None and wait.users:
            min(wait.users, key=lambda user: order[user]).prepend(wait)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for i in range(distance, len(gathers)):
        anchor = waits[i - distance]
        if anchor is not None and order[anchor] < order[gathers[i]]:
            for node in sorted(_ancestry(gathers[i]), key=lambda n: order[n]):
                if order[node] > order[anchor]:
                    anchor.prepend(node)
    scatters = [n for n in graph.nodes if n.target is _scatter]
    for j, node in enumerate(scatters):
        wait, order = _wait_of(node), {n: i for i, n in enumerate(graph.nodes)}
        if wait is None or not wait.users:
            continue
        first = min(wait.users, key=lambda user: order[user])
        later = scatters[j + distance] if j + distance < len(scatters) else None
        target = later if later is not None and order[later] < order[first] else first
        if order[target] > order[wait]:
            target.prepend(wait)
    graph.lint()


def options() -> dict[str, Any]:
    """Give inductor's options that run the pass, and keep the order it chose."""
    base: Any = importlib.import_module("torch._inductor.custom_graph_pass").CustomGraphPass

    class Pass(base):
        """The pass, with a name for the compiler's cache."""

        def __call__(self, graph: Graph) -> None:
            overlap(graph)

        def uuid(self) -> str:
            return f"mtl.overlap.1.{DISTANCE}"

    return {"post_grad_custom_post_pass": Pass(), "reorder_for_peak_memory": False}


def _wait_of(node: Node) -> Node | None:
    return next((user for user in node.users if user.target is _wait), None)


def _ancestry(node: Node) -> set[Node]:
    found: set[Node] = set()
    left = [node]
    while left:
        n = left.pop()
        if n not in found and n.op != "placeholder":
            found.add(n)
            left += n.all_input_nodes
    return found


def _from_inputs(node: Node, limit: int = 12) -> bool:
    """Tell whether a gather needs no compute: few steps from the graph's inputs, none of them a product or a collective."""
    found = _ancestry(node) - {node}
    heavy = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default, _wait)
    return len(found) <= limit and not any(n.target in heavy for n in found)
