"""README.md and docs/*.md say what is there: the tree, the set-up commands, links, commands and the worked table."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

import sharding_rules
from experiments import pretrain, tree
from experiments.bench.step import Bench
from experiments.presets import PRESETS
from mtl.precision import PRECISIONS
from mtl.runtime import process

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, language: str) -> list[str]:
    """List a page's fenced blocks of one language."""
    return [body for name, body in BLOCK.findall(page.read_text()) if name == language]


def commands() -> list[tuple[Path, list[str]]]:
    """List every command of every ``bash`` block that runs one of our scripts, as words."""
    found: list[tuple[Path, list[str]]] = []
    for page in PAGES:
        for body in blocks(page, "bash"):
            for line in re.split(r"\n|&&", body.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                if any(w.startswith("experiments/") for w in words):
                    found.append((page, words))
    return found


def write_tables(folder: Path) -> list[Path]:
    """Write every table that a page shows in full (its first line names the file) where a command would look for it."""
    written: list[Path] = []
    for page in PAGES:
        for body in blocks(page, "python"):
            place = re.match(r"# (\S+\.py)\n", body)
            if place:
                written.append(folder / place[1])
                written[-1].parent.mkdir(parents=True, exist_ok=True)
                written[-1].write_text(body)
    return written


def test_the_tree_is_what_the_script_draws() -> None:
    text = README.read_text()
    assert tree.spliced(text, tree.draw(ROOT)) == text, "run: python experiments/tree.py --write"


def test_the_readme_has_two_set_up_commands() -> None:
    install, test = (body.strip() for body in blocks(README, "bash"))
    assert install == "pip install -e . && python experiments/pretrain.py"
    assert test == "pip install -e '.[test]' && pytest"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", other.read_text()), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_named_files_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"\b(?:experiments|mtl|sharding_rules|tests)/[\w/]+\.py\b", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"


def test_the_worked_tables_load(tmp_path: Path) -> None:
    tables = write_tables(tmp_path)
    assert tables
    for path in tables:
        sharding_rules.load(str(path))


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda x: x.name if isinstance(x, Path) else " ".join(x)[-60:])
def test_commands_can_run(page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags parse, and rules, mesh and sizes fit as many processes as the command starts."""
    script = next(i for i, word in enumerate(words) if word.startswith("experiments/"))
    assert (ROOT / words[script]).is_file(), f"{page.name}: {words[script]}"
    launch = words[:script]
    counts = [int(launch[launch.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node") if flag in launch]
    assert launch[0] == ("torchrun" if counts else "python")
    if words[script] == "experiments/bench/step.py":
        tyro.cli(Bench, args=words[script + 1 :], config=(tyro.conf.AvoidSubcommands,))
    if words[script] != "experiments/pretrain.py" or "--help" in words:
        return

    def refuse(code: int) -> None:
        pytest.fail(f"{page.name}: {shlex.join(words)} ends with code {code}")

    monkeypatch.setattr(process, "leave_together", refuse)
    write_tables(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, setup = pretrain.read_settings(words[script + 1 :])
    rules, shape = pretrain.choose_layout(setup, math.prod(counts))
    setup = pretrain.with_micro_batch(setup, rules, shape)
    pretrain.check(setup, rules, shape, PRECISIONS["fp32"], torch.device("cpu"))


def test_every_table_preset_and_flag_is_described() -> None:
    sharding, training = ((ROOT / "docs" / name).read_text() for name in ("sharding.md", "training.md"))
    assert {name for name in sharding_rules.names() if f"| `{name}` |" not in sharding} == set()
    assert {name for name in PRESETS if f"| `{name}`" not in training} == set()
    for field in dataclasses.fields(PRESETS["tiny"]):
        value = getattr(PRESETS["tiny"], field.name)
        inner = [f.name.replace("_", "-") for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        rows = [line for line in training.splitlines() if line.startswith(f"| `--{field.name}")]
        assert rows, f"docs/training.md has no row for --{field.name}"
        lacking = [name for name in inner if not any(f".{name}`" in row for row in rows)]
        assert not lacking, f"docs/training.md has no row for --{field.name}.{lacking}"
