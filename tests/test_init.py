"""Runs that start from a folder of Hugging Face or from a checkpoint, and what their checkpoints then hold."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mtl.cli.hf as command
from experiments import initial, pretrain
from experiments.presets import PRESETS
from mtl import checkpoint
from mtl.errors import UserError
from mtl.models.hf.load import open_model
from mtl.runtime import process
from tests.test_families import held

FLAGS = [
    "--train.steps",
    "1",
    "--train.seq-len",
    "24",
    "--train.global-batch-size",
    "2",
    "--train.eval-samples",
    "2",
    "--precision",
    "fp64",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model whose vocabulary holds the built-in text."""
    torch.manual_seed(0)
    theirs = LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        initializer_range=0.1, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )  # fmt: skip
    LlamaForCausalLM(theirs).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    return tmp_path / "hf"


def train(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(process, "command_line", lambda: ["tiny", *FLAGS, *flags])
    pretrain.main()


def test_a_run_starts_from_a_folder_and_goes_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(monkeypatch, "--init", f"hf:{source}", "--out", str(out), "--optim.lr", "0", "--model.z-loss", "1e-4")
    saved = json.loads((out / "config.json").read_text())
    assert saved["model"]["vocab"] == 300 and saved["model"]["rope_scaling"]["kind"] == "linear" and saved["model"]["z_loss"] == 1e-4
    command.main(["export", str(out), "--out", str(tmp_path / "back")])
    want, got = held(source), held(tmp_path / "back")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name].double(), got[name]) for name in want), "a step without a learning rate moves nothing"
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "float64"
    tokens = torch.arange(20).unsqueeze(0)
    first, again = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64)(tokens).logits for x in (source, tmp_path / "back"))
    assert torch.equal(first, again)

    train(monkeypatch, "--init", str(out), "--out", str(tmp_path / "next"))
    contents = checkpoint.inspect(initial.newest(tmp_path / "next"))
    assert contents.read("_hf/tokenizer.json") == b"{}", "what came with the model goes on"
    first, second = (json.loads((x / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for x in (out, tmp_path / "next"))
    assert second == pytest.approx(first, rel=1e-2)


def test_flags_that_contradict_the_weights_are_refused(source: Path) -> None:
    start, preset = initial.from_folder(open_model(source)), PRESETS["tiny"].model
    assert initial.with_model(preset, preset, start) == start.config
    assert initial.with_model(initial.replace(preset, dropout_mlp=0.1), preset, start).dropout_mlp == 0.1
    with pytest.raises(UserError, match=r"--model.layers is 3, but --init brings a model where it is 2"):
        initial.with_model(initial.replace(preset, layers=3), preset, start)


@pytest.mark.parametrize("text", ["hf:nowhere", "nowhere", "gpt2"])
def test_what_is_no_start_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"{text.removeprefix('hf:')}"):
        initial.open_start(text)
