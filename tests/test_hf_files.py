"""Folders of Hugging Face as they are found: older spellings are understood, and what is wrong is named before anything is written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import mtl.cli.hf as command
from experiments.presets import PRESETS
from mtl import checkpoint, tree
from mtl.data import tokenizers
from mtl.data.tokenizers import description
from mtl.errors import UserError
from mtl.models import decoder
from mtl.models.hf import export
from mtl.models.hf.family import known_families, read_config, write_config
from mtl.models.hf.load import open_model
from mtl.models.hf.names import Heads, Row, give, halves, neighbours, take, their_shape
from mtl.ops.rotary import RopeScaling
from tests import families
from tests.compare import close
from tests.small import LLAMA

ROWS: dict[str, tuple[Row, str, tuple[int, ...]]] = {
    "linear": (Row("w", "FD"), "DF", (6, 8)),
    "vector": (Row("w", "W"), "W", (6,)),
    "into heads": (Row("w", "HKD"), "DHK", (6, 4, 8)),
    "meta's order": (Row("w", "HKD", turned=True), "DHK", (6, 4, 8)),
    "meta's order, bias": (Row("w", "HK", turned=True), "HK", (4, 8)),
    "meta's order, one head": (Row("w", "K", turned=True), "K", (8,)),
    "out of heads": (Row("w", "DHK"), "DHK", (6, 4, 8)),
    "conv1d, out": (Row("w", "HKD"), "DHK", (6, 4, 8)),
    "conv1d, second third": (Row("w", "DGK", Heads(4, total=12)), "DGK", (6, 4, 8)),
    "falcon's queries": (Row("w", "HKD", Heads(0, 2, 4, 8)), "DHK", (6, 4, 8)),
    "falcon's queries, turned": (Row("w", "HKD", Heads(0, 2, 4, 8), turned=True), "DHK", (6, 4, 8)),
    "falcon's keys": (Row("w", "GKD", Heads(2, 1, 4, 8)), "DGK", (6, 2, 8)),
    "falcon's values, bias": (Row("w", "GK", Heads(3, 1, 4, 8)), "GK", (2, 8)),
}


@pytest.mark.parametrize("name", ROWS)
def test_maps_are_invertible_and_cut_boxes(name: str) -> None:
    row, axes, shape = ROWS[name]
    rng = torch.Generator().manual_seed(0)
    theirs = torch.randn(their_shape(row, axes, shape), generator=rng)
    ours = take(row, axes, shape, theirs)
    assert ours.shape == shape and set(ours.flatten().tolist()) <= set(theirs.flatten().tolist())
    back = torch.full_like(theirs, float("nan"))
    give(row, axes, ours, back)
    assert torch.equal(take(row, axes, shape, back), ours)
    if row.heads.total is None:
        assert torch.equal(back, theirs), "one of ours is all of theirs"
    box = [(n // 2, n - n // 2) for n in shape]
    assert torch.equal(take(row, axes, shape, theirs, box), ours[tuple(slice(a, a + n) for a, n in box)])


def test_falcons_parts_fill_the_fused_tensor() -> None:
    """Queries, keys and values as transformers splits them: of every group first the queries, then the key head, then the value head."""
    fused = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    parts = [Row("w", "HK", Heads(0, 2, 4, 8)), Row("w", "GK", Heads(2, 1, 4, 8)), Row("w", "GK", Heads(3, 1, 4, 8))]
    q, k, v = (take(row, row.order, (n, 3), fused.flatten()) for row, n in zip(parts, (4, 2, 2), strict=True))
    assert torch.equal(q, fused[:, :2].flatten(0, 1)) and torch.equal(k, fused[:, 2]) and torch.equal(v, fused[:, 3])
    back = torch.zeros(24)
    for row, x in zip(parts, (q, k, v), strict=True):
        give(row, row.order, x, back)
    assert torch.equal(back, fused.flatten())


def test_metas_order_is_a_permutation_of_pairs() -> None:
    x = torch.arange(8)
    assert neighbours(x, 0).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(halves(neighbours(x, 0), 0), x)


# ---------------------------------------------------------------- older and other spellings


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's config.json."""
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a folder's one file of tensors."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def as_transformers_4(values: dict[str, Any]) -> None:
    """Spell rope scaling and type as configs did until transformers 4."""
    said = values.pop("rope_parameters")
    values["rope_theta"] = said.pop("rope_theta")
    values["rope_scaling"] = {"type": said.pop("rope_type"), **said} if len(said) > 1 else None
    values["torch_dtype"] = values.pop("dtype")


