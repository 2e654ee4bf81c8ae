"""Switched off must fail: collectives and products counted in the captured graph, for every table and remat choice."""

import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from mtl.runtime.compile import inductor_options
from mtl.runtime.stored import stored, teach_inductor
from mtl.train.gradient import accumulate
from tests.ranks import Ranks
from tests.small import BATCH, SEQ

LAYERS, WEIGHTS, TRIPS = 2, 7, 4  # query, key, value, out, gate, up, down; those that share an input travel together
FOUND: dict[tuple[object, ...], dict[str, int]] = {}
"""What was counted, for the tests that compare with it too."""


def counts(ranks: Ranks, table: str, world: int = 2, **choices: str) -> dict[str, int]:
    """Count operations in the graph of one micro-batch's gradient."""
    key = (table, world, *choices.items())
    if key not in FOUND:
        FOUND[key] = ranks.capture("tests.cases.graphs:counts", world, table=table, world=world, **choices)
    return FOUND[key]


def test_one_device_and_data_parallel_have_no_collectives_in_a_micro_batch(ranks: Ranks) -> None:
    for table, world in (("single", 1), ("ddp", 2), ("zero1", 2)):
        found = counts(ranks, table, world)
        assert found["all_gather"] == found["reduce_scatter"] == found["all_reduce"] == found["all_to_all"] == 0, (table, found)
        assert found["mm"] == 3 * (WEIGHTS * LAYERS + 1)  # forward, and two products backward
        assert found["unbind"] == 0, "layers come as arguments of their own, so that all share their kernels"


def test_fsdp_gathers_every_weight_again_in_backward(ranks: Ranks) -> None:
    found = counts(ranks, "fsdp")
    assert found["all_gather"] == 2 * (TRIPS * LAYERS + 1) + 1  # layers and head twice, the embedding once
    assert found["reduce_scatter"] == TRIPS * LAYERS + 2
    assert found["mm"] == 3 * (TRIPS * LAYERS + 1), "gathering again must not multiply again"


def test_heads_of_one_product_are_turned_in_one_pass(ranks: Ranks) -> None:
    """Where query, key and value are one product; in float64 on one device weights are used as they lie, so they are three."""
    assert [counts(ranks, "fsdp")[name] for name in ("heads_apart", "heads_join")] == [LAYERS, LAYERS]
    assert [counts(ranks, "fsdp", remat="full")[name] for name in ("heads_apart", "heads_join")] == [2 * LAYERS, LAYERS]
    assert [counts(ranks, "single", 1)[name] for name in ("heads_apart", "heads_join")] == [0, 0]


def test_fsdp_exchanges_rows_of_the_embedding_where_tokens_are_fewer(ranks: Ranks) -> None:
    """On four devices each has 192 tokens, fewer than the 250 rows: the table travels neither way, on two (384) it does."""
    found = counts(ranks, "fsdp", 4)
    assert found["all_gather"] == 2 * (TRIPS * LAYERS + 1) + 1  # layers and head twice, the ids of all tokens once
    assert found["all_to_all"] == 2, "rows forward, their gradients back"
    assert found["reduce_scatter"] == TRIPS * LAYERS + 1, "layers and head"
    assert counts(ranks, "fsdp")["all_to_all"] == 0


def test_full_remat_multiplies_again_and_gathers_no_more(ranks: Ranks) -> None:
    plain, full = counts(ranks, "fsdp"), counts(ranks, "fsdp", remat="full")
    assert full["mm"] == plain["mm"] + (TRIPS - 1) * LAYERS or full["mm"] == plain["mm"] + TRIPS * LAYERS, (plain, full)
    assert full["all_gather"] == plain["all_gather"]
    assert full["core"] == 2 * plain["core"]
    half = counts(ranks, "fsdp", remat="every:2")
    assert plain["mm"] < half["mm"] < full["mm"]


def test_mlp_remat_multiplies_up_again_and_leaves_attention(ranks: Ranks) -> None:
    plain, mlp, full = (counts(ranks, "fsdp", remat=remat) for remat in ("none", "mlp", "full"))
    assert plain["mm"] < mlp["mm"] <= plain["mm"] + 2 * LAYERS, "gate and up; what down gives nobody needs"
    assert mlp["core"] == plain["core"] < full["core"]
    assert mlp["all_gather"] == plain["all_gather"]
    assert plain["mm"] < counts(ranks, "fsdp", remat="mlp:2")["mm"] < mlp["mm"]


def test_dense_remat_is_full_remat_that_keeps_attention(ranks: Ranks) -> None:
    plain, dense, full = (counts(ranks, "fsdp", remat=remat) for remat in ("none", "dense", "full"))
    assert dense["mm"] == full["mm"] > plain["mm"]
    assert dense["core"] == plain["core"] < full["core"]


