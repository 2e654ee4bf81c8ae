"""Pipelines run: one device's numbers under every schedule and mesh, nothing computed twice, nothing stored longer than the table says."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtl import tree
from mtl.errors import UserError
from mtl.lora import adapters
from mtl.models import decoder
from mtl.optim.optimizers import adamw
from mtl.params import decayed, init
from mtl.pipeline.schedules import build
from mtl.pipeline.simulate import simulate
from mtl.pipeline.split import costs, split_layers
from mtl.precision import PRECISIONS
from mtl.sharding.shard_map import to_local
from mtl.train.frozen import Held
from mtl.train.pipelined import Pipeline, make_pipelined_step
from mtl.train.state import init_state
from mtl.train.step import StepOptions, make_step
from tests.cases.lora import ADAPTERS
from tests.cases.train import SCHEDULE, batch
from tests.ranks import Ranks
from tests.small import LLAMA, MODELS, SEQ

Case = dict[str, Any]


def case(model: str, layers: int, micros: int, mesh: dict[str, int], schedule: str, **choices: Any) -> Case:
    """Spell a case."""
    return {"model": model, "layers": layers, "micros": micros, "mesh": mesh, "schedule": schedule, **choices}


def name(one: Case) -> str:
    """Name a case in the report."""
    mesh = "".join(f"{axis}{size}" for axis, size in one["mesh"].items())
    return "-".join([mesh, *(str(v) for k, v in one.items() if k != "mesh")]).replace(" ", "")


PART = [
    case("llama", 4, 4, {"pipe": 2}, "1f1b"),
    case("gpt", 9, 6, {"pipe": 4}, "interleaved", groups=True),
    case("alibi", 4, 4, {"pipe": 4}, "gpipe"),
    case("llama_tied", 4, 4, {"pipe": 2, "tensor": 2}, "zb_h1", remat="full"),
    case("mistral", 5, 4, {"pipe": 2, "context": 2}, "zb_v", remat="selective"),
    case("falcon", 5, 4, {"pipe": 2, "fsdp": 2}, "interleaved", virtual=2, split=[1, 1, 2, 1]),
    case("gpt", 4, 3, {"pipe": 2, "replica": 2}, "1f1b", rules="zero1", remat="dense"),
    case("llama", 4, 4, {"pipe": 2}, "zb_v", how="block", remat="mlp:2"),
    case("llama_tied", 7, 4, {"pipe": 3}, "zb_v", groups=True, fused=True),
]
"""Every schedule, every kind of mesh, every remat, compiled, uneven, tied and with channels as GPUs have them at least once."""
PART_MORE = [
    case("llama_tied", 4, 4, {"pipe": 2, "fsdp": 2, "tensor": 2}, "zb_h1", remat="full"),
    case("gpt", 9, 6, {"pipe": 4}, "interleaved"),
    case("llama_tied", 7, 4, {"pipe": 3}, "zb_v"),
    case("alibi", 8, 8, {"pipe": 8}, "gpipe"),
    case("mistral", 5, 4, {"pipe": 2, "replica": 2, "context": 2}, "zb_v", remat="selective"),
    case("falcon", 9, 4, {"pipe": 4, "fsdp": 2}, "interleaved", virtual=2, split=[1, 1, 1, 1, 1, 2, 1, 1]),
    case("gpt", 4, 3, {"pipe": 2, "fsdp": 2}, "1f1b", rules="zero1", remat="dense"),
    case("llama", 9, 6, {"pipe": 4}, "interleaved", groups=True),
    case("llama", 4, 4, {"pipe": 2, "fsdp": 2, "tensor": 2}, "zb_v", groups=True, fused=True),
    case("llama_tied", 4, 4, {"pipe": 2}, "zb_h1", fused=True, how="block"),
]
"""The same on more devices."""

ADAPTED = [
    case("llama_tied", 5, 4, {"pipe": 2}, "zb_v", lora=0.0),
    case("llama", 4, 4, {"pipe": 2}, "1f1b", lora=0.3, remat="selective"),
]
ADAPTED_MORE = [
    case(model, 9, 4, mesh, schedule, lora=0.3, remat=remat)
    for model, mesh, schedule, remat in (
        ("gpt", {"pipe": 4}, "interleaved", "none"),
        ("falcon", {"pipe": 2, "fsdp": 2}, "zb_h1", "full"),
        ("mistral", {"pipe": 2, "replica": 2, "context": 2}, "zb_v", "none"),
        ("llama_tied", {"pipe": 2, "fsdp": 2, "tensor": 2}, "1f1b", "every:2"),
        ("alibi", {"pipe": 2, "context": 2, "tensor": 2}, "gpipe", "selective"),
    )
] + [
    case("llama", 4, 3, {"pipe": 2, "fsdp": 2}, "zb_v", lora=0.3, rules="zero1"),
    case("llama_tied", 5, 4, {"pipe": 2}, "zb_v", lora=0.0, how="block"),
    case("llama", 4, 4, {"pipe": 2}, "1f1b", lora=0.3),
    case("llama", 4, 4, {"pipe": 2, "tensor": 2}, "zb_v", lora=0.3, remat="selective"),
]
"""Low-rank adapters alone are trained, and drop some of their inputs."""

MESHES = (
    [{"pipe": n} for n in (2, 4, 8)]
    + [{"pipe": 2, "fsdp": 2, "tensor": 2}, {"pipe": 2, "replica": 2, "context": 2}, {"pipe": 4, "fsdp": 2}]
    + [{"pipe": 2, "context": 2, "tensor": 2}, {"pipe": 2, "replica": 2, "fsdp": 2}]
)
FULL = [
    case(model, 2 * mesh["pipe"] + extra, 8 if mesh["pipe"] == 8 or extra else 4, mesh, schedule, remat=remat)
    for mesh, schedule, model, remat, extra in itertools.product(
        MESHES, ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"), MODELS, ("none", "selective", "full", "every:2"), (0, 1)
    )
    if 24 % ((8 if mesh["pipe"] == 8 or extra else 4) * mesh.get("fsdp", 1) * mesh.get("replica", 1)) == 0
]
random.Random(2).shuffle(FULL)


def check(ranks: Ranks, references: Path, one: Case) -> None:
    """Compare a case with one device."""
    ref = {key: one[key] for key in ("model", "layers", "micros", "lora") if key in one}
    path = references / f"pipeline-{'-'.join(str(v) for v in ref.values())}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.pipeline:reference", 1, path=str(path), **ref)
    world = 1
    for size in one["mesh"].values():
        world *= size
    found = ranks.run("tests.cases.pipeline:parity", world, path=str(path), **one)
    assert found["error"] < 1e-9, found
    assert found["moved"] > 1e-3, "the reference's loss hardly moved: the comparison proves nothing"
    assert all(counted == simulated for counted, simulated in found["stored"]), found


@pytest.mark.parametrize("one", PART, ids=name)
def test_pipeline_equals_one_device(ranks: Ranks, references: Path, one: Case) -> None:
    check(ranks, references, one)


@pytest.mark.parametrize("one", ADAPTED, ids=name)
def test_adapters_beside_a_frozen_model_equal_one_device(ranks: Ranks, references: Path, one: Case) -> None:
    check(ranks, references, one)


@pytest.mark.slow
@pytest.mark.parametrize("one", ADAPTED_MORE, ids=name)
def test_adapters_on_more_pipelines(ranks: Ranks, references: Path, one: Case) -> None:
    check(ranks, references, one)


@pytest.mark.slow
@pytest.mark.parametrize("one", [*PART_MORE, *FULL], ids=name)
def test_every_schedule_on_every_mesh(ranks: Ranks, references: Path, one: Case) -> None:
    check(ranks, references, one)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "remat"), [("1f1b", "full"), ("zb_h1", "none"), ("interleaved", "selective")])
def test_compiled_stages_on_a_mesh(ranks: Ranks, references: Path, schedule: str, remat: str) -> None:
    check(ranks, references, case("gpt", 4, 4, {"pipe": 2, "fsdp": 2}, schedule, remat=remat, how="step"))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"])
def test_tensors_live_as_long_as_the_table_says(ranks: Ranks, schedule: str) -> None:
    """Counted by weak references to what forward saved."""
    for found in ranks.run("tests.cases.pipeline:all_stored", 2, schedule=schedule, devices=2, micros=5, remat="none"):
        assert found["most"] == found["counted"] == found["simulated"] > 0 and found["left"] == 0, found


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_nothing_is_multiplied_twice(one: Any, remat: str) -> None:
    """However a stage's backward is split, its products are those of the plain step."""
    par = one(**decoder.sizes(LLAMA), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ), batch=1)
    policy, optimizer = PRECISIONS["fp64"], adamw(decayed(decoder.specs(LLAMA)))
    options, data = StepOptions(policy, remat), batch(par, LLAMA, 0, 1, False, 3)
    found = {}
    for schedule in ("plain", "1f1b", "zb_h1"):
        state = init_state(decoder.specs(LLAMA), par.rules, par.mesh, 0, policy, optimizer)
        if schedule == "plain":
            step = make_step(decoder, LLAMA, par, optimizer, SCHEDULE, options)
        else:
            table = build(schedule, 1, 3)
            pipeline = Pipeline(lambda m, t=table: t, split_layers(2, 1, 0, 0), table.place)
            step = make_pipelined_step(decoder, LLAMA, par, optimizer, SCHEDULE, options, pipeline)
            step(state, data)  # traced: from now on only what runs is counted
        with Products() as products:
            step(state, data)
        found[schedule] = products.count
    weights = 7 * LLAMA.layers
    again = {"none": 0, "selective": 0, "full": weights}[remat]
    assert found["1f1b"] == found["zb_h1"] <= found["plain"]
    assert 3 * (3 * (weights + 1) + again - LLAMA.layers) <= found["1f1b"] <= 3 * (3 * (weights + 1) + again), found


