"""Layers as pieces: each is compiled once and called for every layer, and the numbers stay the same bits."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mtl.runtime import overlap
from mtl.runtime.compile import compiled
from mtl.runtime.rolled import roll
from tests.ranks import Ranks

LAYERS = 7
"""The first and the last layer may be unlike the others: gathers ahead of use begin and end there."""


@pytest.mark.parametrize(
    ("model", "precision", "remat"),
    [
        ("llama", "bf16", "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("llama", "bf16", "none"), ("llama", "fp64", "full"), ("llama", "bf16", "selective"), ("falcon", "fp64", "none"))
        ),
    ],
    ids=str,
)
def test_every_layer_calls_the_same_piece_and_gives_the_same_bits(ranks: Ranks, model: str, precision: str, remat: str) -> None:
    found = ranks.run("tests.cases.rolled:traced", 2, model=model, precision=precision, engine=True, remat=remat)
    assert len(found["called"]) == 2 and min(found["called"]) >= LAYERS - 2 and found["same"], found
    whole, pieces = found["nodes"]
    assert pieces < 0.6 * whole, found


@pytest.mark.parametrize("precision", [pytest.param("fp64", id="sums"), pytest.param("bf16", id="exchanges", marks=pytest.mark.slow)])
def test_nothing_that_a_library_still_sends_passes_from_piece_to_piece(ranks: Ranks, precision: str) -> None:
    """A collective's input must live until it is waited for, which inductor sees within one graph alone."""
    found = ranks.capture("tests.cases.rolled:traced", 2, model="llama", precision=precision, engine=False, remat="none")
    assert found["called"] == [] and found["nodes"][0] == found["nodes"][1], found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_inductor_gives_the_same_bits_for_pieces(ranks: Ranks, precision: str) -> None:
    found = ranks.run("tests.cases.rolled:compiled", 2, model="llama", precision=precision, engine=True, remat="none")
    assert found == {"called": [LAYERS - 2] * 2, "same": True}


@pytest.mark.slow
def test_inductor_gives_the_same_bits_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pipelines' stages are compiled: forward and backward are graphs of their own, each with a piece."""
    called: list[list[int]] = []
    results: list[list[torch.Tensor]] = []
    torch.manual_seed(0)
    args = [torch.randn(8, 4), *(torch.randn(4, 16) / 8 for _ in range(7))]
    for how in (lambda _: [], lambda graph: called.append(roll(graph))):  # pyright: ignore
        monkeypatch.setattr(overlap, "roll", how)
        leaves = [x.clone().requires_grad_() for x in args]
        with torch._inductor.config.patch(force_disable_caches=True):
            out = compiled(stack, blockwise=True, options=overlap.options())(*leaves)
            results.append([*out, *torch.autograd.grad(torch.stack([x.double().sum() for x in out]).sum(), leaves)])
    assert len(called) == 2 and all(count and min(count) >= 5 for count in called), called
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def stack(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Go through layers whose wide activation is read again at the end, as backward reads what forward made."""
    wide: list[torch.Tensor] = []
    for w in weights:
        y = x @ w
        wide.append(y.double().exp())
        x = wide[-1].float() @ w.T
    return x, *(w.sum(0) for w in wide)


def traced(fn: object, *args: torch.Tensor) -> GraphModule:
    """Trace a function with shapes."""
    return make_fx(fn, tracing_mode="fake")(*args)  # pyright: ignore


def test_what_goes_element_by_element_is_made_again_and_does_not_pass() -> None:
    """The product passes (4 bytes), not its exponential in float64, which nothing but a kernel of the compiler's reads."""
    args = torch.randn(8, 4), *(torch.randn(4, 16) / 8 for _ in range(6))
    graph = traced(stack, *args)
    want = graph(*args)
    assert roll(graph.graph) == [5]
    graph.recompile()
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.invoke_subgraph]
    assert len(calls) == 5 and len({n.args[0].target for n in calls}) == 1
    given = [n for n in graph.graph.nodes if n.target is operator.getitem and n.args[0] in calls and n.users]
    assert given and all(n.meta["val"].dtype == torch.float32 for n in given)
    assert all(torch.equal(a, b) for a, b in zip(graph(*args), want, strict=True))


def test_what_the_graph_gives_is_not_made_twice() -> None:
    """As a pipeline's forward gives what its backward reads: a piece writes it, and nothing outside computes."""

    def layers(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made: list[torch.Tensor] = []
        for w in weights:
            made.append((x @ w).exp())
            x = made[-1].tanh() @ w.T
        return x, *(m.view(-1) for m in made)

    args = torch.randn(8, 4), *(torch.randn(4, 16) / 8 for _ in range(6))
    graph = traced(layers, *args)
    want = graph(*args)
    assert roll(graph.graph) == [5]
    graph.recompile()
    assert sum("exp" in name for name in nodes(graph.graph)) == 1, "the first layer's, which is not a piece"
    assert all(torch.equal(a, b) for a, b in zip(graph(*args), want, strict=True))


@pytest.mark.parametrize("change", ["few", "shapes", "constants", "order", "writes"])
def test_layers_that_are_not_alike_stay_as_they_are(change: str) -> None:
    def layers(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i, w in enumerate(weights):
            x = (x * (i if change == "constants" else 2)) @ w
            x = (x.add_(1) if change == "writes" else x + 1) @ w.T
            y = x + 1
            x = torch.addcmul(x, y, x if change == "order" and i % 2 else y)
        return x

    widths = [16 + i * (change == "shapes") for i in range(3 if change == "few" else 6)]
    graph = traced(layers, torch.randn(8, 4), *(torch.randn(4, w) for w in widths))
    before = nodes(graph.graph)
    assert roll(graph.graph) == [] and nodes(graph.graph) == before


def nodes(graph: Graph) -> list[str]:
    """Name what a graph computes."""
    return [str(n.target) for n in graph.nodes]