def test_selective_remat_repeats_the_cheap_parts_alone(ranks: Ranks) -> None:
    plain, selective = counts(ranks, "single", 1), counts(ranks, "single", 1, remat="selective")
    assert selective["mm"] == plain["mm"], "no product of weights is computed again"
    assert selective["core"] == 2 * plain["core"] == 2 * LAYERS, "the attention core is"
    assert selective["activation"] == plain["activation"] == 2 * LAYERS, "the MLP's activation always is"


def test_the_residual_stream_and_what_attention_reads_are_in_memory(ranks: Ranks) -> None:
    stream, gradient, qkv = 2, 2, 3
    assert counts(ranks, "single", 1)["stored"] == (stream + gradient + qkv) * LAYERS
    # Computed again, a layer stores the sum of its input (which waits for the gradient) and of attention; what follows nothing needs.
    # Query, key and value, which are one product there, lie in memory anyway: one operation makes them.
    assert counts(ranks, "fsdp", remat="full")["stored"] == (2 * stream + gradient) * LAYERS


@pytest.mark.parametrize("make", [lambda x, y: x + y, lambda x, y: x[:, :32]], ids=["sum", "view"])
def test_what_is_stored_is_a_buffer_of_its_own(make: Any) -> None:
    def buffers(keep: Any) -> int:
        def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            total = keep(make(x, y))
            return total.exp().sum(-1), total.sin()

        given = [torch.ones(64, 64), torch.ones(64, 64)]
        graph = GraphLowering(make_fx(fn)(*given))
        with V.set_graph_handler(graph):
            graph.run(*given)
        return len(graph.buffers)

    teach_inductor()
    assert buffers(stored) == buffers(lambda x: x) + 1


def test_inductor_looks_for_fusions_near_by_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers read the rotary angles: were each compared with every other, compile times would grow with their number squared."""

    def tried(layers: int) -> int:
        def fn(x: Tensor, w: Tensor, shared: Tensor) -> Tensor:
            for _ in range(layers):
                x = (x @ w) * shared
            return x

        given = [torch.ones(64, 64) for _ in range(3)]
        graph = GraphLowering(make_fx(fn)(*given))
        calls: list[int] = []
        usual = Scheduler.can_fuse
        monkeypatch.setattr(Scheduler, "can_fuse", lambda *args: calls.append(0) or usual(*args))
        options = inductor_config.patch(inductor_options("inductor", "cpu", True))
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()), options:
            graph.run(*given)
            Scheduler(graph.operations)
        monkeypatch.undo()
        return len(calls)

    assert 0 < tried(48) < 2.5 * tried(24)


def test_inductor_is_loaded_and_taught_by_who_compiles_alone() -> None:
    program = """
import sys
import mtl.models.decoder
assert "torch._inductor.lowering" not in sys.modules
import torch
from mtl.runtime.compile import compiled
compiled(len, "inductor")
assert torch.ops.mtl_memory.stored.default in sys.modules["torch._inductor.lowering"].lowerings

class Deep:
    __str__ = __repr__ = None  # what it was made from, and what that was made from

spelled = sys.modules["torch._inductor.exc"].OperatorIssue.operator_str("op", [Deep()], {"k": 1})
assert spelled == "  op(Deep, int)", spelled
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_block_compile_keeps_remat_and_regather(ranks: Ranks) -> None:
    plain, full = counts(ranks, "fsdp", how="block"), counts(ranks, "fsdp", how="block", remat="full")
    assert plain["graphs"] == full["graphs"] == 2, "one graph forward and one backward serve all layers"
    assert plain["all_gather"] == 2 * TRIPS
    assert plain["mm"] == 3 * TRIPS
    assert full["mm"] >= plain["mm"] + TRIPS - 1
    assert full["all_gather"] == 2 * TRIPS


def test_tensor_parallel_is_sequence_parallel(ranks: Ranks) -> None:
    found = counts(ranks, "tensor")
    # Forward gathers before attention, MLP and head, scatters after attention, MLP and embedding; backward transposes each.
    assert found["all_gather"] == found["reduce_scatter"] == 2 * (2 * LAYERS + 1)
    assert found["all_to_all"] == 0


@pytest.mark.parametrize("remat", ["gather", "selective", "full"])
def test_inputs_of_tensor_parallel_products_may_be_gathered_again(ranks: Ranks, remat: str) -> None:
    """Each layer's first products once more; a layer that is computed again does so there, and keeps them till its end."""
    plain, found = counts(ranks, "tensor"), counts(ranks, "tensor", remat=remat)
    assert found["all_gather"] == plain["all_gather"] + 2 * LAYERS
    assert found["mm"] <= plain["mm"] or remat == "full", "gathering again must not multiply again"


