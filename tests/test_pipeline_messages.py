"""Messages on GPUs, on paper: whatever the table and whenever streams get on, the right values arrive and nothing stops for ever."""

import random
from typing import Any

import pytest
import torch

from mtl.kernels import counters
from mtl.pipeline.links import Traffic
from mtl.pipeline.mail import Mail, slots
from mtl.pipeline.run import run
from mtl.pipeline.schedules import build
from mtl.pipeline.simulate import simulate
from mtl.pipeline.table import Table, check, parse
from tests.streams import Communicators, Gpus, Paper, PaperBox, Stream, random_table

BUILT = [(p, m, name) for p in (2, 3, 4) for m in (p, 2 * p + 1, 9) for name in ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")]


def tables() -> list[Table]:
    """Give the builders' tables and any others."""
    found = [build(name, p, m, 3 if name == "interleaved" else None) for p, m, name in BUILT]
    for seed in range(150):
        table = random_table(random.Random(seed))
        check(table)
        simulate(table)
        found.append(table)
    return found


TABLES = tables()


def play(table: Table, traffic: Any, gpus: Gpus, seed: int) -> None:
    """Let every device issue all its work, then let the streams go."""
    done = []
    for device in range(table.devices):
        gpus.current = gpus.main[device]
        work: Any = Paper(gpus, table)
        run(table, device, work, traffic(device))
        done.append((work, [str(a) for a in table.rows[device]]))
    assert gpus.play(random.Random(seed)), f"{table.name} stands still:\n{table}"
    assert all(work.done == row for work, row in done)


@pytest.mark.parametrize("seed", range(3))
def test_communicators_never_stop(seed: int) -> None:
    """Each direction between two devices is a communicator: in order at both ends, one operation at a time."""
    for table in TABLES:
        gpus = Gpus(table.devices)
        streams: list[dict[Any, Stream]] = [{} for _ in range(table.devices)]
        links: list[Any] = [Communicators(gpus, d, streams[d]) for d in range(table.devices)]
        play(table, lambda d, t=table, k=links: Traffic(k[d], t, (1,), torch.float32, torch.device("cpu")), gpus, seed)


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> list[Gpus]:
    """Put the streams of CUDA on paper: those of the last `Gpus` in the list that is given."""
    made: list[Gpus] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made[-1].current)
    for place, name, does in ((torch.cuda, "stream", "on"), (counters, "write", "write"), (counters, "wait", "wait")):
        monkeypatch.setattr(place, name, lambda *args, does=does: getattr(made[-1], does)(*args))
    return made


def by_mail(table: Table, gpus: Gpus, seed: int) -> None:
    """Run a table three times through mailboxes."""
    sources = tuple(tuple(a for a, b in table.messages() if b == d) for d in range(table.devices))
    boxes = [PaperBox("group", sources) for _ in range(table.devices)]
    for rank, box in enumerate(boxes):
        box.gpus, box.rank = gpus, rank
    opened = set[int]()

    def traffic(device: int) -> Mail:
        box, known = boxes[device], device in opened
        opened.add(device)
        if known:
            box.open = lambda slots, size: None  # pyright: ignore
        return Mail(box, table, device, (1,), torch.uint8)

    for i in range(3):
        play(table, traffic, gpus, seed + i)


@pytest.mark.parametrize("seed", range(3))
def test_mailboxes_never_stop(on_paper: list[Gpus], seed: int) -> None:
    for table in TABLES:
        on_paper.append(Gpus(table.devices))
        by_mail(table, on_paper[-1], seed)


def greedy(micros: int) -> Table:
    """Make a table whose first device sends the second all its messages before it makes what the second waits for by way of the third."""
    every = range(micros)
    first = [*(f"0F{m}" for m in every), *(f"2F{m}" for m in every), *(f"{s}B{m}" for m in every for s in (2, 0))]
    second = [*(f"{s}F{m}" for m in every for s in (1, 4)), *(f"{s}B{m}" for m in every for s in (4, 1))]
    third = [*(f"3F{m}" for m in every), *(f"3B{m}" for m in every)]
    return parse("\n".join(" ".join(row) for row in (first, second, third)), "greedy")


def test_a_table_gets_the_slots_that_it_needs(on_paper: list[Gpus], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(slots(table) <= 4 for table in TABLES)
    table = greedy(10)
    assert slots(table) == 9
    on_paper.append(Gpus(3))
    by_mail(table, on_paper[-1], 0)
    monkeypatch.setattr("mtl.pipeline.mail.slots", lambda table: 4)
    on_paper.append(Gpus(3))
    with pytest.raises(AssertionError, match="stands still"):
        by_mail(table, on_paper[-1], 0)
