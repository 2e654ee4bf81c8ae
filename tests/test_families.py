"""Every family against transformers: logits from what was imported, and what is exported against what it came from."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon import modeling_falcon
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import mtl.cli.hf as command
from mtl import checkpoint, params
from mtl.generate.decode import generate
from mtl.models import decoder
from mtl.models.hf.load import load_params, open_model
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.train.evaluate import make_logits
from tests import families
from tests.compare import close
from tests.families import CASES, VOCAB

One = Callable[..., Parallel]
SEQ = 33
"""Beyond every window and every max_position_embeddings of the cases."""


class Float64(ModuleType):
    """torch, but float32 means float64: norms and softmax of transformers say float32 whatever type the weights have."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def tokens(rows: int = 2, length: int = SEQ) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def our_logits(one: One, config: Any, weights: Any, text: Tensor, precision: str = "fp64") -> Tensor:
    length = text.shape[1]
    seq = dict.fromkeys(("seq", "residual_seq", "query_seq", "key_seq"), length)
    par = one(**decoder.sizes(config), **seq, batch=text.shape[0])
    batch = {"tokens": text, "positions": torch.arange(length).expand_as(text)}
    return make_logits(decoder, config, par, PRECISIONS[precision])(weights, batch)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(one: One, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, modeling_falcon):
        monkeypatch.setattr(module, "torch", Float64("torch"))
    theirs = families.write(name, tmp_path / "hf")
    model = open_model(tmp_path / "hf")
    par = one()
    weights = load_params(model, par.rules, par.mesh, torch.float64)
    got = our_logits(one, model.config, weights, tokens())
    with torch.no_grad():
        want = theirs(tokens(), use_cache=False).logits
    assert want.dtype == torch.float64
    close(got, want, 1e-9)
    plain = {"rope_scaling": decoder.RopeScaling(), "window": None, "full_layers": (), "scale_by_layer": False, "attention_scale": None}
    switched = {k: v for k, v in plain.items() if getattr(model.config, k) != v}
    if switched:
        other = our_logits(one, decoder.replace(model.config, **switched), weights, tokens())
        assert (other - want).abs().max() > 1e-6 * want.abs().max(), "the switches matter at this length"


@pytest.mark.parametrize("name", CASES)
def test_bf16_errs_no_more_than_transformers(one: One, name: str, tmp_path: Path) -> None:
    """Both against transformers in float64, with the same weights, rounded to bfloat16 before."""
    families.write(name, tmp_path / "hf", torch.bfloat16)
    model, par = open_model(tmp_path / "hf"), one()
    got = our_logits(one, model.config, load_params(model, par.rules, par.mesh, torch.bfloat16), tokens(), "bf16").double()
    exact, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=d) for d in (torch.float64, torch.bfloat16))
    with torch.no_grad():
        want, rounded = exact(tokens()).logits, theirs(tokens()).logits.double()
    ours, usual = ((x - want).square().mean().sqrt() for x in (got, rounded))
    assert ours < 1.2 * usual, f"ours errs by {ours:.3g}, theirs by {usual:.3g}"


SPOKEN = (
    "llama_switches", "llama_dynamic", "llama_3_1", "mistral", "falcon_7b", "falcon_40b", "falcon_rw", "gpt2_switches", "qwen2_windows",
    "qwen3_switches",
)  # fmt: skip


@pytest.mark.parametrize("name", [name if name in SPOKEN else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_greedy_generation_is_that_of_transformers(one: One, name: str, tmp_path: Path) -> None:
    """64 tokens in float64, past every window and rope limit, with caches on both sides."""
    theirs = families.write(name, tmp_path / "hf")
    model, par = open_model(tmp_path / "hf"), one()
    weights = load_params(model, par.rules, par.mesh, torch.float64)
    prompts = tokens(2, 5)
    with torch.no_grad():
        want = theirs.generate(prompts, do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)[:, 5:]
    config = decoder.for_evaluation(model.config)
    got = list(generate(decoder, config, par.mesh, par.rules, PRECISIONS["fp64"], weights, prompts.tolist(), 64))
    assert got == want.t().tolist()


def held(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_tensors(a: Path, b: Path) -> None:
    first, second = held(a), held(b)
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert x.dtype == second[name].dtype and x.shape == second[name].shape, name
        assert torch.equal(x.view(torch.uint8), second[name].view(torch.uint8)), name


def round_trip(source: Path, tmp_path: Path, *flags: str) -> None:
    command.main(["import", str(source), "--out", str(tmp_path / "ckpt")])
    command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back"), *flags])


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_give_the_same_bits(name: str, tmp_path: Path) -> None:
    families.write(name, tmp_path / "hf", torch.bfloat16)
    (tmp_path / "hf" / "tokenizer.json").write_text('{"a": "ü"}')
    round_trip(tmp_path / "hf", tmp_path, "--shard-size", "30KB")
    same_tensors(tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())
    for file in ("generation_config.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    assert (tmp_path / "back/model.safetensors.index.json").exists()
    with torch.no_grad():
        first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / x)(tokens()).logits for x in ("hf", "back"))
    assert again.dtype == torch.bfloat16 and torch.equal(first, again)


@pytest.mark.parametrize("name", CASES)
def test_what_a_family_writes_itself_is_read_by_transformers(name: str, tmp_path: Path) -> None:
    """A checkpoint without a config.json of its own, as one that was trained from a preset."""
    theirs = families.write(name, tmp_path / "hf", torch.float32)
    command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    contents = checkpoint.inspect(tmp_path / "ckpt")
    config = command.model_config(contents)
    state = checkpoint.restore(tmp_path / "ckpt", {"params": params.abstract(decoder.specs(config), torch.float32)})
    checkpoint.save(tmp_path / "bare", state, config=contents.config)
    command.main(["export", str(tmp_path / "bare"), "--out", str(tmp_path / "back")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation=theirs.config._attn_implementation)
    assert again.dtype == torch.float32
    with torch.no_grad():
        close(again(tokens()).logits, theirs(tokens()).logits, 1e-6)
    assert AutoConfig.from_pretrained(tmp_path / "back").vocab_size == VOCAB
