"""Pipelines as data: tables print and parse, builders keep their promises for any numbers, the simulator agrees with the closed forms."""

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import pipeline
from mtl.errors import UserError
from mtl.pipeline import draw
from mtl.pipeline.schedules import BUILDERS, build, forwards
from mtl.pipeline.simulate import Costs, closed_bubble, simulate
from mtl.pipeline.table import Action, Table, after, check, parse

ROOT = Path(__file__).parent.parent
COST = st.floats(0.1, 10.0)


@st.composite
def sizes(draw_: st.DrawFn) -> tuple[str, int, int, int | None]:
    """Draw a schedule and numbers that it can do."""
    name = draw_(st.sampled_from(sorted(BUILDERS)))
    devices = draw_(st.integers(1, 12))
    micros = draw_(st.integers(1 if name == "gpipe" else devices, 3 * devices + 5))
    return name, devices, micros, draw_(st.integers(1, 5)) if name == "interleaved" else None


def promise(name: str, devices: int, micros: int, virtual: int, device: int) -> int:
    """Say how many activations (of one stage, one micro-batch) a device may store at most."""
    first = micros // max(1, micros // devices) + (micros % max(1, micros // devices) > 0)
    return {
        "gpipe": micros,
        "1f1b": min(micros, devices - device),
        "zb_h1": min(micros, devices),
        "zb_v": 2 * min(micros, devices),
        "interleaved": min(virtual * micros, 2 * (devices - 1 - device) + (virtual - 1) * first + 1) if virtual > 1 else devices - device,
    }[name]


@given(sizes(), COST, COST, COST, st.floats(0.0, 3.0))
@settings(max_examples=300, deadline=None)
def test_every_builder_is_valid_and_keeps_its_promise(numbers: tuple[str, int, int, int | None], f: float, b: float, w: float, send: float):
    name, devices, micros, virtual = numbers
    table = build(name, devices, micros, virtual)
    check(table)
    found = simulate(table, Costs(f, b, w, send))  # deadlock is an error
    per_device = table.stages // devices
    assert (table.devices, table.microbatches, per_device) == (devices, micros, virtual or (2 if name in ("interleaved", "zb_v") else 1))
    counts = {kind: [a for row in table.rows for a in row if a.kind == kind] for kind in "FBW"}
    everything = set(itertools.product(range(table.stages), range(micros)))
    for kind in "FBW" if name.startswith("zb") else "FB":
        assert len(counts[kind]) == len(everything) and {(a.stage, a.micro) for a in counts[kind]} == everything
    assert name.startswith("zb") or not counts["W"]
    assert all(a <= promise(name, devices, micros, per_device, d) for d, a in enumerate(found.stored))
    assert parse(str(table), name) == table == parse(str(table).replace(" ", ", "), name)
    for row in found.spans:
        assert all(x.end <= y.start + 1e-9 for x, y in itertools.pairwise(row)), "a device does one thing at a time"
    ends = {s.action: s for row in found.spans for s in row}
    for action, span in ends.items():
        need = table.needs(action)
        if need is not None:
            away = send if ends[need].device != span.device else 0.0
            assert span.start >= ends[need].end + away - 1e-9, "nothing starts before what it needs has come"
    assert 0.0 <= found.bubble < 1.0


@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 5), COST, COST, COST)
@settings(max_examples=150, deadline=None)
def test_bubbles_match_the_closed_forms(devices: int, rounds: int, virtual: int, f: float, b: float, w: float):
    micros = rounds * devices
    costs = Costs(f, b, w)
    for name in ("gpipe", "1f1b"):
        assert simulate(build(name, devices, micros), costs).bubble == pytest.approx(closed_bubble(devices, micros), abs=1e-9)
    found = simulate(build("interleaved", devices, micros, virtual), costs).bubble
    assert found == pytest.approx(closed_bubble(devices, micros, virtual), abs=1e-9)


