"""What a graph repeats, a layer's forward or its backward, becomes one piece that is compiled once and called for every layer.

Inductor spends the same seconds on every node, and 32 layers are 32 times the same nodes. A piece is cut where nothing that would be one
kernel is cut through: behind a product. Only what lies in memory anyway passes from piece to piece; what is made of that element by
element is made again where it is read, as inductor does within a graph. So pieces have the kernels that the whole graph would have.
"""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

LEAST = 4
"""Fewer repetitions than this are not worth a piece."""

PRODUCTS = ("mm", "attention")
"""Parts of names of operations that no kernel of the compiler's own reaches over."""

VIEWS = ("reshape", "view", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "transpose", "t")
MADE = (
    "aten.full.default",
    "aten.scalar_tensor.default",
    "prims.iota.default",
    "prims.convert_element_type.default",
    "aten._to_copy.default",
)
"""Operations that are made again where they are read, beside those that go element by element."""


class Known(NamedTuple):
    """What is asked of nodes again and again: equal marks for nodes that compute the same, and what a kernel makes again."""

    marks: dict[Node, int]
    light: set[Node]


class Piece(NamedTuple):
    """One repetition: its own nodes, what it computes (those, and made again before they are read, others), and what it takes and gives."""

    own: Sequence[Node]
    body: list[Node]
    takes: list[Node]
    gives: list[int]
    """Places in ``own``."""
    wiring: tuple[Any, ...]
    """What each node of the body is and reads: equal in pieces that compute the same."""


def roll(graph: Graph, least: int = LEAST) -> list[int]:
    """Replace repetitions by calls of one piece, in place; give how often each piece is called."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    spelled: dict[str, int] = {}
    known = Known({n: spelled.setdefault(_mark(n), len(spelled)) for n in calls}, {n for n in calls if _is_light(n)})
    groups = [found for run in _repeats([known.marks[n] for n in calls], least) if (found := _cut(calls, run, least, known))]
    groups.sort(key=lambda group: calls.index(group[0].own[0]))
    given: dict[Node, Node] = {}
    for i, group in enumerate(groups):
        _call(graph, f"mtl_piece_{i}", group, given)
    _connect(graph, {n for group in groups for piece in group for n in piece.own}, given)
    graph.lint()
    return [len(group) for group in groups]


def _repeats(marks: list[int], least: int) -> Iterator[tuple[int, int, int]]:
    """Find stretches in which every node is like the one a period later: start, length and period; those that save most come first."""
    gaps: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i, mark in enumerate(marks):
        gaps[i - last.get(mark, i)] += 1
        last[mark] = i
    runs: list[tuple[int, int, int]] = []
    for gap, _ in gaps.most_common(24):
        start = 0
        for i in range(len(marks) - gap + 1) if gap else ():
            if i == len(marks) - gap or marks[i] != marks[i + gap]:
                if i - start >= (least - 1) * gap:
                    runs.append((start, i - start + gap, gap))
                start = i + 1
    free = [True] * len(marks)
    for start, length, gap in sorted(runs, key=lambda run: run[2] - run[1]):
        if all(free[start : start + length]):
            free[start : start + length] = [False] * length
            yield start, length, gap


def _cut(calls: Sequence[Node], run: tuple[int, int, int], least: int, known: Known) -> list[Piece] | None:
    """Cut a stretch into equal pieces, behind the product where least passes from one to the next; None where that is not possible."""
    start, length, gap = run
    stretch = calls[start : start + length]
    if not any(_is_product(n) for n in stretch[:gap]) or not all(_is_pure(n) for n in stretch[:gap]):
        return None
    best: tuple[tuple[int, int], int] | None = None
    for begin in (i + 1 for i in range(gap) if _is_product(stretch[i])):
        middle = begin + (length - begin) // gap // 2 * gap
        piece = _piece(stretch[middle : middle + gap], known) if middle + gap <= length else None
        if piece is not None and (best is None or _cost(piece) < best[0]):
            best = _cost(piece), begin
    if best is None:
        return None
    pieces = [_piece(stretch[i : i + gap], known) for i in range(best[1], length - gap + 1, gap)]
    equal: list[Piece] = []
    for piece in pieces:
        if len(equal) < least and (piece is None or not equal or piece.wiring != equal[0].wiring):
            equal = []
        if piece is not None and (not equal or piece.wiring == equal[0].wiring):
            equal.append(piece)
        elif len(equal) >= least:
            break
    gives = sorted({i for piece in equal for i in piece.gives})
    return [piece._replace(gives=gives) for piece in equal] if len(equal) >= least else None


def _piece(own: Sequence[Node], known: Known) -> Piece | None:
    """Describe a repetition; None where it cannot be a piece, since something but a tensor of its own would pass."""
    inside = set(own)
    place: dict[Node, int] = {}
    takes: dict[Node, int] = {}
    wiring: list[Any] = []

    def read(n: Node) -> tuple[str, int]:
        if n not in inside and n not in known.light:
            return "takes", takes.setdefault(n, len(takes))
        if n not in place:
            add(n)
        return "body", place[n]

    def add(n: Node) -> None:
        reads: list[tuple[str, int]] = []
        map_arg((n.args, n.kwargs), lambda x: reads.append(read(x)))
        place[n] = len(place)
        wiring.append((known.marks[n], tuple(reads)))

    for n in own:
        read(n)
        if len(place) > 2 * len(own):
            return None
    passes: set[Node] = set()
    for n in reversed(own):
        if any(user not in inside or (user in passes and user in known.light) for user in n.users):
            passes.add(n)
    gives = [i for i, n in enumerate(own) if n in passes and n not in known.light]
    alone = all(isinstance(n.meta.get("val"), Tensor) for n in takes) and all(_is_own(own[i]) for i in gives)
    return Piece(own, list(place), list(takes), gives, tuple(wiring)) if alone else None


def _cost(piece: Piece) -> tuple[int, int]:
    """Count what is computed again, and the bytes that pass."""
    own = set(piece.own)
    again = sum(n not in own and not _is_view(n) for n in piece.body)
    return again, sum(n.meta["val"].nbytes for n in piece.takes if n.op == "call_function")


def _call(graph: Graph, name: str, group: list[Piece], given: dict[Node, Node]) -> None:
    """Put calls of a group's one piece beside its repetitions, and note what they give."""
    first = group[0]
    whole: Any = graph.owning_module
    whole.add_submodule(name, _module(first))
    with graph.inserting_before(first.own[0]):
        module = graph.get_attr(name)
    for piece in group:
        with graph.inserting_before(piece.own[0]):
            takes = [given.get(n, n) for n in piece.takes]
            call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (module, name, *takes))
            call.meta["val"] = tuple(piece.own[i].meta["val"] for i in piece.gives)
            for place, i in enumerate(piece.gives):
                given[piece.own[i]] = graph.call_function(operator.getitem, (call, place))
                given[piece.own[i]].meta["val"] = piece.own[i].meta["val"]