@pytest.mark.parametrize("name", ["llama", "llama_linear", "llama_dynamic", "llama_yarn_mscale", "llama_3_1", "falcon_many_heads", "qwen3"])
def test_configs_of_transformers_4_say_the_same(name: str, tmp_path: Path) -> None:
    families.write(name, tmp_path)
    _, new = read_config(json.loads((tmp_path / "config.json").read_text()))
    rewrite(tmp_path, as_transformers_4)
    _, old = read_config(json.loads((tmp_path / "config.json").read_text()))
    assert old == new and (name in ("llama", "qwen3") or old.rope_scaling.kind != "none")


def test_gpt2_of_the_hub(tmp_path: Path) -> None:
    """Names without the model's prefix, masks among the tensors, and settings of other heads in config.json."""
    families.write("gpt2", tmp_path / "hf", shard="1GB")
    want = open_model(tmp_path / "hf").read("layers.query.weight", ((1, 0, 0, 0), (1, 32, 4, 8)))

    def old(held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)
        for i in range(3):
            held |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}

    retensor(tmp_path / "hf", old)
    rewrite(tmp_path / "hf", lambda v: v.update(n_ctx=40, task_specific_params={"text-generation": {"do_sample": True}}))
    assert torch.equal(open_model(tmp_path / "hf").read("layers.query.weight", ((1, 0, 0, 0), (1, 32, 4, 8))), want)


STRAY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_ctx": 80, "n_special": 0, "predict_special_tokens": True, "output_past": True, "_num_labels": 1, "type_vocab_size": 16,
             "hidden_act": "gelu", "intermediate_size": 37, "hidden_dropout_prob": 0.1, "hidden_size": 32},
    "falcon_11b": {"ff_factor": 4, "hidden_act": "silu", "intermediate_size": 37, "apply_residual_connection_post_layernorm": False},
    "llama": {"max_sequence_length": 2048, "type_vocab_size": 16, "is_decoder": True, "rope_interleaved": False, "is_llama_config": True},
    "qwen2": {"use_mrope": False, "classifier_dropout": 0.1, "unsloth_fixed": True},
    "llama_yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 12,
                                       "finetuned": True}},
}  # fmt: skip
"""What files on the hub have beside what their models read."""


@pytest.mark.parametrize("name", STRAY)
def test_stray_fields_of_the_hub_change_nothing(name: str, tmp_path: Path) -> None:
    theirs = families.write(name, tmp_path / "hf", shard="1GB")
    text, want = torch.arange(30).unsqueeze(0), open_model(tmp_path / "hf").config
    with torch.no_grad():
        logits = theirs(text).logits
        rewrite(tmp_path / "hf", lambda values: values.update(STRAY[name]))
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)(text).logits, logits, 1e-11)
    assert open_model(tmp_path / "hf").config == want


def test_computed_buffers_and_an_equal_tied_head_are_let_pass(tmp_path: Path) -> None:
    families.write("qwen2_windows", tmp_path / "hf", shard="1GB")

    def old(held: dict[str, Tensor]) -> None:
        held |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()

    retensor(tmp_path / "hf", old)
    open_model(tmp_path / "hf")
    retensor(tmp_path / "hf", lambda held: held["lm_head.weight"].neg_())
    with pytest.raises(UserError, match=r"tie_word_embeddings is true.*lm_head\.weight that differs"):
        open_model(tmp_path / "hf")