@given(st.integers(1, 10), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_zero_bubble_schedules_leave_what_their_papers_say(devices: int, more: int):
    h1 = simulate(build("zb_h1", devices, devices + more))
    assert h1.length == pytest.approx(3 * (devices + more) + devices - 1), "(p - 1)(f + b - w) is left of (p - 1)(f + b + w)"
    micros = 2 * devices - 1 + more
    v = simulate(build("zb_v", devices, micros))
    assert v.length == pytest.approx(6 * micros + devices - 1), "half a stage a device"


def test_uneven_work_and_sending_cost_time() -> None:
    table = build("1f1b", 2, 4)
    even = simulate(table)
    assert simulate(table, Costs(work=(1.0, 2.0))).length > even.length
    assert simulate(table, Costs(send=1.0)).length > even.length
    with pytest.raises(UserError, match="work for 3 stages, but schedule '1f1b' has 2"):
        simulate(table, Costs(work=(1.0, 2.0, 3.0)))


def test_forwards_alone_fill_the_pipeline() -> None:
    for name in BUILDERS:
        table = build(name, 4, 8)
        alone = forwards(table.place, 5)
        assert {a for row in alone.rows for a in row} == {Action(s, "F", m) for s in range(table.stages) for m in range(5)}
        assert alone.place == table.place
        simulate(alone)


BAD = {
    "nonsense": ("0F0 0X0", "line 1: '0X0' is no action"),
    "empty": ("# nothing", "has no actions"),
    "twice": ("0F0 0B0 0F0", "0F0 stands twice"),
    "missing": ("0F0 0B0 0F1", "0B1 is missing"),
    "early": ("0B0 0F0", "0B0 comes before 0F0"),
    "weight": ("0F0 0W0 0B0", "0W0 comes before 0B0"),
    "two homes": ("0F0 0B0 1F0\n1B0", "stage 1 is on device"),
    "stage gap": ("0F0 0B0\n2F0 2B0", "nothing of stage 1"),
    "micro gap": ("0F0 0B0 0F2 0B2", "nothing of micro-batch 1"),
    "deadlock": (
        "0F0 0B0 0F1 0B1\n1F1 1F0 1B0 1B1",
        "deadlocks: device 0 at 0B0, which waits for 1B0; device 1 at 1F1, which",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_say_what_and_where(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        build(str(path), max(1, len([line for line in text.splitlines() if line])), None)
    assert message in str(caught.value)


REFUSED = [
    (("1f1b", 4, 3), "pipeline.microbatches is 3: too few for schedule 1f1b over 4"),
    (("interleaved", 4, 2, 2), "too few for schedule interleaved"),
    (("zb_v", 4, 8, 3), "pipeline.virtual is 3, but schedule zb_v has 2"),
    (("1f1b", 4, 8, 2), "use interleaved"),
    (("interleved", 4, 8), "Did you mean 'interleaved'"),
    (("none/such.txt", 4, 8), "there is no such file"),
    (("1f1b", 4, 0), "each must be at least 1"),
    (("1f1b", 4, None), "needs a number of micro-batches"),
]


@pytest.mark.parametrize(("numbers", "message"), REFUSED)
def test_numbers_that_cannot_be_are_refused(numbers: tuple, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(*numbers)
    assert message in str(caught.value)


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# two devices\n0F0 0F1 0B0 0B1 0W1 0W0\n\n1F0 1B0 1F1 1B1  # weights at once\n")
    table = build(str(path), 2, None)
    assert (table.devices, table.stages, table.microbatches) == (2, 2, 2) and table.split == {(0, 0), (0, 1)}
    assert table.frees(Action(0, "W", 0)) and not table.frees(Action(0, "B", 0)) and table.frees(Action(1, "B", 0))
    for numbers, message in (((3, None), "lines for 2 devices"), ((2, 5), "has 2 micro-batches"), ((2, 2, 2), "has 2 stages on 2 devices")):
        with pytest.raises(UserError, match=message):
            build(str(path), *numbers)


def test_simulating_needs_no_torch() -> None:
    code = "import sys, mtl.pipeline.schedules, mtl.pipeline.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_draws_svg_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    rows = [[["0F0", 0.0, 0.1], ["0B0", 0.4, 0.6]], [["1F0", 0.1, 0.2], ["1B0", 0.2, 0.4]]]
    (tmp_path / "run/pipeline.jsonl").write_text(json.dumps({"step": 7, "rows": rows}) + "\n")
    for name in ("a.svg", "a.png"):
        pipeline.show(pipeline.Show("zb_v", 2, 4, out=tmp_path / name, run=tmp_path / "run"))
    said = capsys.readouterr().out
    assert "time 25, bubble 0.0400" in said and "measured: time 0.6 s, bubble 0.5000" in said
    picture = ET.fromstring((tmp_path / "a.svg").read_text())
    fills = [rect.get("fill") for rect in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert sum(fill in draw.COLOURS.values() or fill in draw.LATER.values() for fill in fills) == 2 * 2 * 4 * 3 + 4 + 3 + 2
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:]
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start])
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert len(zlib.decompress(data[start + 4 : start + 4 + length])) == height * (1 + 3 * width)
    with pytest.raises(UserError, match=r"must end in \.svg or \.png"):
        pipeline.show(pipeline.Show("1f1b", 2, 4, out=tmp_path / "a.jpg"))
    pipeline.show(pipeline.Show("1f1b", 2, 4, out=tmp_path / "A.SVG"))
    assert ET.fromstring((tmp_path / "A.SVG").read_text()).tag.endswith("svg")


def test_words_of_a_picture_stay_inside() -> None:
    """In a PNG words that begin left of it would come out at the right edge."""
    marks, _ = draw.layout([simulate(build("1f1b", 101, 101))])
    labels = [m for m in marks if m.words.startswith("device")]
    assert len(labels) == 101 and all(m.x - (len(m.words) * 8 - 2) >= 0 for m in labels)
    found = draw.png([draw.Mark(5, 0, 0, 20, None, "device 1", "end")], (200, 20))
    start = found.index(b"IDAT")
    points = np.frombuffer(zlib.decompress(found[start + 4 :]), np.uint8).reshape(20, -1)[:, 1:].reshape(20, 200, 3)
    assert (points[:, :62] < 255).any() and (points[:, 62:] == 255).all()
    long = simulate(parse("0F0 0B0", "folder/" * 40 + "mine.txt"))
    title = next(m.words for m in draw.layout([long])[0] if "bubble" in m.words)
    assert title.startswith("...") and "mine.txt: time 3" in title and len(title) < 110


def test_the_command_names_its_own_flags(tmp_path: Path) -> None:
    """A schedule's errors name the flags of a run, which are others."""
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    for wanted, says in (
        (pipeline.Show("1f1b", 4, 3), "--microbatches is 3: too few"),
        (pipeline.Show("1F1B", 4, 8), "unknown --schedule '1F1B'. Did you mean '1f1b'?"),
        (pipeline.Show(str(empty)), "has no actions: expected one line a device"),
    ):
        with pytest.raises(UserError, match=re.escape(says)) as caught:
            pipeline.show(wanted)
        assert "pipeline." not in str(caught.value)
    for name, value in (("forward", 0.0), ("forward", -1.0), ("weight", float("nan")), ("send", float("inf"))):
        with pytest.raises(UserError, match=rf"--costs.{name} is {value}"):
            Costs(**{name: value})


def test_a_table_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("0F0 0B0\r\n", "utf-8-sig")
    assert build(str(path), 1, None).rows == ((Action(0, "F", 0), Action(0, "B", 0)),)


def reached(table: Table, device: int, limit: int) -> set[Action]:
    """Run a table as far as it goes while one device does no more than its first actions."""
    done: set[Action] = set()
    at = [0] * table.devices
    while True:
        ready = [
            d
            for d, row in enumerate(table.rows)
            if at[d] < (limit if d == device else len(row)) and (table.needs(row[at[d]]) is None or table.needs(row[at[d]]) in done)
        ]
        if not ready:
            return done
        for d in ready:
            done.add(table.rows[d][at[d]])
            at[d] += 1


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"])
def test_what_a_message_waits_for_is_known(schedule: str) -> None:
    """So many of a device's actions and not one less must be done before another's can be; in the steady state receives are early."""
    table = build(schedule, 3, 6)
    early = 0
    for device in range(3):
        known = after(table, device)
        for goal in table.rows[device]:
            source = table.needs(goal)
            if source is None or table.place[source.stage] == device:
                continue
            count = known[source]
            assert source in reached(table, device, count) and (count == 0 or source not in reached(table, device, count - 1))
            early += count < table.rows[device].index(goal)
    assert early > 6
