"""Plans of pipelines: what every device computes, sends and stores is what real ranks do."""

from typing import Any

import pytest

from experiments.bench.plan_cases import Case
from experiments.bench.plan_error import plan_of
from experiments.plan_pipeline import Drawn
from mtl.inspect import hardware
from mtl.inspect.describe import as_page, as_text
from mtl.pipeline.simulate import closed_bubble
from mtl.sharding.mesh import MeshShape
from tests.cases.inspect import pipeline_of, planned_pipeline
from tests.ranks import Ranks

CASES: dict[str, tuple[dict[str, int], str, str, str, int, str, int]] = {  # mesh, table, model, schedule, micro-batches, remat, layers
    "1f1b": ({"pipe": 2}, "single", "llama", "1f1b", 4, "none", 5),
    "zb_v": ({"pipe": 2}, "single", "gpt", "zb_v", 4, "none", 5),
    "tensor": ({"pipe": 2, "tensor": 2}, "tensor", "llama_tied", "1f1b", 4, "full", 4),
    "fsdp": ({"pipe": 2, "fsdp": 2}, "fsdp", "falcon", "zb_h1", 4, "selective", 4),
    "zero1": ({"pipe": 2, "replica": 2}, "zero1", "llama", "gpipe", 2, "none", 4),
    "context": ({"pipe": 2, "context": 2}, "context", "mistral", "interleaved", 4, "none", 6),
}


def choices(name: str) -> dict[str, Any]:
    return dict(zip(("mesh", "table", "model", "schedule", "micros", "remat", "layers"), CASES[name], strict=True))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "context" else name for name in CASES])
def test_counts_are_those_of_real_devices(ranks: Ranks, name: str) -> None:
    asked = choices(name)
    world = MeshShape(**asked["mesh"]).devices()
    done, planned = ranks.run("tests.cases.inspect:pipeline_counts", world, **asked), planned_pipeline(**asked)
    inner = world // asked["mesh"]["pipe"]
    for rank in range(0, world, inner):  # the first device of each stage: others of a split sequence see more of it
        assert done[rank] == planned[rank // inner], f"rank {rank}"
    assert all(found["sends"][0] >= asked["micros"] and found["flops"] > 0 and min(found["stored"].values()) > 0 for found in done)


def test_stored_micro_batches_make_the_peak() -> None:
    """By hand, 1f1b over 2: device 0 holds two micro-batches of its stage, device 1 one of its own."""
    job, pipeline = pipeline_of(**choices("1f1b"))
    drawn = Drawn(job, pipeline, None)
    kept = [sum(c.kept for c in stage) for stage in drawn.stages]
    parts = [drawn._fullest(d)[0] for d in range(2)]
    assert kept[0] < parts[0]["activations"] <= 2 * kept[0], "both micro-batches, less what backward has let go"
    assert parts[1]["activations"] <= kept[1]
    full = Drawn(*pipeline_of(**{**choices("1f1b"), "remat": "full"}), None)
    assert sum(c.kept for c in full.stages[0]) < kept[0] / 4, "recomputing keeps the inputs of layers alone"


def test_measured_pipelines() -> None:
    """docs/benchmarks.md: 16 layers of Llama-3-8B over 4 H200, 8 micro-batches of 8192 tokens; the memory is the first device's."""
    splits = {"1f1b": (4, 5, 5, 2), "zb_v": (2, 3, 2, 2, 2, 2, 2, 1)}
    for schedule, gib, seconds, bubble in (("1f1b", 41.3, 1.155, 0.309), ("zb_v", 44.3, 1.028, 0.196)):
        split = splits[schedule]
        case = Case("llama3_8b", 16, MeshShape(pipe=4), "single", 1, 8192, compile="step", accumulate=8, schedule=schedule, split=split)
        plan = plan_of(case, hardware.load("h200"))
        assert plan.piped is not None and plan.piped.bubble is not None
        assert plan.piped.positions[0].memory.peak / 2**30 == pytest.approx(gib, rel=0.05)
        assert plan.step == pytest.approx(seconds, rel=0.1)
        assert plan.piped.bubble == pytest.approx(bubble, abs=0.03)


def test_bubble_is_the_closed_form_where_stages_are_equal() -> None:
    case = Case("llama3_8b", 256, MeshShape(pipe=4), "single", 1, 4096, accumulate=16, schedule="1f1b")
    plan = plan_of(case, hardware.load("h200"))
    assert plan.piped is not None and plan.piped.layers_per_stage[0] in (64, 65)
    assert plan.piped.bubble == pytest.approx(closed_bubble(4, 16), abs=0.02)
    assert plan.seconds is not None and plan.step == pytest.approx(
        sum(plan.seconds[k] for k in ("products", "attention", "other kernels", "communication shown", "bubble"))
    )


def test_a_pipeline_is_shown_in_words_and_on_a_page() -> None:
    plan = plan_of(Case("llama3_8b", 8, MeshShape(pipe=4), "single", 1, 4096, accumulate=8, schedule="zb_v"), hardware.load("h200"))
    text, page = as_text(plan, "title"), as_page(plan, "title", "about")
    assert "zb_v, 8 micro-batches" in text and "bubble" in text
    assert plan.piped is not None and len(plan.piped.positions) == 4
    for at in plan.piped.positions:
        assert f'data-bytes="{at.memory.peak}"' in page
    assert plan.as_json()["pipeline"] is not None
