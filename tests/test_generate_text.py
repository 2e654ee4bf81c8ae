"""Text that grows token by token: whole characters, stop strings, end tokens; and what `mtl generate` prints, beside transformers."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from mtl.cli import generate, hf
from mtl.errors import UserError
from mtl.generate.text import Continuation, stream

ROOT = Path(__file__).parent.parent
TEXT = "Größe, naïve café — 日本語テキスト 🎉🎈 end"


def as_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def feed(row: Continuation, ids: list[int]) -> list[str]:
    """Feed until the row is over."""
    pieces = []
    for i in ids:
        if row.reason is None:
            pieces.append(row.feed(i))
    return [*pieces, row.finish()]


def test_only_whole_characters_are_shown() -> None:
    row = Continuation(as_bytes, list(b"before "))
    pieces = feed(row, list(TEXT.encode()))
    assert "".join(pieces) == row.text == TEXT
    assert not any("\ufffd" in p for p in pieces)
    assert row.reason == "length"


def test_bytes_that_are_no_text_are_shown_as_decoded_whole() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.choice([0xFF, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x41, 0x42]) for _ in range(30)]
        row = Continuation(as_bytes, [])
        pieces = feed(row, ids)
        assert "".join(pieces) == row.text == as_bytes(ids)


@pytest.mark.parametrize("stop", ["STOP", "\n\n", "ab", "aab"])
def test_a_stop_string_ends_the_text_before_it(stop: str) -> None:
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice("abSTOP\n") for _ in range(60))
        row = Continuation(as_bytes, [65], [stop, "never"])
        pieces = feed(row, list(text.encode()))
        assert "".join(pieces) == row.text == text.partition(stop)[0]
        assert row.reason == ("stop" if stop in text else "length")
        want = text.index(stop) + len(stop) if stop in text else len(text)
        assert len(row.tokens) == want, "exactly the tokens up to the end of the stop string"


def test_the_first_of_several_stop_strings_counts() -> None:
    row = Continuation(lambda ids: "".join(["one two ", "three ", "four"][i] for i in ids), [], ["three", "two"])
    assert "".join(feed(row, [0, 1, 2])) == "one " and row.tokens == [0]


def test_end_tokens_and_special_tokens_are_no_text() -> None:
    row = Continuation(as_bytes, [1], ends=[0], silent=[7])
    assert "".join(feed(row, [65, 7, 66, 0, 67])) == "AB"
    assert row.tokens == [65, 7, 66, 0] and row.reason == "end"


def test_rows_end_one_by_one() -> None:
    rows = [Continuation(as_bytes, [], ["c"]), Continuation(as_bytes, [], ends=[0])]
    columns = iter([[97, 97], [98, 0], [99, None], [100, None]])
    assert list(stream(columns, rows)) == [["a", "a"], ["b", ""], ["", ""]]
    assert next(columns) == [100, None], "with all rows over, nothing more is asked for"


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a small byte-level tokenizer that begins every text with a token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    words = "Write a model once as a pure function. One more, a much longer prompt with several words in it."
    inner.train_from_iterator(
        [TEXT, words] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)
    return whole


SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": [1, 7],
    "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Make a model of transformers, its tokenizer, and the checkpoint of both."""
    return imported(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(LlamaConfig(**SHAPE)))


def imported(place: Path, model: Any) -> tuple[Path, Any, Any]:
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if p.dim() > 1 else 0.1) + (p.dim() == 1))
    model.eval().save_pretrained(place / "hf")
    words = tokenizer(place / "hf")
    hf.main(["import", str(place / "hf"), "--out", str(place / "ckpt")])
    return place / "ckpt", model, words


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    generate.main([str(a) for a in arguments] + ["--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_text_equals_transformers(llama: tuple[Path, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, model, words = llama
    prompts = ["Write a model once", "日本", "a much longer prompt, with several words in it"]
    flags = [part for p in prompts for part in ("--prompt", p)]
    found = run(capsys, path, *flags, "--max-tokens", 64, "--precision", "fp32")
    for prompt, got in zip(prompts, found, strict=True):
        ids = words(prompt)["input_ids"]
        want = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0, len(ids) :].tolist()
        assert got["prompt_ids"] == ids and got["ids"] == want
        assert got["tokens"] == len(want) and got["prompt_tokens"] == len(ids)
        assert got["text"] == words.decode([t for t in want if t != 7], skip_special_tokens=True), "an end token is no text"
        assert got["finish"] == ("end" if want[-1] in (1, 7) else "length")


def test_a_window_equals_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model, _ = imported(tmp_path, MistralForCausalLM(MistralConfig(**{**SHAPE, "eos_token_id": 1}, sliding_window=5)))
    ids = list(range(10, 22))
    want = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0, len(ids) :].tolist()
    assert run(capsys, path, "--prompt-ids", " ".join(map(str, ids)), "--max-tokens", 64, "--precision", "fp32")[0]["ids"] == want


