"""Count what is in the captured graph of a step's gradient, and what a rank's memory holds."""

import collections
import math
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.fx import Interpreter
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import sharding_rules
from mtl import tree
from mtl.models import decoder
from mtl.params import init
from mtl.precision import PRECISIONS
from mtl.runtime.compile import inductor_options
from mtl.sharding.shard_map import to_local
from mtl.train.gradient import gather_weights, value_and_grad
from mtl.train.loss import make_loss, parse_remat
from tests.cases.train import batch, parallel
from tests.small import BATCH, MESHES, MODELS, SEQ

KINDS = {
    "all_gather": "all_gather_into_tensor",
    "reduce_scatter": "reduce_scatter_tensor",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all_single",
    "mm": "mm",
    "core": "_scaled_dot_product_flash_attention_for_cpu",
    "activation": "silu",
    "park": "park",
    "unpark": "unpark",
    "stored": "stored",
    **{name: name for name in ("heads_apart", "heads_join", "gather_product", "gather_rows", "product_send", "product_take")},
    "unbind": "unbind",
}


def counts(
    table: str, world: int, model: str = "llama", remat: str = "none", how: str = "step", pieces: int = 1, away: bool = False,
    **moved: Any,
) -> dict[str, Any]:  # fmt: skip
    """Count operations by kind over all graphs; ``moved`` says how `Parallel` has data moved."""
    config, rules, shape = MODELS[model], sharding_rules.load(table), MESHES[table][world]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    found: collections.Counter[str] = collections.Counter()
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        for node in graph.graph.nodes:
            found.update(kind for kind, op in KINDS.items() if _name(node) == op)
        return make_boxed_func(graph.forward)

    usual, decoder.MLP_BYTES = decoder.MLP_BYTES, 16 * BATCH // rows * SEQ * config.mlp // pieces
    run_gradient(table, world, model, remat, how, aot_autograd(fw_compiler=count), away, **moved)
    decoder.MLP_BYTES = usual
    return {**{kind: found[kind] for kind in KINDS}, "graphs": graphs}


def run_gradient(table: str, world: int, model: str, remat: str, how: str, backend: Any, away: bool = False, **moved: Any) -> None:
    """Compute one micro-batch's gradient; ``away`` brings inputs of layers to the host."""
    config, rules, shape, precision = MODELS[model], sharding_rules.load(table), MESHES[table][world], PRECISIONS["fp64"]
    rows = math.prod(getattr(shape, axis) for axis in rules.act["batch"])
    par = replace(parallel(config, rules, shape, BATCH // rows, precision), **moved)
    specs = decoder.specs(config)
    loss = make_loss(decoder, config, par, precision, parse_remat(remat, away), backend if how == "block" else None)
    params = tree.map(to_local, init(specs, rules, par.mesh, 0, precision.param))
    params = gather_weights(par, tree.map(lambda s: s.axes, specs), params, precision.compute)
    data = {k: v if k == "slots" else v[0] for k, v in batch(par, config, 0, BATCH // rows, False).items()}
    data["key"] = torch.tensor(1)
    value_and_grad(loss, how, backend)(params, data, torch.tensor(1.0, dtype=torch.float64))


def kept(table: str, world: int, how: str, remat: str, away: bool = False) -> int:
    """Measure the bytes that the head finds in memory and that backward reads: in eager mode all it finds."""
    found: list[int] = []
    usual = decoder.head

    def measured(*args: Any) -> Any:
        found.append(alive.bytes())
        return usual(*args)

    def run(graph: Any, _: Any) -> Any:
        def forward(*inputs: Any) -> Any:
            order = _Order(graph)
            out = order.run(*inputs)
            found.append(order.across("log", "_log_softmax", "logsumexp"))
            return out

        return make_boxed_func(forward)

    alive = _Alive()
    if how == "none":
        decoder.head = measured
        with alive:
            run_gradient(table, world, "llama", remat, how, None, away)
        decoder.head = usual
    else:
        run_gradient(table, world, "llama", remat, how, aot_autograd(fw_compiler=run), away)
    (total,) = found
    return total


def order_of_backward(table: str, world: int) -> list[str]:
    """List the products and the starts and ends of collectives in the captured graph, from the head on."""
    names: list[str] = []

    def note(graph: Any, _: Any) -> Any:
        kinds = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "sum", "mm": "mm"}
        for node in graph.graph.nodes:
            name = _name(node)
            if name == "wait_tensor":
                names.append({"gather": "gathered", "sum": "summed"}.get(kinds.get(_name(node.args[0]), ""), "other"))
            elif name in kinds:
                names.append(kinds[name])
        return make_boxed_func(graph.forward)

    run_gradient(table, world, "llama", "gather", "step", aot_autograd(fw_compiler=note))
    return names


def gathers_of_a_block(table: str, world: int, remat: str = "none") -> list[int]:
    """Count the gathers in the forward and in the backward graph of a compiled layer, cut by the partitioner that inductor uses."""
    found: dict[str, int] = {}

    def counted(side: str) -> Any:
        def count(graph: Any, _: Any) -> Any:
            found[side] = sum(_name(node) == KINDS["all_gather"] for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return count

    cut = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward"), partition_fn=cut)
    run_gradient(table, world, "llama", remat, "block", backend)
    return [found["forward"], found["backward"]]


def weights_at_the_end(table: str, world: int, chosen: bool) -> int:
    """Count the products after the last attention of backward once inductor's passes ran, with the step's options or with inductor's."""
    found: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        options = inductor_options("inductor", "cuda", True) if chosen else {}
        with V.set_fake_mode(detect_fake_mode(inputs)), inductor_config.patch(options):
            post_grad_passes(graph, is_inference=True)
        names = [_name(node) for node in graph.graph.nodes]
        last = max(i for i, name in enumerate(names) if "attention" in name)
        found.append(names[last:].count("mm"))
        return make_boxed_func(graph.forward)

    run_gradient(table, world, "llama", "none", "step", aot_autograd(fw_compiler=count))
    return found[0]


class _Alive(TorchDispatchMode):
    """Knows the memory of all that was made while it was entered and is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        return sum(n for reference, n in self.known.values() if not reference.expired())


class _Order(Interpreter):
    """Runs a graph and notes when the memory of each value was made and last read."""

    def run(self, *inputs: Any) -> Any:
        self.places: dict[int, list[int]] = {}
        self.sizes: dict[int, int] = {}
        self.names: list[str] = []
        self.held: list[Any] = []  # so that no memory is given out twice
        return super().run(*inputs)

    def run_node(self, n: Any) -> Any:
        out = super().run_node(n)
        here = len(self.names)
        self.names.append(_name(n))
        made = out if isinstance(out, tuple | list) else (out,)
        for x in (*(self.env[a] for a in n.all_input_nodes if a in self.env), *made):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.held.append(x)
                here_not = n.op == "placeholder" or _name(n) == "park"
                self.sizes[storage._cdata] = 0 if here_not else self.sizes.get(storage._cdata, storage.nbytes())
                self.places.setdefault(storage._cdata, [here, here])[1] = here
        return out

    def across(self, *names: str) -> int:
        """Sum what was made before the first of some operations and is read after it."""
        middle = min(i for i, name in enumerate(self.names) if name in names)
        return sum(self.sizes[key] for key, (first, last) in self.places.items() if first < middle < last)


def _name(node: Any) -> str:
    return str(getattr(node.target, "__name__", "")).split(".")[0]