def traced(one: Any, model: Any = decoder, whole: Any = decoder) -> Any:
    """Take a step through a pipeline of one device; give its pieces."""
    par = one(**decoder.sizes(LLAMA), **dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), SEQ), batch=1)
    specs, policy = model.specs(LLAMA), PRECISIONS["fp64"]
    optimizer, table = adamw(decayed(specs)), build("zb_h1", 1, 1)
    pipeline = Pipeline(lambda m: table, split_layers(2, 1, 0, 0), table.place)
    step: Any = make_pipelined_step(model, LLAMA, par, optimizer, SCHEDULE, StepOptions(policy), pipeline, whole)
    rest = tree.map(to_local, init(whole.specs(LLAMA), par.rules, par.mesh, 0, policy.param))
    given = {**batch(par, LLAMA, 0, 1, False, 1), "frozen": None if model is whole else Held(rest)}
    step(init_state(specs, par.rules, par.mesh, 0, policy, optimizer), given)
    (pieces,) = step.staging.traced.values()
    return pieces


def products(*parts: Any) -> list[int]:
    """Count the products of matrices in parts of a piece."""
    return [sum(node.target is torch.ops.aten.mm.default for node in part.run.graph.nodes) for part in parts]


def test_backward_is_split_in_halves(one: Any) -> None:
    """Gradients of inputs take one product a weight, gradients of weights the other."""
    pieces = traced(one)
    (block,) = pieces.blocks.values()
    assert products(block.forward, block.inputs, block.weights, block.backward) == [7, 7, 7, 14]
    assert products(pieces.head.forward, pieces.head.inputs, pieces.head.weights) == [1, 1, 1]
    assert len(tree.leaves(block.grads)) == len([g for g in block.grads if g is not None]) == 9


