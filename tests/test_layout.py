"""`mtl layout`: every byte is where it says, for any rules and mesh, equal to what ranks hold; its page says the same."""

import json
import math
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sharding_rules
from experiments.presets import PRESETS
from mtl.cli import layout
from mtl.errors import UserError
from mtl.inspect.mesh import coordinates, members, number, parse_mesh
from mtl.inspect.page import layout_page
from mtl.inspect.picture import Picture
from mtl.inspect.placement import Array, find_array, notation, table
from mtl.models import decoder
from mtl.precision import PRECISIONS
from mtl.sharding.layout import Layout
from mtl.sharding.mesh import MeshShape
from tests import browser
from tests.ranks import Ranks
from tests.small import MESHES, MODELS

BF16 = PRECISIONS["bf16"]
AXES = ("replica", "fsdp", "context", "tensor")


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Draw an array of up to three dimensions on a mesh of up to four axes, also where sizes do not divide."""
    mesh = MeshShape(**{axis: draw(st.integers(1, 3)) for axis in AXES})
    free = list(draw(st.permutations(AXES)))
    dims = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, min(2, len(free))))
        dims.append(tuple(sorted(free[:count], key=AXES.index)))
        free = free[count:]
    shape = tuple(draw(st.integers(1, 13)) for _ in dims)
    return Array("x", "DHK"[: len(dims)], shape, Layout(tuple(dims)), mesh)


@given(arrays())
@settings(max_examples=80, deadline=None)
def test_parts_cover_the_array_once_and_holders_are_those_that_hold(array: Array) -> None:
    held: dict[tuple[int, ...], list[int]] = {}
    for device in range(array.mesh.devices()):
        held.setdefault(array.slot(device), []).append(device)
    assert len(held) == array.parts()
    covered = [0] * math.prod(array.shape)
    for slot, devices in held.items():
        assert list(array.holders(slot)) == devices
        assert len(devices) == array.copies()
        assert len({array.box(d) for d in devices}) == 1
        offset, local = array.box(devices[0])
        for flat in range(len(covered)):
            place, left = [], flat
            for n in reversed(array.shape):
                left, i = divmod(left, n)
                place.insert(0, i)
            covered[flat] += all(o <= i < o + n for i, o, n in zip(place, offset, local, strict=True))
    assert covered == [1] * len(covered)
    repr(Picture(array, 0))


@given(st.tuples(*(st.integers(1, 3) for _ in AXES)), st.data())
def test_devices_are_numbered_as_ranks_are(sizes: tuple[int, ...], data: st.DataObject) -> None:
    mesh = MeshShape(**dict(zip(AXES, sizes, strict=True)))
    device = data.draw(st.integers(0, mesh.devices() - 1))
    assert number(mesh, coordinates(mesh, device)) == device
    assert device in members(mesh, AXES[1:3], device)
    assert members(mesh, ("tensor",), 0) == list(range(mesh.tensor))


@pytest.mark.parametrize("model", ["llama", "gpt", "falcon"])
def test_local_shapes_are_what_ranks_hold(ranks: Ranks, model: str) -> None:
    for name, worlds in MESHES.items():
        world = max(n for n in worlds if n <= 4)
        held = ranks.run("tests.cases.inspect:local_shapes", world, table=name, world=world, model=model)
        for device in range(world):
            rows = table(decoder.specs(MODELS[model]), sharding_rules.load(name), worlds[world], PRECISIONS["fp64"], device).rows
            assert {r.path: list(r.local) for r in rows} == held[device], (name, device)


def test_llama3_70b_by_hand() -> None:
    """64 x 8: query 80 x 8192 x 64 x 128, embed over 64 and heads over 8, in float32 at rest and bfloat16 in use."""
    found = table(decoder.specs(PRESETS["llama3_70b"].model), sharding_rules.load("fsdp_tensor"), MeshShape(fsdp=64, tensor=8), BF16, 17)
    rows = {r.path: r for r in found.rows}
    query = rows["layers.query.weight"]
    assert query.local == (80, 128, 8, 128)
    assert query.offset == (0, 256, 8, 0)  # device 17 is fsdp 2, tensor 1
    assert query.rest_bytes == 80 * 128 * 8 * 128 * 4
    assert query.gathered_bytes == 80 * 8192 * 8 * 128 * 2
    assert query.layer_bytes == 8192 * 8 * 128 * 2
    assert query.notation == "[L, D_fsdp, H_tensor, K]"
    assert rows["layers.norm1.weight"].copies == 512
    total = sum(math.prod(s.local) for s in found.rows) * 4
    assert found.rest_bytes == total
    assert found.replicated_bytes == (80 * 2 + 1) * 8192 * 4
    assert not any(r.flagged for r in found.rows)


def test_replicated_bytes_are_flagged_over_the_share() -> None:
    specs = decoder.specs(PRESETS["tiny"].model)
    rows = table(specs, sharding_rules.load("ddp"), MeshShape(replica=2), BF16, share=0.05).rows
    total = sum(r.rest_bytes for r in rows)
    assert {r.path for r in rows if r.flagged} == {r.path for r in rows if r.rest_bytes > 0.05 * total} != set()
    alone = table(specs, sharding_rules.load("single"), MeshShape(), BF16)
    assert not any(r.flagged for r in alone.rows)


def test_sixteen_thousand_devices_are_quick() -> None:
    start = time.process_time()
    mesh = MeshShape(replica=16, fsdp=64, tensor=16)
    found = table(decoder.specs(PRESETS["gpt3_175b"].model), sharding_rules.load("fsdp_tensor"), mesh, BF16, 16383)
    layout_page(found, "gpt3_175b")
    assert time.process_time() - start < 5


def test_notation() -> None:
    assert notation("LDHK", Layout(((), ("fsdp", "context"), ("tensor",), ()))) == "[L, D_{fsdp,context}, H_tensor, K]"
    assert notation("BD", Layout(((), ()), ("tensor",))) == "[B, D] {sum over tensor}"


def test_activations_have_pictures_too() -> None:
    preset = PRESETS["tiny"]
    sizes = {**decoder.sizes(preset.model), "batch": 4, "residual_seq": 256}
    array = find_array("BRD", decoder.specs(preset.model), sharding_rules.load("tensor"), MeshShape(replica=2, tensor=4), sizes)
    assert array.notation() == "[B_replica, R_tensor, D]"
    text = repr(Picture(array, 5))
    assert "8 parts" in text
    assert "5*" in text
    assert "residual_seq" not in text
    svg = Picture(array, 5)._repr_html_()
    assert svg.count("<rect") == 8
    assert "R 64:128 on device 5" in svg


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--preset lama3_8b", ["unknown preset 'lama3_8b'", "Did you mean 'llama3_8b'"]),
        ("--mesh fdsp=8", ["unknown mesh axis 'fdsp'", "Did you mean 'fsdp'"]),
        ("--mesh fsdp=0", ["fsdp=0", "at least 1"]),
        ("--mesh fsdp=2,fsdp=4", ["names fsdp twice"]),
        ("--mesh tensor=7", ["heads of size 32 does not divide by tensor=7", "tensor could be 1, 2, 4, 8, 16, 32."]),
        ("--mesh fsdp=3", ["embed of size 4096 does not divide by fsdp=3", "1, 2, 4, 8"]),
        ("--mesh fsdp=8 --device 8", ["device 8 is not on the mesh", "0 to 7"]),
        ("--mesh fsdp=8 --rules ddp", ["never use mesh axis fsdp=8"]),
        ("--rules nosuch", ["unknown rules table 'nosuch'"]),
        ("--array layers.qery.weight", ["unknown array", "layers.query.weight"]),
        ("--html /nowhere/page.html", ["/nowhere/page.html cannot be written"]),
        ("--share 2", ["--share is 2"]),
    ],
)
def test_bad_input_is_one_message(arguments: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        layout.main(arguments.split())
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_command_prints_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    layout.main(["--preset", "llama3_70b", "--mesh", "fsdp=64,tensor=8", "--device", "17", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_at_rest"] == sum(row["bytes_at_rest"] for row in found["parameters"])
    layout.main(["--preset", "llama3_70b", "--mesh=fsdp=64,tensor=8", "--device", "17", "--array", "layers.query.weight"])
    text = capsys.readouterr().out
    assert "device 17 (fsdp=2, tensor=1)" in text
    assert "[L, D_fsdp, H_tensor, K]" in text
    assert "17*" in text


@browser.needed
def test_the_page_says_the_same_numbers_and_fits_a_phone(tmp_path: Path) -> None:
    page = tmp_path / "layout.html"
    layout.main(["--preset", "llama3_70b", "--mesh", "fsdp=64,tensor=8", "--device", "17", "--html", str(page)])
    found = table(decoder.specs(PRESETS["llama3_70b"].model), sharding_rules.load("fsdp_tensor"), parse_mesh("fsdp=64,tensor=8"), BF16, 17)
    index = next(i for i, r in enumerate(found.rows) if r.path == "layers.query.weight")
    shown = browser.text_of(page, f"#array={index}&device=100")
    assert "http" not in page.read_text(), "a page needs no network"
    assert re.search(rf'id="rest" data-bytes="{found.rest_bytes}"', shown)
    body = re.search(r"<tbody>.*</tbody>", shown, re.S)
    assert body
    numbers = [[int(n) for n in re.findall(r'data-bytes="(\d+)"', row)] for row in re.findall(r"<tr.*?</tr>", body[0], re.S)]
    assert numbers == [[r.rest_bytes, r.gathered_bytes, r.layer_bytes] for r in found.rows]
    readout = re.search(r'id="readout"[^>]*>([^<]*)<', shown)
    assert readout
    # device 100 is fsdp 12, tensor 4: its script's arithmetic against ours
    offset, local = find_array("layers.query.weight", decoder.specs(PRESETS["llama3_70b"].model), sharding_rules.load("fsdp_tensor"),
                               parse_mesh("fsdp=64,tensor=8"), {}).box(100)  # fmt: skip
    assert f"embed {offset[1]}:{offset[1] + local[1]}, heads {offset[2]}:{offset[2] + local[2]}" in readout[1]
    picture = Image.open(browser.screenshot(page, tmp_path / "page.png", 500, 1400, f"#array={index}")).convert("RGB")
    assert picture.size == (500, 1400)
    colours = {picture.getpixel((40 + 55 * i, 350)) for i in range(8)}
    assert len(colours) >= 7, "the parts along tensor have colours of their own"
