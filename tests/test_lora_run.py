"""LoRA from the command line: train beside a model of Hugging Face, resume, merge, export; PEFT and transformers judge."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.adapters import settled
from mtl import checkpoint
from mtl.cli import generate, hf, lora
from mtl.errors import UserError
from mtl.lora.adapters import Lora
from mtl.models.hf.load import open_model
from tests.compare import close
from tests.forks import Forks

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
FLAGS = ["--train.steps", "3", "--train.global-batch-size", "4", "--train.seq-len", "32", "--train.eval-samples", "2"]
FLAGS += ["--optim.lr", "0.02", "--lora.rank", "3", "--lora.alpha", "6", "--lora.targets", "heads", "down", "--precision", "fp32"]


def train(forks: Forks, out: Path, *flags: str, processes: int = 1) -> str:
    done = forks.complete(["tiny", *FLAGS, "--out", str(out), *flags], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """Make a model of transformers, and a run that trains adapters beside it."""
    place = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).eval()
    model.save_pretrained(place / "base")
    return place, model, train(forks, place / "run", "--init", f"hf:{place / 'base'}")


def test_a_run_saves_the_adapters_alone(trained: tuple[Path, Any, str]) -> None:
    place, _, said = trained
    newest = place / "run" / "checkpoints" / "3"
    names = [name for name in checkpoint.inspect(newest).arrays if name.startswith("params.")]
    assert names and all(".lora." in name for name in names)
    assert {name.split(".")[2] for name in names} == {"query", "out", "down"}
    assert "parameters trained beside" in said
    losses = [json.loads(line)["loss"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] != losses[2]


def test_merged_and_exported_agree_with_peft(trained: tuple[Path, Any, str], tmp_path: Path) -> None:
    place, model, _ = trained
    lora.main(["export", str(place / "run"), "--out", str(tmp_path / "adapter")])
    lora.main(["merge", str(place / "run"), "--out", str(tmp_path / "merged")])
    lora.main(["merge", str(tmp_path / "adapter"), "--base", f"hf:{place / 'base'}", "--out", str(tmp_path / "again")])
    for name in ("merged", "again"):
        hf.main(["export", str(tmp_path / name), "--out", str(tmp_path / f"{name}-hf")])
    with torch.no_grad():
        plain = model(IDS).logits
        want = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(place / "base").eval(), tmp_path / "adapter")(IDS).logits
        assert (want - plain).abs().max() > 1e-3 * plain.abs().max(), "training did nothing"
        for name in ("merged", "again"):
            close(LlamaForCausalLM.from_pretrained(tmp_path / f"{name}-hf", dtype=torch.float32).eval()(IDS).logits, want, 1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(place / "base")


def test_what_adapters_make_of_the_built_in_texts_model_still_speaks(
    forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/lora.md has it: train on bytes, adapt, merge, generate from text."""
    small = ["--model.layers", "1", "--model.embed", "32", "--model.heads", "2", "--model.kv-heads", "2", "--model.mlp", "48"]
    made = forks.complete(["tiny", *small, *FLAGS[:6], "--out", str(tmp_path / "base")])
    assert made.returncode == 0, made.stderr
    train(forks, tmp_path / "adapted", "--init", str(tmp_path / "base"))
    lora.main(["merge", str(tmp_path / "adapted"), "--out", str(tmp_path / "merged")])
    capsys.readouterr()
    generate.main([str(tmp_path / "merged"), "--prompt", "def ", "--max-tokens", "4", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["prompt_ids"] == [*b"def "] and len(said["text"].encode()) >= 4


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(forks: Forks, trained: tuple[Path, Any, str], tmp_path: Path) -> None:
    place, _, _ = trained
    train(forks, tmp_path / "two", "--init", f"hf:{place / 'base'}", "--mesh.tensor", "2", processes=2)

    assert losses(tmp_path / "two") == pytest.approx(losses(place / "run"), rel=1e-5)


def test_a_pipeline_trains_the_same_adapters(forks: Forks, trained: tuple[Path, Any, str], tmp_path: Path) -> None:
    """Its checkpoint holds the adapters alone, and they merge into the model that one process's do."""
    place, _, _ = trained
    said = train(forks, tmp_path / "two", "--init", f"hf:{place / 'base'}", "--mesh.pipe", "2", "--pipeline.microbatches", "4", processes=2)
    assert "parameters trained beside" in said and losses(tmp_path / "two") == pytest.approx(losses(place / "run"), rel=1e-5)
    merged = dict[str, dict[str, torch.Tensor]]()
    for name, run in (("one", place / "run"), ("two", tmp_path / "two")):
        arrays = checkpoint.inspect(run / "checkpoints" / "3").arrays
        assert all(".lora." in path for path in arrays if path.startswith("params."))
        lora.main(["merge", str(run), "--out", str(tmp_path / f"{name}-merged")])
        hf.main(["export", str(tmp_path / f"{name}-merged"), "--out", str(tmp_path / f"{name}-hf")])
        merged[name] = load_file(tmp_path / f"{name}-hf" / "model.safetensors")
    for path, x in merged["one"].items():
        close(merged["two"][path], x, 1e-4)


@pytest.mark.slow
def test_a_pipeline_resumes(forks: Forks, trained: tuple[Path, Any, str], tmp_path: Path) -> None:
    """Two stages after a step of one process, and back."""
    place, _, _ = trained
    flags, pipe = ["--init", f"hf:{place / 'base'}", "--optim.schedule", "constant"], ["--mesh.pipe", "2", "--pipeline.schedule", "zb_v"]
    pipe += ["--pipeline.microbatches", "4", "--pipeline.layers-per-stage", "1", "1", "1", "1"]
    flags[1] = f"hf:{deeper(place)}"
    train(forks, tmp_path / "whole", *flags)
    train(forks, tmp_path / "parts", *flags, "--train.steps", "1")
    train(forks, tmp_path / "parts", *flags, *pipe, "--train.steps", "2", "--resume", "must", processes=2)
    train(forks, tmp_path / "parts", *flags, "--resume", "must")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def deeper(place: Path) -> Path:
    """Write a model of four layers, one a stage."""
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(place / "deeper")
    return place / "deeper"


@pytest.mark.slow
def test_a_run_resumes(forks: Forks, trained: tuple[Path, Any, str], tmp_path: Path) -> None:
    place, _, _ = trained
    flags = ["--init", f"hf:{place / 'base'}", "--optim.schedule", "constant"]
    train(forks, tmp_path / "whole", *flags)
    train(forks, tmp_path / "parts", *flags, "--train.steps", "1")
    train(forks, tmp_path / "parts", *flags, "--resume", "must")
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("whole", "parts")]
    assert json.loads(lines[0])["loss"] == json.loads(lines[1])["loss"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def theirs(trained: tuple[Path, Any, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Have PEFT write an adapter of random values, scaled by the square root of its rank, with dropout."""
    place = tmp_path_factory.mktemp("theirs")
    asked = peft.LoraConfig(
        r=5, lora_alpha=3, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1, use_rslora=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(trained[0] / "base"), asked).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    model.save_pretrained(place / "adapter")
    return place / "adapter", model


def test_training_goes_on_from_an_adapter_of_peft(
    forks: Forks, trained: tuple[Path, Any, str], theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    """A step that learns nothing leaves PEFT's adapter as it was, with its settings; one that learns changes it."""
    flags = [
        *FLAGS[2:8],
        "--precision",
        "fp32",
        "--train.steps",
        "1",
        "--init",
        f"hf:{trained[0] / 'base'}",
        "--lora.start",
        str(theirs[0]),
    ]
    for name, rate in (("still", "0"), ("moved", "0.02")):
        done = forks.complete(["tiny", *flags, "--optim.lr", rate, "--out", str(tmp_path / name)])
        assert done.returncode == 0, done.stderr[-3000:]
        lora.main(["export", str(tmp_path / name), "--out", str(tmp_path / f"{name}-peft")])
    folders = (theirs[0], tmp_path / "still-peft", tmp_path / "moved-peft")
    want, still, moved = (load_file(p / "adapter_model.safetensors") for p in folders)
    assert want.keys() == still.keys() == moved.keys()
    assert all(torch.equal(want[k], still[k]) for k in want) and any(not torch.equal(want[k], moved[k]) for k in want)
    said, kept = (json.loads((p / "adapter_config.json").read_text()) for p in (theirs[0], tmp_path / "still-peft"))
    for key in ("r", "lora_alpha", "use_rslora", "lora_dropout"):
        assert kept[key] == said[key], key
    assert sorted(kept["target_modules"]) == sorted(said["target_modules"])
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(trained[0] / "base").eval(), tmp_path / "still-peft")
        close(again(IDS).logits, theirs[1](IDS).logits, 1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora.rank", "4"], "lora.rank is 4, but the adapters of --lora.start have 5"),
        (["--lora.targets", "down"], "lora.start has adapters beside query, value, up"),
        (["--lora.start", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_contradicts_the_adapter_is_named(
    trained: tuple[Path, Any, str], theirs: tuple[Path, Any], tmp_path: Path, flags: list[str], says: str
) -> None:
    setup = Lora(start=str(theirs[0]))
    changes = {"--lora.rank": {"rank": 4}, "--lora.targets": {"targets": ("down",)}, "--lora.start": {"start": "nowhere"}}[flags[0]]
    with pytest.raises(UserError, match=says):
        settled(replace(setup, **changes), open_model(trained[0] / "base").config)


Refusal = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (lambda p: ["merge", str(p / "plain"), "--base", f"hf:{p / 'base'}", "--out", str(p / "x")], "holds no adapters"),
        (lambda p: ["export", str(p / "plain"), "--out", str(p / "x")], "holds no adapters"),
        (lambda p: ["merge", str(p / "nothing"), "--base", "b", "--out", str(p / "x")], "nothing"),
        (lambda p: ["export", str(p / "run"), "--out", str(p / "base")], "is not empty"),
        (lambda p: ["split"], "unknown command"),
    ],
)
def test_bad_input_ends_in_one_message(trained: tuple[Path, Any, str], command: Refusal, says: str) -> None:
    place, _, _ = trained
    if not (place / "plain").exists():
        hf.main(["import", str(place / "base"), "--out", str(place / "plain")])
    with pytest.raises(UserError, match=says):
        lora.main(command(place))
    assert not (place / "x").exists()


def test_generate_names_what_adapters_lack(trained: tuple[Path, Any, str]) -> None:
    with pytest.raises(UserError, match="mtl lora merge"):
        generate.main([str(trained[0] / "run"), "--prompt-ids", "1"])