def test_a_frozen_model_takes_no_gradient_products(one: Any) -> None:
    """Of an adapted projection W, A and B are multiplied; all three for the gradient of its input, and once more for A's and B's."""
    pieces = traced(one, adapters.trained(decoder, ADAPTERS), adapters.whole(decoder, ADAPTERS))
    (block,) = pieces.blocks.values()
    assert products(block.forward, block.inputs, block.weights, block.backward) == [21, 21, 14, 35]
    assert products(pieces.head.forward, pieces.head.inputs, pieces.head.weights) == [1, 1, 0]
    assert len([g for g in block.grads if g is not None]) == 14 and pieces.embed.grads == (None,) * 3


@pytest.mark.parametrize(
    ("schedule", "devices", "virtual", "least"), [("zb_v", 2, None, 0.09), ("interleaved", 4, 2, 0.01), ("1f1b", 4, None, 0.0)]
)
def test_layers_are_split_for_the_least_time_of_their_table(schedule: str, devices: int, virtual: int | None, least: float) -> None:
    table = build(schedule, devices, 8 * devices, virtual)
    even, found = ([len(part) for part in split_layers(16, table.stages, 2.1, 0.1, None, t)] for t in (None, table))
    slow, fast = (simulate(table, costs(counts, 2.1, 0.1)).length for counts in (even, found))
    assert sum(found) == 16 and all(abs(a - b) <= 1 <= b for a, b in zip(even, found, strict=True))
    assert slow >= fast * (1 + least), (even, found)

    def fullest(counts: list[int]) -> int:
        stored = simulate(table, costs(counts, 2.1, 0.1)).stored_by_stage
        return max(sum(stored[s] * counts[s] for s in table.place if table.place[s] == device) for device in range(devices))

    assert fullest(found) <= fullest(even)
    if schedule == "zb_v":  # of two devices one has the first and the last stage
        assert found[0] + found[3] + 2.2 < found[1] + found[2] + 2


def test_layers_are_split_so_that_the_slowest_stage_is_fast() -> None:
    counts = [len(part) for part in split_layers(32, 4, head=2.4, embed=0.1)]
    assert counts == [8, 9, 9, 6]
    assert [len(part) for part in split_layers(8, 4, head=0.4, embed=0.1)] == [2, 2, 2, 2]
    assert split_layers(5, 2, 0, 0, (2, 3)) == ((0, 1), (2, 3, 4))
    assert split_layers(5, 2, 9, 0, (2, 3), build("1f1b", 2, 8, None)) == ((0, 1), (2, 3, 4)), "what is given is kept"
    with pytest.raises(UserError, match=r"model\.layers is 3, which do not split over the pipeline's 4 stages"):
        split_layers(3, 4, 0, 0)
    for given in ((2, 2), (5, 0), (1, 2, 2)):
        with pytest.raises(UserError, match=r"pipeline\.layers-per-stage"):
            split_layers(5, 2, 0, 0, given)
