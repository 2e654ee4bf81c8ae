"""Fine-tunes that start from somebody's model: its tokenizer and template come along, its loss is transformers', and no other will do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from experiments import finetune, pretrain
from experiments.initial import newest
from mtl import checkpoint
from mtl.cli.prompt_text import language
from mtl.data import tokenizers
from tests import vocabularies
from tests.forks import Forks
from tests.test_data_resume import chats, metrics, run

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
FLAGS = ["tiny", "--train.seq-len", "128", "--train.global-batch-size", "4", "--packing", "pad", "--precision", "fp64"]
FLAGS += ["--train.eval-samples", "2", "--train.steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face under base, and chats."""
    place = tmp_path_factory.mktemp("init")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=604, **SHAPE)).double().save_pretrained(place / "base")  # rows to spare, as models have
    vocabularies.huggingface(place / "base")
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (place / "base/tokenizer_config.json").write_text(json.dumps(said))
    chats(place / "chats.jsonl", 60)
    return place


@pytest.fixture(scope="module")
def tuned(place: Path, forks: Forks) -> Path:
    """A short fine-tune of it that names neither tokenizer nor template."""
    said = run(forks, [*FLAGS, "--init", f"hf:{place / 'base'}", "--data", str(place / "chats.jsonl")], place / "run", 1, "finetune").text()
    assert f"template {place / 'base'}, tokenizer huggingface: 600 ids\n" in said, said
    return place / "run"


def test_the_first_loss_is_transformers(place: Path, tuned: Path) -> None:
    """The batch of step 1, through the model of transformers: the mean over all target tokens."""
    flags = [*FLAGS, "--init", f"hf:{place / 'base'}", "--data", str(place / "chats.jsonl")]
    _, work = finetune.FINETUNE.work(pretrain.read_settings([*flags, "--model.vocab", "604"], finetune.FINETUNE)[1])
    model = LlamaForCausalLM.from_pretrained(place / "base", dtype=torch.float64).eval()
    total = count = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        sample = work.train(i, 128)
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.tokens)[None]).logits[0]
        weights = torch.from_numpy(sample.weights)
        total = total + (cross_entropy(logits, torch.from_numpy(sample.targets), reduction="none") * weights).sum()
        count = count + weights.sum()
    assert 20 < count < 4 * 128
    assert abs(metrics(tuned)[0]["loss"] / (total / count).item() - 1) < 1e-9


def test_checkpoints_carry_the_tokenizer_on(place: Path, tuned: Path) -> None:
    """The words of a fine-tuned model are read by its own tokenizer, also after the folder that it came from has moved."""
    want = tokenizers.load("huggingface", model=place / "base/tokenizer.json")
    (place / "base/tokenizer.json").rename(place / "elsewhere.json")
    try:
        found: Any = language(checkpoint.inspect(newest(tuned)), None, 604)
    finally:
        (place / "elsewhere.json").rename(place / "base/tokenizer.json")
    assert found.encode("Hello world, again") == want.encode("Hello world, again")
    assert found.decode(want.encode("again")) == "again" and set(found.special) == set(want.special.values())


def test_a_further_fine_tune_takes_the_tokenizer_along_and_no_other(place: Path, tuned: Path, forks: Forks) -> None:
    flags = [*FLAGS, "--init", str(tuned), "--data", str(place / "chats.jsonl")]
    said = run(forks, [*flags, "--template", "chatml"], place / "more", 1, "finetune").text()
    assert "template chatml, tokenizer huggingface: 602 ids, new: <|im_start|> 600, <|im_end|> 601" in said, said
    said = run(forks, [*flags, "--tokenizer.kind", "bytes"], place / "other", 1, "finetune", code=2).text()
    assert "trained with another tokenizer than this run's: kind was huggingface and is bytes" in said, said
    said = run(forks, [*flags, "--tokenizer.model", "x.json"], place / "other", 1, "finetune", code=2).text()
    assert "--tokenizer.model is x.json, but not of which kind it is: give --tokenizer.kind too" in said, said
    assert not (place / "other").exists()


def test_a_model_without_a_tokenizer_needs_one_named(place: Path, forks: Forks, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SHAPE)).save_pretrained(tmp_path / "bare")
    flags = [*FLAGS, "--init", f"hf:{tmp_path / 'bare'}", "--data", str(place / "chats.jsonl")]
    said = run(forks, flags, tmp_path / "run", 1, "finetune", code=2).text()
    assert "brings no tokenizer: give --tokenizer.kind and its files" in said, said
    assert "259 ids" in run(forks, [*flags, "--tokenizer.kind", "bytes"], tmp_path / "run", 1, "finetune").text()