def test_a_changed_model_keeps_the_rest_of_its_config(tmp_path: Path) -> None:
    """A vocabulary that training let grow: config.json says so, and still has the token ids that it came with."""
    families.write("qwen3_switches", tmp_path / "hf", torch.float32)
    command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    contents = checkpoint.inspect(tmp_path / "ckpt")
    grown = replace(command.model_config(contents), vocab=64)
    weights = tree.map(lambda s: torch.zeros(s.shape), decoder.specs(grown))
    checkpoint.save(tmp_path / "grown", {"params": weights}, config={"model": asdict(grown)}, extra=contents.files)
    command.main(["export", str(tmp_path / "grown"), "--out", str(tmp_path / "back"), "--dtype", "bf16"])
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("hf", "back"))
    assert after["vocab_size"] == 64 and after["eos_token_id"] == before["eos_token_id"] and after["dtype"] == "bfloat16"
    assert load_file(tmp_path / "back/model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert read_config(after)[1] == replace(read_config(before)[1], vocab=64)


@pytest.mark.parametrize(("name", "dtype"), [("llama_switches", torch.float64), ("falcon_40b", torch.bfloat16), ("gpt2", torch.float32)])
def test_an_export_has_the_bytes_that_transformers_writes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    families.write(name, tmp_path / "hf", dtype, shard="1GB")
    command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back")])
    for file in sorted((tmp_path / "hf").iterdir()):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_tensors_of_several_types_lie_in_the_order_of_safetensors(tmp_path: Path) -> None:
    types = {"layers.norm1.weight": torch.float32, "layers.query.weight": torch.float16, "norm.weight": torch.float64}
    dtypes = {path: types.get(path, torch.bfloat16) for path, _ in tree.paths(decoder.specs(LLAMA))}
    wanted = export.tensors(next(f for f in known_families() if f.name == "llama"), LLAMA, dtypes)
    zeros = {path: torch.zeros(spec.shape, dtype=dtypes[path]) for path, spec in tree.paths(decoder.specs(LLAMA))}
    export.write_tensors(tmp_path / "ours", wanted, lambda path, layer: zeros[path] if layer is None else zeros[path][layer])
    save_file({t.name: torch.zeros(t.shape, dtype=t.dtype) for t in wanted}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_our_order_of_rotary_pairs_is_turned_into_theirs(tmp_path: Path) -> None:
    config = replace(LLAMA, rope_pairs="interleaved", max_positions=64)
    weights = tree.map(lambda s: torch.randn(s.shape), decoder.specs(config))
    checkpoint.save(tmp_path / "ckpt", {"params": weights}, config={"model": asdict(config)})
    command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back")])
    model = open_model(tmp_path / "back")
    assert model.config.rope_pairs == "half"
    got = model.read("layers.key.weight", ((0, 0, 0, 0), (2, 32, 2, 4)))
    assert torch.equal(neighbours(got, 3), weights["layers"]["key"]["weight"])


# ---------------------------------------------------------------- bad input

Change = Callable[[Path], Any]


def config(**fields: Any) -> Change:
    """Change fields of config.json."""
    return lambda folder: rewrite(folder, lambda values: values.update(fields))


def without(*names: str) -> Change:
    """Remove fields of config.json."""
    return lambda folder: rewrite(folder, lambda values: [values.pop(name) for name in names])


def held(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    """Change the tensors."""
    return lambda folder: retensor(folder, change)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    told = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    change(told)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": told}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
BAD: dict[str, tuple[Change, Sequence[str]]] = {
    "missing tensors": (held(lambda h: [h.pop(NORM), h.pop("lm_head.weight")]), [f"tensor {NORM}: missing", "lm_head.weight: missing"]),
    "extra tensor": (held(lambda h: h.update(more=torch.ones(2))), ["tensor more: not part of this model"]),
    "shape": (held(lambda h: h.update({NORM: torch.ones(31)})), [f"tensor {NORM}: shape [31], expected [32]"]),
    "type": (held(lambda h: h.update({NORM: torch.ones(32, dtype=torch.int8)})), [f"tensor {NORM}: type I8"]),
    "mixed types": (held(lambda h: h.update({NORM: torch.ones(32)})), ["tensors of layers.norm1.weight differ in type", f"{NORM} F32"]),
    "truncated": (truncated, ["model.safetensors is truncated"]),
    "no safetensors": (lambda f: (f / "model.safetensors").write_text("x" * 100), ["is truncated, damaged or no safetensors file"]),
    "absent file": (lambda f: with_index(f, lambda t: t.update({NORM: "gone.safetensors"})), ["file gone.safetensors: it is in the index"]),
    "absent tensor": (
        lambda f: with_index(f, lambda t: t.update(more="model-00001-of-00001.safetensors")), ["tensor more: the index says"],
    ),
    "unlisted tensor": (lambda f: with_index(f, lambda t: t.pop(NORM)), [f"tensor {NORM}: in model-00001", "not in the index"]),
    "bad index": (
        lambda f: (f / "model.safetensors").rename(f / "a") and (f / "model.safetensors.index.json").write_text("[]"), ["no JSON object"],
    ),
    "both": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["has both model.safetensors and"]),
    "pickled": (pickled, ["pytorch_model.bin", "pickles", "save_pretrained"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights were found"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "bad json": (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read as JSON"]),
    "bad generation config": (lambda f: (f / "generation_config.json").write_text("{"), ["generation_config.json cannot be read"]),
    "model type": (config(model_type="bert"), ["model_type is 'bert'", "Known: falcon, gpt2, llama"]),
    "architecture": (config(architectures=["LlamaForSequenceClassification"]), ["architecture 'LlamaForSequenceClassification'"]),
    "architecture of another": (config(architectures=["Qwen2ForCausalLM"]), ["does not belong to model_type 'llama'"]),
    "nothing said": (without("model_type", "architectures"), ["neither model_type nor architectures"]),
    "activation": (config(hidden_act="mish"), ["hidden_act is 'mish'", "silu"]),
    "rope type": (config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), ["rope type 'longrope' is not known"]),
    "rope field": (config(rope_parameters={"rope_type": "linear", "factor": 2.0, "mscale": 1.0}), ["'linear' has no fields mscale"]),
    "rope without factor": (config(rope_parameters={"rope_type": "linear"}), ["'factor'"]),
    "two thetas": (config(rope_theta=7.0), ["rope_theta is 7.0, but inside the rope scaling it is"]),
    "two scalings": (
        config(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 3.0}),
        ["rope_scaling.factor is 2.0 but rope_parameters.factor is 3.0"],
    ),
    "partial rotary": (config(partial_rotary_factor=0.5), ["partial_rotary_factor = 0.5"]),
    "unknown fields": (config(logit_scale=0.5, attn_logit_softcapping=30.0), ["logit_scale = 0.5; attn_logit_softcapping = 30.0"]),
    "quantized": (config(quantization_config={"bits": 4}), ["quantization_config"]),
    "two types": (config(torch_dtype="float16"), ["dtype is 'float64' but torch_dtype is 'float16'"]),
    "strange type": (config(dtype="int8"), ["dtype is 'int8'"]),
    "missing size": (without("hidden_size"), ["no field 'hidden_size'"]),
    "size": (config(num_hidden_layers="3"), ["num_hidden_layers is '3'; expected a whole number"]),
    "key heads": (config(num_key_value_heads=3), ["does not divide"]),
    "theta": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), ["rope_theta is 0.0; expected a number above 0"]),
    "yarn's theta": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1, "factor": 2.0}), ["rope_theta is 1.0; expected"]),
    "rope type's type": (config(rope_parameters={"rope_type": ["linear"]}), ["rope type ['linear'] is not known"]),
    "eps": (config(rms_norm_eps=-1e-5), ["rms_norm_eps is -1e-05; expected a number from 0 on"]),
    "flag": (config(attention_bias="yes"), ["attention_bias is 'yes'; expected true or false"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_is_written(name: str, tmp_path: Path) -> None:
    families.write("llama", tmp_path / "hf", shard="1GB")
    change, said = BAD[name]
    change(tmp_path / "hf")
    with pytest.raises(UserError) as error:
        command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    assert not [part for part in said if part not in str(error.value)], error.value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mistral", {"layer_types": ["full_attention"] * 3}, "every layer of Mistral is sliding_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "expected 3 times"),
        ("qwen2", {"layer_types": [["full_attention"]] * 3}, "expected 3 times"),
        ("gpt2", {"hidden_size": 64}, "hidden_size is 64, but n_embd, which is the same in GPT-2, is 32"),
        ("gpt2", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05"),
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("falcon_7b", {"num_ln_in_parallel_attn": 2}, "contradict each other"),
        ("falcon_40b", {"parallel_attn": False}, "contradict each other"),
        ("falcon_rw", {"num_kv_heads": 2}, "num_kv_heads is 2"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_inner": 48}, "mlp.c_fc.weight: shape [32, 128], expected [32, 48]"),
        ("llama_dynamic", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_what_contradicts_itself_is_refused(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    families.write(name, tmp_path, shard="1GB")
    rewrite(tmp_path, lambda values: values.update(change))
    with pytest.raises(UserError) as error:
        open_model(tmp_path)
    assert said in str(error.value), error.value


def test_an_export_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.write("llama", tmp_path / "hf")
    command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    before = sorted(p.name for p in tmp_path.iterdir())
    write, calls = export.write_tensors, list[Path]()

    def fails(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(export, "write_tensors", fails)
    with pytest.raises(UserError, match="No space left"):
        command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back"), "--shard-size", "20KB"])
    assert len(calls) == 2 and sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match="overwrites nothing"):
        command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "mine")])
    for size in ("0", "many", "5 XB"):
        with pytest.raises(UserError, match="--shard-size"):
            command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back"), "--shard-size", size])
    with pytest.raises(UserError, match="exists already"):
        command.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])


