"""Fine-tuning as a user has it: chats made here, a falling loss, the same numbers on any mesh, and what bad input gets."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import finetune, initial, pretrain
from mtl import checkpoint, tree
from mtl.errors import UserError
from tests.forks import Forks

ROOT = Path(__file__).parent.parent
SMALL = ["--model.layers", "2", "--model.embed", "32", "--model.mlp", "48", "--model.head-size", "8", "--train.seq-len", "128"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def write_chats(path: Path, count: int = 300) -> Path:
    """Write small questions and answers, some in either form of row."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        a = rng.randrange(10)
        ask, answer = f"Write {a} as a word{'.' * rng.randrange(20)}", f"{a} is {WORDS[a]}."
        rows.append({"system": "Be brief.", "question": ask, "answer": answer} if i % 3 == 0 else
                    {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run finetune.py as a user does; `Forks.complete` does without the slow start."""
    command = [sys.executable, "experiments/finetune.py", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def made(arguments: list[str]) -> tuple[finetune.FineTune, Any]:
    """Give the settings and the work of a command line."""
    _, setup = pretrain.read_settings([*SMALL, *arguments], finetune.FINETUNE)
    return finetune.FINETUNE.work(setup)


def test_the_loss_falls_and_a_ring_gives_the_same_numbers(forks: Forks, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    common = ["--data", str(chats), *SMALL, "--precision", "fp64", "--optim.lr", "1e-2", "--optim.warmup-steps", "2"]
    common += ["--optim.schedule", "constant", "--train.eval-every", "4"]
    alone = start([*common, "--train.steps", "12", "--out", str(tmp_path / "one")])
    assert alone.returncode == 0, alone.stderr
    assert "template chatml, tokenizer bytes: 259 ids, new: <|im_start|> 257, <|im_end|> 258" in alone.stdout
    assert "training: rows 2" in alone.stdout and "held out: rows" in alone.stdout and "% full" in alone.stdout
    assert "<|im_start|>assistant" in alone.stdout
    want = metrics(tmp_path / "one")
    assert want[-1]["loss"] < 0.6 * want[0]["loss"] and want[-1]["eval_loss"] < 0.6 * want[0]["loss"]
    assert "eval_bits_per_byte" not in want[-1]
    config = json.loads((tmp_path / "one/config.json").read_text())
    assert config["chat"]["template"] == "chatml" and config["model"]["vocab"] == 259
    mesh = ["--train.steps", "4", "--rules", "ring", "--mesh.context", "2"]
    ring = forks.complete([*common, *mesh, "--out", str(tmp_path / "two")], 2, "finetune")
    assert ring.returncode == 0, ring.stderr
    assert "eval_loss" in want[3]
    for a, b in zip(metrics(tmp_path / "two"), want[:4], strict=True):
        for name in ("loss", "grad_norm", "tokens", "eval_loss"):
            if name in b:
                assert abs(a[name] - b[name]) <= 1e-9 * abs(b[name]), name


@pytest.mark.slow
def test_padding_gives_the_same_numbers_on_a_mesh(forks: Forks, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    common = ["--data", str(chats), *SMALL, "--precision", "fp64", "--train.steps", "8", "--packing", "pad", "--optim.lr", "1e-2"]
    for name, more, ranks in (("one", [], 1), ("two", ["--rules", "ring", "--mesh.context", "2"], 2)):
        run = forks.complete([*common, *more, "--out", str(tmp_path / name)], ranks, "finetune")
        assert run.returncode == 0, run.stderr
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-9 * abs(b["loss"]) and a["tokens"] == b["tokens"]


@pytest.mark.slow
def test_a_trained_model_grows_by_the_templates_tokens(forks: Forks, tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    base = forks.complete(["tiny", *SMALL, "--train.steps", "1", "--out", str(tmp_path / "base")])
    assert base.returncode == 0, base.stderr
    common = ["--init", str(tmp_path / "base"), "--data", str(chats), "--train.seq-len", "128"]
    mesh = ["--rules", "tensor", "--mesh.tensor", "2"]
    for name, more, ranks in (("grown", ["--train.steps", "0"], 1), ("meshed", ["--train.steps", "0", *mesh], 2)):
        run = forks.complete([*common, *more, "--out", str(tmp_path / name)], ranks, "finetune")
        assert run.returncode == 0, run.stderr
    old, grown, meshed = (stored(tmp_path / name) for name in ("base", "grown", "meshed"))
    assert old["params.embed.weight"].shape[0] == 256 and grown["params.embed.weight"].shape[0] == 259
    for name, value in old.items():
        rows = value.shape[0] if name == "params.embed.weight" else None
        assert torch.equal(grown[name][:rows] if rows else grown[name], value), name
        assert torch.equal(grown[name], meshed[name]), name
    assert (grown["params.embed.weight"][256:] - old["params.embed.weight"].mean(0)).abs().max() < 1e-7


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read the parameters of a run's newest checkpoint."""
    path = initial.newest(folder)
    found = {n: torch.empty(i.shape, device="meta") for n, i in checkpoint.inspect(path).arrays.items() if n.startswith("params.")}
    nested: dict[str, Any] = {}
    for name, value in found.items():
        *above, last = name.split(".")
        place = nested
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return dict(tree.paths(checkpoint.restore(path, nested)))


def test_rows_are_counted_and_held_out_by_content(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    _, work = made(["--data", str(chats), "--held-out", "0.2", "--train.eval-samples", "4"])
    training, held = (next(line for line in work.said if line.startswith(name)) for name in ("training", "held out"))
    rows = [int(line.split("rows ")[1].split(",")[0]) for line in (training, held)]
    assert sum(rows) == 300 and 30 < rows[1] < 90
    assert work.held_out_samples == min(4, len(work.held_out))
    shuffled = tmp_path / "shuffled.jsonl"
    lines = chats.read_text().splitlines()
    shuffled.write_text("\n".join(reversed(lines)))
    assert [line.split(";")[0] for line in made(["--data", str(shuffled), "--held-out", "0.2"])[1].said] == [
        line.split(";")[0] for line in work.said
    ]
    _, work = made(["--data", str(chats), "--valid", str(shuffled)])
    assert "rows 300" in work.said[1] and "rows 300" in work.said[2]
    _, work = made(["--data", str(chats), "--held-out", "0"])
    assert work.held_out is None and work.said[2] == "held out: nothing (--valid or --held-out)"


def test_epochs_set_the_steps(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    setup, work = made(["--data", str(chats), "--epochs", "2.5"])
    assert setup.train.steps == -(-5 * len(work.train) // (2 * setup.train.global_batch_size))
    assert work.said[-1].endswith("epochs")


def test_padded_batches_have_few_lengths(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    _, work = made(["--data", str(chats), "--packing", "pad"])
    for multiple in (1, 4):
        lengths = {work.length(i, multiple) for i in range(60)}
        assert lengths <= set(range(16, 129, 16)) and max(lengths) < 128
        assert {n % multiple for n in lengths} == {0}


def test_a_jinja_template_and_words(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}"
    said = {"chat_template": template, "added_tokens_decoder": {"9": {"content": "</u>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    setup, work = made(["--data", str(chats), "--template", str(tmp_path)])
    assert "new: </u> 257" in work.said[0] and setup.model.vocab == 258
    sample = work.train(0, 128)
    assert {int(t) for t, w in zip(sample.targets, sample.weights, strict=True) if w} & {257}


BAD = {
    "no data": ([], "--data is missing"),
    "a missing file": (["--data", "missing.jsonl"], "chat file missing.jsonl cannot be read: No such file"),
    "a template": (["--data", "{chats}", "--template", "alpaca"], "template 'alpaca' is neither chatml"),
    "a template file": (["--data", "{chats}", "--template", "none.json"], "template none.json cannot be read"),
    "role weights": (["--data", "{chats}", "--role-weights", "bot=1"], "'bot' is no role"),
    "held out": (["--data", "{chats}", "--held-out", "1"], "--held-out is 1.0: it must lie from 0 to under 1"),
    "epochs": (["--data", "{chats}", "--epochs", "0"], "--epochs is 0.0: it must be a number above 0"),
    "a vocabulary": (["--data", "{chats}", "--model.vocab", "200"], "id 200 is no special token. Give the model's own tokenizer"),
    "all too long": (["--data", "{chats}", "--train.seq-len", "4", "--on-long", "skip"], "the chat data has no documents (rows 2"),
    "a bad row": (["--data", "{bad}"], "bad.jsonl:2: message 1 has role 'human'"),
    "no target": (["--data", "{mute}"], "mute.jsonl:1: the row has no target"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(tmp_path: Path, name: str) -> None:
    arguments, says = BAD[name]
    places = {"{chats}": write_chats(tmp_path / "chats.jsonl"), "{bad}": tmp_path / "bad.jsonl", "{mute}": tmp_path / "mute.jsonl"}
    good = places["{chats}"].read_text().splitlines()[0]
    places["{bad}"].write_text(good + '\n{"messages": [{"role": "human", "content": "a"}]}\n')
    places["{mute}"].write_text('{"messages": [{"role": "user", "content": "a"}]}\n' + good)
    with pytest.raises(UserError) as error:
        made([str(places.get(a, a)) for a in arguments])
    assert says in str(error.value)
