"""PEFT's adapter format, judged by PEFT: it loads what we write, and we compute what it computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mtl import tree
from mtl.errors import UserError
from mtl.lora.adapters import Lora, merge, trained, whole
from mtl.lora.peft import CONFIG, TENSORS, read_adapter, write_adapter
from mtl.models import decoder
from mtl.models.hf.load import load_params, open_model
from mtl.params import ParamSpec, init
from mtl.precision import PRECISIONS
from mtl.sharding.parallel import Parallel
from mtl.sharding.shard_map import to_local
from mtl.train.evaluate import make_logits
from tests.compare import close, same

One = Callable[..., Parallel]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
            bias=False, parallel_attn=True, alibi=False,
        )
    ),
}  # fmt: skip
LINEAR = {
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}


@pytest.fixture(params=list(MODELS))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """Make a model of transformers and its folder."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path / "base")
    return request.param, model, tmp_path / "base"


def ours(one: One, folder: Path) -> tuple[Any, decoder.Config, Any, Parallel]:
    """Read the folder as we do."""
    model, par = open_model(folder), one()
    return model.family, model.config, tree.map(to_local, load_params(model, par.rules, par.mesh, torch.float32)), par


def logits(config: decoder.Config, par: Parallel, params: Any, fns: Any = decoder) -> torch.Tensor:
    sized = Parallel(par.mesh, par.rules, decoder.sizes(config), torch.float32)
    batch = {"tokens": IDS, "positions": torch.arange(IDS.shape[1]).unsqueeze(0)}
    return make_logits(fns, config, sized, PRECISIONS["fp32"])(params, batch)


def test_peft_loads_what_we_write(base: tuple[str, Any, Path], one: One, tmp_path: Path) -> None:
    kind, model, folder = base
    family, config, params, par = ours(one, folder)
    lora = Lora(3, 5.0, ("query", "value", "out", "mlp"))
    specs = tree.map(lambda s: s if s.std else ParamSpec(s.shape, s.axes, 0.2), trained(decoder, lora).specs(config))
    fns = whole(decoder, lora)
    adapted = tree.join(init(fns.specs(config), par.rules, par.mesh, 1, torch.float32), params)
    adapted = tree.map(to_local, tree.join(adapted, init(specs, par.rules, par.mesh, 2, torch.float32)))
    write_adapter(tmp_path / "adapter", family, config, adapted)
    got = logits(config, par, adapted, fns)
    with torch.no_grad():
        plain = model(IDS).logits
        want = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(IDS).logits
    assert (want - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapter does nothing"
    close(got, want, 2e-5)
    again, settings = read_adapter(tmp_path / "adapter", family, config)
    close(logits(config, par, tree.join(params, again), whole(decoder, settings)), want, 2e-5)
    close(logits(config, par, merge(tree.join(params, again))), want, 2e-5)
    targets = json.loads((tmp_path / "adapter" / CONFIG).read_text())["target_modules"]
    if kind == "gpt2":
        assert targets == ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"], "each by the shortest name that is its own"
    if kind == "llama":
        assert same(again["layers"]["query"]["lora"]["b"], adapted["layers"]["query"]["lora"]["b"])
        assert targets == sorted({*LINEAR["llama"], "up_proj"})


@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"*": 2}, "alpha_pattern": {"*": 3}}], ids=["plain", "patterns"])
def test_we_read_what_peft_writes(base: tuple[str, Any, Path], one: One, tmp_path: Path, more: dict[str, Any]) -> None:
    kind, model, folder = base
    family, config, params, par = ours(one, folder)
    more = {k: {LINEAR[kind][0]: v["*"]} if isinstance(v, dict) else v for k, v in more.items()}
    asked = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR[kind], fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM", **more)
    adapted = peft.get_peft_model(model, asked).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=rng) * 0.2)
        want = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "theirs")
    found, settings = read_adapter(tmp_path / "theirs", family, config)
    close(logits(config, par, tree.join(params, found), whole(decoder, settings)), want, 2e-5)
    if not more:
        write_adapter(tmp_path / "back", family, config, found)
        fresh = MODELS[kind]()
        fresh.load_state_dict(type(fresh).from_pretrained(folder).state_dict())
        with torch.no_grad():
            close(peft.PeftModel.from_pretrained(fresh.eval(), tmp_path / "back")(IDS).logits, want, 1e-6)


def adapter(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """Write a small adapter of PEFT for a Llama, with changes to its adapter_config.json."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "base", tmp_path / "theirs"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"a_field_of_the_future": 3}, "a_field_of_the_future is 3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changed the model"),
    ],
)
def test_what_we_cannot_read_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder, theirs = adapter(tmp_path, **changes)
    model = open_model(folder)
    with pytest.raises(UserError, match=says):
        read_adapter(theirs, model.family, model.config)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, theirs = adapter(tmp_path)
    model, path = open_model(folder), theirs / TENSORS
    whole_file = load_file(path)
    first = sorted(whole_file)[0]

    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            read_adapter(theirs, model.family, model.config)

    save_file({k: v for k, v in whole_file.items() if k != first}, path)
    refused("lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A")
    save_file({**whole_file, "base_model.model.model.extra.lora_A.weight": torch.zeros(2, 2)}, path)
    refused("no projection of this model has a place for: base_model.model.model.extra")
    save_file({**whole_file, first: torch.zeros(2, 31)}, path)
    refused(r"has shape \(2, 31\), expected \(2, 32\)")
    path.write_bytes(path.read_bytes()[:100])
    refused("is damaged")
    path.unlink()
    refused("does not exist")
    (theirs / "adapter_model.bin").touch()
    refused("is pickled")
    (theirs / CONFIG).write_text("{")
    refused("cannot be read")