def test_files_of_prompts(llama: tuple[Path, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, words = llama
    (tmp_path / "p.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt_ids": [0, 5, 6]}\n')
    lines = run(capsys, path, "--prompts", tmp_path / "p.txt", "--max-tokens", 4)
    assert [got["prompt_ids"] for got in lines] == [words("one")["input_ids"], words("two words")["input_ids"]]
    assert [got["prompt_ids"] for got in run(capsys, path, "--prompts", tmp_path / "p.jsonl", "--max-tokens", 4)][1] == [0, 5, 6]


def test_a_stop_string_on_the_command_line(llama: tuple[Path, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = llama
    free = run(capsys, path, "--prompt", "Write", "--max-tokens", 40)[0]
    stop = free["text"][len(free["text"]) // 2 :][:2]
    found = run(capsys, path, "--prompt", "Write", "--max-tokens", 40, "--stop", stop)[0]
    assert found["text"] == free["text"].partition(stop)[0] and found["finish"] == "stop"
    assert found["ids"] == free["ids"][: found["tokens"]] and found["tokens"] < free["tokens"]


def test_plain_output_is_the_text(llama: tuple[Path, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = llama
    want = run(capsys, path, "--prompt", "Write", "--prompt", "One more", "--max-tokens", 20, "--temperature", 0.8, "--seed", 3)
    generate.main([str(path), "--prompt", "Write", "--prompt", "One more", "--max-tokens", "20", "--temperature", "0.8", "--seed", "3"])
    said = capsys.readouterr()
    assert said.out.splitlines(True) == "".join(f"--- {i}: {g['prompt']}\n{g['text']}\n" for i, g in enumerate(want)).splitlines(True)
    assert f"{sum(g['tokens'] for g in want)} new tokens" in said.err


@pytest.mark.parametrize("mesh", ["fsdp=2", pytest.param("", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_writes(llama: tuple[Path, Any, Any], mesh: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = llama
    flags = [str(path), "--prompt", "Write a", "--prompt", "b", "--prompt", "c d e f", "--max-tokens", "24", "--temperature", "0.9"]
    flags += ["--precision", "fp64", "--json"]
    want = run(capsys, *flags)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mtl.cli.main", "generate"]
    done = subprocess.run(
        [*torchrun, *flags, *(["--mesh", mesh] if mesh else [])], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == want


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt", "a", "--max-tokens", "-1"], "max-tokens is -1"),
        ([], "no prompt"),
        (["--prompt-ids", "1 x"], "expected token ids"),
        (["--prompt-ids", "400"], "vocabulary has 400"),
        (["--prompt", "a", "--top-p", "0"], "top-p is 0"),
        (["--prompt", "a", "--mesh", "tensor=2"], "2 devices"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "is no folder"),
        (["--prompts", "/nowhere"], "cannot be read"),
    ],
)
def test_bad_input_ends_in_one_message(llama: tuple[Path, Any, Any], flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate.main([str(llama[0]), *flags])


def test_no_checkpoint_and_no_tokenizer(llama: tuple[Path, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nothing-here"):
        generate.main([str(tmp_path / "nothing-here"), "--prompt", "a"])
    torch.manual_seed(0)  # a model that does not end at once, whatever ran before
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "hf")
    hf.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    with pytest.raises(UserError, match="has no tokenizer"):
        generate.main([str(tmp_path / "ckpt"), "--prompt", "a"])
    assert run(capsys, tmp_path / "ckpt", "--prompt-ids", "3 4", "--max-tokens", 3)[0]["tokens"] == 3
    assert run(capsys, tmp_path / "ckpt", "--prompt", "a", "--tokenizer", llama[0].parent / "hf", "--max-tokens", 3)[0]["tokens"] == 3
