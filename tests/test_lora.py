"""LoRA: adapters alone are trained, on any mesh alike; the frozen model costs no gradients; merged equals apart."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from mtl.errors import UserError
from mtl.lora.adapters import Lora, adapter_specs
from mtl.models import decoder
from mtl.params import count
from tests.ranks import Ranks
from tests.small import MESHES, MODELS

PLACES = [(table, world) for table, meshes in MESHES.items() for world in meshes if world > 1]
NAMES = list(MODELS)
SOME = [(t, 4 if t in ("hsdp", "fsdp_tensor") else 2, NAMES[i % len(NAMES)]) for i, (t, m) in enumerate(MESHES.items()) if t != "single"]


def name(case: tuple[str, int, str]) -> str:
    return "-".join(map(str, case))


def check(ranks: Ranks, references: Path, table: str, world: int, model: str, dropout: float = 0.0, **how: object) -> None:
    path = references / f"lora-{model}-{dropout}.safetensors"
    if not path.exists():
        ranks.run("tests.cases.lora:reference", 1, model=model, path=str(path), dropout=dropout)
    rest = {"path": str(path), "dropout": dropout, **how}
    found = ranks.run("tests.cases.lora:parity", world, table=table, world=world, model=model, **rest)
    assert found["error"] < 1e-9, found
    assert found["moved"] > 1e-6, "the adapters changed nothing"


@pytest.mark.parametrize("case", SOME, ids=name)
def test_mesh_equals_one_device(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    check(ranks, references, *case)


@pytest.mark.parametrize("case", [("fsdp_tensor", 4, "llama"), ("context", 2, "mistral"), ("ulysses", 2, "gpt")], ids=name)
def test_every_mesh_drops_the_same(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    check(ranks, references, *case, dropout=0.3)
    plain, dropped = (load_file(references / f"lora-{case[2]}-{rate}.safetensors") for rate in (0.0, 0.3))
    assert abs(plain["loss.0"] - dropped["loss.0"]) > 1e-6, "dropping changed nothing"


@pytest.mark.parametrize(
    "how",
    [{"remat": "selective", "micros": 3}, {"how": "step"}]
    + [pytest.param(how, marks=pytest.mark.slow) for how in ({"remat": "full"}, {"how": "block", "remat": "full"})],
    ids=str,
)
def test_remat_and_compile_drop_the_same(ranks: Ranks, references: Path, how: dict[str, object]) -> None:
    check(ranks, references, "fsdp", 2, "llama", 0.3, **how)


def test_each_adapter_loses_its_own_share(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.lora:dropped", 1)
    assert found["lost"] == pytest.approx([0.3] * 7, abs=0.05)
    assert found["mean"] == pytest.approx([1.0] * 7, abs=0.07)
    assert found["alike"][0] == pytest.approx(0.7**2 + 0.3**2, abs=0.05), "masks of two adapters are independent"


@pytest.mark.parametrize(
    "how",
    [
        {"remat": "full"},
        {"remat": "selective", "micros": 3},
        pytest.param({"how": "block"}, marks=pytest.mark.slow),
        pytest.param({"how": "step", "remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_remat_and_compile_change_nothing(ranks: Ranks, references: Path, how: dict[str, object]) -> None:
    check(ranks, references, "fsdp", 2, "llama", **how)


@pytest.mark.slow
@pytest.mark.parametrize("case", [(*place, model) for place in PLACES for model in MODELS], ids=name)
def test_every_mesh_equals_one_device(ranks: Ranks, references: Path, case: tuple[str, int, str]) -> None:
    check(ranks, references, *case)


@pytest.mark.parametrize("case", [("single", 1, "llama"), ("fsdp_tensor", 4, "mistral"), ("ulysses", 2, "gpt")], ids=name)
def test_merged_equals_apart(ranks: Ranks, case: tuple[str, int, str]) -> None:
    table, world, model = case
    found = ranks.run("tests.cases.lora:merged", world, table=table, world=world, model=model)
    assert found["error"] < 1e-9, found
    assert found["change"] > 1e-3, "the adapters do nothing"


LAYERS, BASE = 2, 7


def test_the_frozen_model_takes_no_gradient_products(ranks: Ranks) -> None:
    found = ranks.run("tests.cases.lora:counts", 1, table="single", world=1, model="llama")
    # Forward: the model's products, the head's, two of each adapter. Backward: nothing for the model's weights; inputs' gradients but for
    # query, key and value of the first layer, whose input is frozen; two products for A and B and one between them for each adapter.
    inputs = BASE * LAYERS - 3
    want = (BASE * LAYERS + 1) + 2 * BASE * LAYERS + (inputs + 1) + (2 * BASE * LAYERS + BASE * LAYERS + inputs)
    assert found["mm"] == want, found


@pytest.mark.parametrize(
    ("how", "remat"),
    [("step", "none"), ("block", "full"), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("step", "full"), ("block", "none")))],
)
def test_the_frozen_model_scatters_no_gradients(ranks: Ranks, how: str, remat: str) -> None:
    found = ranks.capture("tests.cases.lora:counts", 2, table="fsdp", world=2, model="llama", how=how, remat=remat)
    # Of each adapter A or B is split, and its gradient scattered; no weight is. (The first layer, whose input has no gradient, is a
    # block of its own.)
    assert found["reduce_scatter"] == BASE * LAYERS, found


def test_targets_are_axes_or_names() -> None:
    def of(*targets: str) -> set[str]:
        return set(adapter_specs(decoder.specs(MODELS["llama"]), Lora(2, 4.0, targets))["layers"])

    assert of("heads") == {"query", "out"}
    assert of("kv_heads") == {"key", "value"}
    assert of("mlp", "value") == {"up", "gate", "down", "value"}
    assert of("embed") == {"query", "key", "value", "out", "up", "gate", "down"}
    gpt = adapter_specs(decoder.specs(MODELS["gpt"]), Lora(2, 4.0, ("mlp",)))
    assert set(gpt["layers"]) == {"up", "down"}, "a model without a gate has no adapter for one"
    assert count(gpt) == 2 * 2 * 2 * (32 + 64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha is 0.0"),
        ({"rank": 2, "targets": ("querry",)}, "Did you mean 'query'"),
        ({"rank": 2, "targets": ()}, "lora.targets is empty"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Lora(**settings)  # type: ignore[arg-type]


def test_targets_that_a_model_lacks() -> None:
    with pytest.raises(UserError, match="name no projection of this model"):
        adapter_specs(decoder.specs(MODELS["gpt"]), Lora(2, 4.0, ("gate",)))