def _module(piece: Piece) -> GraphModule:
    graph = Graph()
    new: dict[Node, Node] = {}
    for i, n in enumerate(piece.takes):
        new[n] = graph.placeholder(f"taken_{i}")
        new[n].meta["val"] = n.meta["val"]
    for n in piece.body:
        new[n] = graph.node_copy(n, lambda x: new[x])
    out = graph.output(tuple(new[piece.own[i]] for i in piece.gives))
    out.meta["user_visible_output_idxs"] = list(range(len(piece.gives)))  # else inductor would choose strides
    out.meta["original_output_strides"] = [piece.own[i].meta["val"].stride() for i in piece.gives]
    return GraphModule({}, graph)


def _connect(graph: Graph, gone: set[Node], given: dict[Node, Node]) -> None:
    """Let all other nodes read what the calls give, or make it again of that, and take the repetitions out."""
    again: dict[Node, Node] = {}
    for reader in [n for n in graph.nodes if n not in gone]:

        def read(n: Node, reader: Node = reader) -> Node:
            if n not in gone or n in given:
                return given.get(n, n)
            if n not in again:
                reads = [read(x) for x in n.all_input_nodes]
                new = dict(zip(n.all_input_nodes, reads, strict=True))
                with graph.inserting_before(reader):
                    again[n] = graph.node_copy(n, lambda x: new[x])
            return again[n]

        if any(n in gone for n in reader.all_input_nodes):
            reader.args, reader.kwargs = map_arg(reader.args, read), map_arg(reader.kwargs, read)
    for n in reversed(list(graph.nodes)):
        if n in gone:
            graph.erase_node(n)


def _mark(n: Node) -> str:
    """Spell what a node computes: operation, constants, and shapes, strides and types of what it reads and gives."""
    return f"{n.target} {map_arg((n.args, n.kwargs), _like)} {_like(n)}"


def _like(n: Node) -> Any:
    if n.op == "get_attr":
        return n.name
    val = n.meta.get("val")
    vals = val if isinstance(val, tuple | list) else [val]
    return "; ".join(f"{list(v.shape)} {v.stride()} {v.dtype} {v.device}" if isinstance(v, Tensor) else str(type(v)) for v in vals)


def _name(n: Node) -> str:
    return str(n.target).rsplit(".", 1)[0].removeprefix("aten.") if isinstance(n.target, OpOverload) else ""


def _is_product(n: Node) -> bool:
    return any(part in str(n.target) for part in PRODUCTS)


def _is_pure(n: Node) -> bool:
    return n.target is operator.getitem or (isinstance(n.target, OpOverload) and not n.target._schema.is_mutable)  # pyright: ignore[reportPrivateUsage]


def _is_view(n: Node) -> bool:
    if n.target is operator.getitem:
        return _is_view(n.all_input_nodes[0])
    return _name(n) in VIEWS


def _is_light(n: Node) -> bool:
    """Tell what a kernel makes again rather than reads from memory."""
    if n.op != "call_function":
        return False
    if _is_view(n):
        return True
    tags = n.target.tags if isinstance(n.target, OpOverload) else []
    made = str(n.target) in MADE or torch.Tag.pointwise in tags
    return made and torch.Tag.nondeterministic_seeded not in tags and not _is_written(n)


def _is_written(n: Node) -> bool:
    """Tell whether a product or a library's operation reads a value or the graph gives it, and it therefore lies in memory."""
    return any(user.op == "output" or _is_product(user) or _is_foreign(user) or (_is_view(user) and _is_written(user)) for user in n.users)


def _is_foreign(n: Node) -> bool:
    return isinstance(n.target, OpOverload) and n.target.namespace not in ("aten", "prims")


def _is_own(n: Node) -> bool:
    """Tell whether a node gives a tensor with memory of its own, that nobody writes to or sends from any more.

    Waiting for a tensor gives the one that is waited for. And what a collective that is under way sends would be forgotten with the piece.
    """
    return isinstance(n.meta.get("val"), Tensor) and not str(n.target).startswith("_c10d_functional.")
