"""The only call of torch.compile."""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from mtl import tree
from mtl.runtime import overlap, remembered, stored
from mtl.runtime.fingerprint import fingerprint

_dynamo: Any = torch._dynamo  # pyright: ignore[reportPrivateUsage]
_functorch_config: Any = importlib.import_module("torch._functorch.config")


def compiled(
    fn: Callable[..., Any], backend: Any = "inductor", blockwise: bool = False, options: Any = None, like: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Compile a function from trees of tensors to trees of tensors into one graph.

    The function is put into the graph whole, so that AOTAutograd alone traces it: it may use any Python, but whatever is not a tensor
    argument counts as constant. A ``blockwise`` graph is differentiated by autograd: there AOTAutograd's search for common expressions is
    off, since it would merge a weight's gather in backward with the one in forward and so keep every gathered weight.
    ``like`` gives tensors of the same shapes and types sooner: Dynamo, which wants to know these alone, is given them. Then the function
    must write to none of its arguments: AOTAutograd, which wants to know of that first, is told so without a call.
    """
    if backend == "inductor":
        stored.teach_inductor()
        _name_operations_briefly()
    graphs: dict[str, tuple[Callable[..., Any], list[Any]]] = {}

    def call(*args: Any) -> Any:
        leaves, structure = tree.flatten(args)
        known = repr(structure)
        if known not in graphs:
            graphs[known] = _compile_flat(fn, structure, backend, options, like)
        run, shape_of_result = graphs[known]
        with _functorch_config.patch(cse=False) if blockwise else contextlib.nullcontext():
            out = run(*leaves)
        return tree.unflatten(shape_of_result[-1], out)

    return call


@functools.cache
def _name_operations_briefly() -> None:
    """Let inductor name an operation and the kinds of what it is given, where it would spell all that these were made from.

    torch 2.11 does so for a line of a log at the first sight of every library's operation, whether the line is written or not; where layers
    are pieces the text doubles with each, so that the first operation of backward alone took forever.
    """
    issue: Any = importlib.import_module("torch._inductor.exc").OperatorIssue

    def brief(target: Any, args: Any, kwargs: Any) -> str:
        return f"  {target}({', '.join(type(x).__name__ for x in (*args, *kwargs.values()))})"

    issue.operator_str = staticmethod(brief)


def inductor_options(backend: Any, device_type: str, in_pieces: bool) -> dict[str, Any] | None:
    """Give inductor's options for a step: roundings and order as written; on GPUs, ``in_pieces``, overlap and layers as pieces.

    Left to itself inductor moves every operation to its first reader ("for locality"), in graphs that autograd does not differentiate, as
    these. So the products for weights' gradients went to the end of the step, and what is computed again to where the gradients met it;
    all they read lived until then: on an H200, GPT-2 with full recompute took 12.5 GiB, and takes 4.1.

    Left to itself inductor skips a rounding to bfloat16 between fused operations. Which ones fuse depends on the mesh (one device looks
    up embeddings in float32, a mesh gathers them in bfloat16), and on an H200 that alone moved the loss by 4 % within 20 steps.

    Left to itself inductor tries to fuse each kernel with the 64 next ones that read the same array, and all layers read the rotary angles:
    17 s of compiling 8B. What fuses stands near: with 8 the code it writes is the same. Nor is the code cut into parts for CUDA graphs.
    """
    if backend != "inductor":
        return None
    found = {
        "emulate_precision_casts": True,
        "reorder_for_locality": False,
        **(overlap.options() if in_pieces and device_type == "cuda" else {}),
    }
    return found | {"max_fusion_buffer_group_pairwise_attempts": 8, "graph_partition": False}


def update_options(backend: Any) -> dict[str, Any] | None:
    """Give inductor's options for the update of a state in place: its kernels are not tried out in several sizes.

    To try a kernel that writes into its inputs, inductor copies these to pinned memory of the host and back, again and again: 24 bytes a
    parameter, which took 20 s of a first step, for kernels that are bound by memory in any size.
    """
    return {"triton.autotune_pointwise": False} if backend == "inductor" else None


def _compile_flat(
    fn: Callable[..., Any], structure: Any, backend: Any, options: Any, like: Callable[..., Any] | None
) -> tuple[Callable[..., Any], list[Any]]:
    result: list[Any] = []
    key = fingerprint((fn, repr(structure))) if backend == "inductor" else None
    told: list[tuple[list[remembered.Meta], remembered.Result]] = []

    def known(leaves: Any) -> remembered.Result | None:
        given = remembered.metas(leaves)
        found = next((found for asked_for, found in told if asked_for == given), None)
        return found if found is not None or key is None else remembered.recall(key, leaves)

    def whole(*leaves: Any) -> tuple[Any, ...]:
        asked = "no" if key is None and like is None else remembered.asks_for_shapes(leaves)
        found = known(leaves) if asked != "no" else None
        if found is not None and (asked == "shapes" or found.pure):
            result[:] = [found.structure]
            return found.make()
        before = remembered.versions(leaves) if asked == "shapes" else []
        with remembered.Writes(leaves) if asked == "shapes" and like is None else contextlib.nullcontext() as writes:
            made = (like if like is not None and asked == "shapes" else fn)(*tree.unflatten(structure, leaves))
        out, shape_of_result = tree.flatten(made)
        result[:] = [shape_of_result]
        if asked == "shapes" and all(isinstance(x, torch.Tensor) for x in out):
            pure = remembered.is_pure(before, leaves, out) and not (writes and writes.seen)
            found = remembered.Result(remembered.metas(out), shape_of_result, pure)
            if like is not None:
                told.append((remembered.metas(leaves), found))
            if key is not None:
                remembered.remember(key, leaves, found)
        return tuple(out)

    if key is not None:
        options = {**(options or {}), **_known_to_cache(whole, key)}
    own = _dynamo.allow_in_graph(whole)

    def run(*leaves: Any) -> Any:
        return own(*leaves)

    # Dynamo keeps its graphs with the code object and does not tell closures apart: every function gets a code object of its own.
    code = run.__code__.replace(co_name=f"run_{getattr(fn, '__name__', 'function')}")
    run = types.FunctionType(code, run.__globals__, closure=run.__closure__)
    return torch.compile(run, backend=backend, fullgraph=True, dynamic=False, options=options), result


def _known_to_cache(fn: Callable[..., Any], key: str) -> dict[str, Any]:
    """Let AOTAutograd's cache keep what a function is traced to, so that the next start need not trace it: gives the option that does it.

    The cache's key has the function's name alone, so the name tells what it computes; and the name must be one that can be imported.
    """
    fn.__module__, fn.__name__, fn.__qualname__ = __name__, f"graph_{key}", f"graph_{key}"
    setattr(sys.modules[__name__], fn.__name__, fn)
    return {"unsafe_marked_cacheable_functions": {f"{__name__}.{fn.__name__}": key}}