EXPORTED = {name: name.partition("_")[0].rstrip("0123456789") for name in PRESETS}
EXPORTED |= {"tiny": "llama", "gpt2_124m": "gpt2", "gpt3_175b": "gpt2"}


@pytest.mark.parametrize("name", EXPORTED)
def test_every_preset_has_a_config_that_transformers_reads(name: str, tmp_path: Path) -> None:
    model = PRESETS[name].model
    family, values = write_config(model, None, PRESETS[name].train.seq_len)
    assert family.name == EXPORTED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.max_position_embeddings == PRESETS[name].train.seq_len and theirs.vocab_size == model.vocab


def test_what_a_preset_trained_is_exported(tmp_path: Path) -> None:
    setup = replace(PRESETS["tiny"], model=replace(PRESETS["tiny"].model, embed=32, mlp=40, layers=2, head_size=6))
    specs, rng = decoder.specs(setup.model), torch.Generator().manual_seed(0)
    weights = tree.map(lambda s: torch.randn(s.shape, generator=rng), specs)
    said = replace(description.describe(tokenizers.load("bytes")), eod=5)
    for name, beside, end in (("plain", {}, None), ("told", {"_tokenizer.json": description.dumps(said).encode()}, 5)):
        settings = json.loads(json.dumps(asdict(setup), default=str))
        checkpoint.save(tmp_path / name, {"params": weights}, config=settings, extra=beside)
        command.main(["export", str(tmp_path / name), "--out", str(tmp_path / f"{name}-hf")])
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf")
        assert (theirs.config.max_position_embeddings, theirs.config.eos_token_id) == (setup.train.seq_len, end)
        assert open_model(tmp_path / f"{name}-hf").config == replace(setup.model, max_positions=setup.train.seq_len)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "linear"])