@pytest.mark.parametrize("how", ["none", "step"])
def test_tensor_parallel_layers_keep_parts_alone(ranks: Ranks, how: str) -> None:
    """By hand: two inputs of products a layer, half the tokens x embed in float64, less the half that each of two devices keeps."""
    parts, whole = (ranks.capture("tests.cases.graphs:kept", 4, table="fsdp_tensor", world=4, how=how, remat=r) for r in ("gather", "none"))
    assert whole - parts == LAYERS * 2 * BATCH // 2 * SEQ * 32 * 8 // 2


def test_gradients_of_weights_are_made_where_their_layers_are(ranks: Ranks) -> None:
    """After the last attention's backward one layer's products of query, key and value are left; inductor by itself leaves most."""
    ours, theirs = (ranks.capture("tests.cases.graphs:weights_at_the_end", 2, table="tensor", world=2, chosen=c) for c in (True, False))
    assert ours <= 6 < theirs


def test_compiled_blocks_gather_again_in_their_backward(ranks: Ranks) -> None:
    """Their sum would be the same if the partitioner gathered ahead and kept what is gathered."""
    assert ranks.capture("tests.cases.graphs:gathers_of_a_block", 2, table="fsdp", world=2) == [TRIPS, TRIPS]
    assert ranks.capture("tests.cases.graphs:gathers_of_a_block", 2, table="tensor", world=2) == [2, 2]
    assert ranks.capture("tests.cases.graphs:gathers_of_a_block", 2, table="tensor", world=2, remat="gather") == [2, 2 + 2]
    assert ranks.capture("tests.cases.graphs:gathers_of_a_block", 2, table="tensor", world=2, remat="full") == [2, 2 + 2]


def test_communication_of_tensor_parallel_layers_runs_beside_their_backward_products(ranks: Ranks) -> None:
    """In the captured order: a gather, the product whose gradient is summed next, that sum, the other product, the sum's end."""
    order = ranks.capture("tests.cases.graphs:order_of_backward", 2, table="tensor", world=2)
    turn = ["gather", "mm", "gathered", "sum", "mm", "summed"]
    assert sum(order[i : i + len(turn)] == turn for i in range(len(order))) == 2 * LAYERS, order


def test_context_gathers_keys_and_values(ranks: Ranks) -> None:
    fsdp, context = counts(ranks, "fsdp"), counts(ranks, "context")
    assert context["all_gather"] == fsdp["all_gather"] + 2 * LAYERS
    assert context["reduce_scatter"] == fsdp["reduce_scatter"] + 2 * LAYERS


def test_ring_passes_keys_round(ranks: Ranks) -> None:
    found = counts(ranks, "ring", 4)
    # Three turns send k and v forward; backward sends them again, and their gradients four times. Rows of the embedding go both ways.
    assert found["all_to_all"] == LAYERS * (3 * 2 + 3 * 2 + 4 * 2) + 2
    assert found["all_gather"] == counts(ranks, "fsdp")["all_gather"], "no keys are gathered"


def test_ulysses_turns_sequence_into_heads_and_back(ranks: Ranks) -> None:
    assert counts(ranks, "ulysses")["all_to_all"] == 2 * 4 * LAYERS  # q, k, v and the result, both ways


def test_a_step_is_one_graph(ranks: Ranks) -> None:
    assert counts(ranks, "fsdp_tensor", 4)["graphs"] == 1


@pytest.mark.parametrize(("table", "world", "how"), [("single", 1, "none"), pytest.param("context", 2, "step", marks=pytest.mark.slow)])
def test_an_mlp_may_take_the_sequence_in_pieces(ranks: Ranks, table: str, world: int, how: str) -> None:
    assert ranks.run("tests.cases.train:pieces_of_the_mlp", world, table=table, world=world, how=how)["error"] < 1e-9


def test_pieces_of_an_mlp_compute_nothing_more_often(ranks: Ranks) -> None:
    whole, pieces = (ranks.capture("tests.cases.graphs:counts", 1, table="single", world=1, remat="full", pieces=n) for n in (1, 4))
    # Forward gate, up and down; gate and up again; two products of each backward: for every piece, on a quarter of the tokens.
    assert pieces["mm"] == whole["mm"] + 2 * 3 * (3 + 2 + 6)


def test_gradients_of_earlier_micro_batches_are_let_go() -> None:
    """Accumulating three micro-batches holds the sum and one more gradient, not the last one's beside it."""
    made: list[weakref.ref[Tensor]] = []

    def gradient(params: Any, batch: Any, scale: Tensor) -> Any:
        assert all(earlier() is None for earlier in made), "an earlier gradient lives on"
        grad = torch.full((4,), 1.0, dtype=torch.bfloat16)
        made.append(weakref.ref(grad))
        return {"w": grad}, torch.zeros(2)

    total, shares = accumulate(gradient, {}, {"tokens": torch.zeros(4, 1)}, torch.ones(()), torch.float32)
    assert total["w"].tolist() == [4.0] * 4 and total["w"].dtype == torch.float32 and shares.shape == (4, 2)
