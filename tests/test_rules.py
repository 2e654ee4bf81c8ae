"""Rules tables: all load, are total, and bad ones or bad meshes end in one clear error."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sharding_rules
from experiments.presets import PRESETS
from mtl import tree
from mtl.axes import ACTIVATION_AXES, MESH_AXES, PARAM_AXES, names
from mtl.errors import UserError
from mtl.models import decoder
from mtl.params import abstract, count, layouts, table
from mtl.sharding.mesh import MeshShape
from mtl.sharding.rules import check_mesh
from tests.small import LLAMA, MESHES

SHIPPED = sharding_rules.names()


def test_the_shipped_tables_are_the_ones_named() -> None:
    assert {"single", "ddp", "zero1", "fsdp", "hsdp", "tensor", "fsdp_tensor", "context", "ring", "ulysses", "fsdp_context_tensor"} <= set(
        SHIPPED
    )
    assert set(SHIPPED) == set(MESHES), "every table is in the parity matrix"


@pytest.mark.parametrize("name", SHIPPED)
def test_tables_are_total(name: str) -> None:
    rules = sharding_rules.load(name)
    assert set(rules.store) == set(rules.compute) == set(PARAM_AXES)
    assert set(rules.act) == set(ACTIVATION_AXES)


def test_fsdp_is_the_difference_between_store_and_compute() -> None:
    rules = sharding_rules.load("fsdp")
    assert rules.store["embed"] == ("pipe", "fsdp") and rules.compute["embed"] == ()


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        (MeshShape(), "single"),
        (MeshShape(replica=4), "ddp"),
        (MeshShape(fsdp=4), "fsdp"),
        (MeshShape(replica=2, fsdp=2), "hsdp"),
        (MeshShape(tensor=4), "tensor"),
        (MeshShape(replica=2, tensor=2), "tensor"),
        (MeshShape(fsdp=2, tensor=2), "fsdp_tensor"),
        (MeshShape(context=2), "context"),
        (MeshShape(context=2, tensor=2), "fsdp_context_tensor"),
    ],
)
def test_a_table_is_chosen_from_the_mesh(shape: MeshShape, want: str) -> None:
    assert sharding_rules.choose(shape) == want
    check_mesh(sharding_rules.load(want), shape)


def test_unknown_table_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'fsdp_tensor'"):
        sharding_rules.load("fsdp_tensr")


def test_idle_axis() -> None:
    with pytest.raises(UserError, match=r"never use mesh axis tensor=2"):
        check_mesh(sharding_rules.load("fsdp"), MeshShape(tensor=2))


@pytest.mark.parametrize(("shape", "world"), [(MeshShape(tensor=3), 4), (MeshShape(fsdp=2), 1), (MeshShape(fsdp=-1, tensor=3), 4)])
def test_mesh_that_is_not_the_world(shape: MeshShape, world: int) -> None:
    with pytest.raises(UserError, match=r"process(es run| runs)"):
        shape.fill(world)


def test_two_free_axes() -> None:
    with pytest.raises(UserError, match="both -1"):
        MeshShape(fsdp=-1, tensor=-1).fill(8)


def test_indivisible_dim_names_path_shape_axes_and_mesh() -> None:
    with pytest.raises(UserError) as caught:
        layouts(decoder.specs(replace(LLAMA, heads=6, kv_heads=2)), sharding_rules.load("tensor"), MeshShape(tensor=4))
    message = str(caught.value)
    for part in ("layers.query.weight", "(2, 32, 6, 4)", "layers, embed, heads, head", "tensor=4", "'tensor'", "heads of size 6"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('BASE = "fsdp"\nSTORE = {"embd": ("fsdp",)}', "Did you mean 'embed'"),
        ('BASE = "fsdp"\nSTORE = {"embed": ("fdsp",)}', "Did you mean 'fsdp'"),
        ('STORE = {"embed": ()}', "STORE has no row for"),
        ('BASE = "fsdp"\nSTORE = {"embed": "fsdp"}', "expected a tuple of names"),
        ('BASE = "fsdp"\nSTORE = dict(embed=())', "not a plain value"),
        ("import os", "assignments of plain values alone"),
        ("STORE = {", "cannot read"),
        ('BASE = "tensor"\nACT = {"vocab": ()}', "ACT\\['vocab'\\] is \\(\\) but COMPUTE"),
        ('BASE = "fsdp"\nCOMPUTE = {"mlp": ("fsdp",)}', "must start with COMPUTE"),
        ('BASE = "fsdp"\nACT = {"embed": ("fsdp",)}', "embed must stay whole"),
        ('BASE = "hsdp"\nACT = {"batch": ("fsdp", "replica")}', "must come in mesh order"),
        ('BASE = "nothing"', "unknown BASE"),
        ('BASE = "fsdp"\nGATHER = "never"', "unknown GATHER"),
        ('BASE = "fsdp"\nSPEED = "fast"', "unknown setting"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        sharding_rules.load(str(path))


def test_two_dims_on_one_mesh_axis(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nBASE = "fsdp"\nSTORE = {"embed": ("fsdp",), "mlp": ("fsdp",)}\n')
    with pytest.raises(UserError, match=r"layers.up.weight.*'fsdp' splits two dimensions"):
        layouts(decoder.specs(LLAMA), sharding_rules.load(str(path)), MeshShape(fsdp=2))


def test_a_users_table_is_read_as_data(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nBASE = "hsdp"\nSTORE = {"embed": ("replica", "fsdp")}\n')
    rules = sharding_rules.load(str(path))
    assert rules.name == "mine" and rules.store["embed"] == ("replica", "fsdp") and rules.act == sharding_rules.load("hsdp").act


@given(sizes=st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 6), name=st.sampled_from(SHIPPED), embed=st.integers(1, 64))
def test_layouts_fit_or_refuse(sizes: tuple[int, ...], name: str, embed: int) -> None:
    """Whatever the mesh: a layout whose parts divide (or may be uneven), or a UserError."""
    mesh, rules = MeshShape(*sizes), sharding_rules.load(name)
    shape = (2, embed * 8, 24, 4)
    try:
        layout = rules.layout("store", names("LDHK"), shape, mesh, "parameter 'x'")
    except UserError as error:
        assert "parameter 'x'" in str(error)
        return
    used = layout.used()
    assert len(set(used)) == len(used) and all(getattr(mesh, a) > 1 for a in used)
    for size, axes in zip(shape, layout.dims, strict=True):
        parts = 1
        for axis in axes:
            parts *= getattr(mesh, axis)
        assert size % parts == 0 or axes == ("pipe",)  # layers are padded


def test_parameter_table_shows_every_parameter() -> None:
    text = table(decoder.specs(LLAMA), sharding_rules.load("fsdp_tensor"), MeshShape(fsdp=2, tensor=4))
    assert "layers.query.weight" in text and "[-, fsdp, tensor, -]" in text


def test_abstract_trees_have_shapes_and_no_memory() -> None:
    specs = decoder.specs(PRESETS["gpt3_175b"].model)
    leaves = tree.leaves(abstract(specs, torch.bfloat16))
    assert all(x.device.type == "meta" and x.dtype == torch.bfloat16 for x in leaves)
    assert sum(x.numel() for x in leaves) == count(specs) > 174e9


def test_mesh_axes_are_the_ones_declared() -> None:
    assert tuple(MeshShape().sizes()) == MESH_AXES