def test_a_stretched_model_is_exported(kind: Any) -> None:
    """Dynamic scaling starts where a model's positions end, so that number is kept."""
    stretched = replace(LLAMA, rope_scaling=RopeScaling(kind, 4.0, 0 if kind == "linear" else 24))
    family, values = write_config(stretched, None, 512)
    again = read_config(values)[1]
    assert (family.name, again.rope_scaling) == ("llama", stretched.rope_scaling)
    assert again.max_positions == (24 if kind == "dynamic" else 512)


def test_an_export_makes_no_value_infinite(tmp_path: Path) -> None:
    known = replace(LLAMA, max_positions=64)
    weights = tree.map(lambda s: torch.ones(s.shape), decoder.specs(known))
    weights["layers"]["key"]["weight"][1, 0, 0] = torch.tensor([-1e5, 1.0, float("inf"), float("nan")])
    checkpoint.save(tmp_path / "ckpt", {"params": weights}, config={"model": asdict(known)})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.weight holds 1e\+05, but --dtype float16 ends at 6\.55e\+04"):
        command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back"), "--dtype", "fp16"])
    assert not list(tmp_path.glob("back*"))
    command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back"), "--dtype", "bf16"])


def test_a_model_that_no_family_has_is_not_exported(tmp_path: Path) -> None:
    odd = replace(LLAMA, window=5, norm="layer")
    weights = tree.map(lambda s: torch.zeros(s.shape), decoder.specs(odd))
    checkpoint.save(tmp_path / "ckpt", {"params": weights}, config={"model": asdict(odd)})
    with pytest.raises(UserError, match=r"no family's config.json(.|\n)*llama: norm = 'layer'"):
        command.main(["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_every_family_is_found_by_its_file() -> None:
    assert {f.name for f in known_families()} == {"llama", "mistral", "falcon", "gpt2", "qwen"}
