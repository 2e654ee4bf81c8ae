"""PEFT's adapter format: adapter_config.json and adapter_model.safetensors, read and written by a family's name map.

PEFT stands beside their modules, of which one may hold several of our projections (GPT-2's and Falcon's query_key_value). Such a module's
adapter has one A for all; ours come out of it with that A each, and go back as one A of all ranks and a B in blocks.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl import tree
from mtl.errors import UserError
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.models.hf.family import Family
from mtl.models.hf.names import Row, give, take, their_shape

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KNOWN = frozenset(
    (
        "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r",
        "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights",
        "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        "loftq_config", "eva_config",
    )
)  # fmt: skip
"""Fields of adapter_config.json that are used, or that say how the adapter was made; any other must be unset."""
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the model beside as it was; others (PiSSA, OLoRA, LoftQ, ...) take the start out of it."""
Modules = dict[str, list[tuple[str, Row]]]
"""Their module's name, ``{}`` for the layer, to our projections in it."""


def write_adapter(
    folder: Path, family: Family, config: decoder.Config, params: Mapping[str, Any], base: str = "", lora: Lora | None = None
) -> None:
    """Write adapters, as whole tensors with their scales (``params["layers"][name]["lora"]`` has a, b and scale), as PEFT has them.

    ``lora`` says how they were trained, which PEFT notes beside.
    """
    rslora = lora is not None and lora.rslora
    pairs: dict[str, Any] = {name: p["lora"] for name, p in params["layers"].items() if "lora" in p}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    modules = _modules(family, config, list(pairs))
    for module, members in modules.items():
        held = [(row, pairs[name], decoder.PROJECTIONS[name]) for name, row in members]
        scale = _one_scale(module, [pair["scale"] for _, pair, _ in held])
        for layer in range(config.layers):
            a, b = _theirs(held, layer, config)
            for which, x in (("A", a), ("B", b)):
                tensors[f"base_model.model.{module.format(layer)}.lora_{which}.weight"] = x.contiguous()
            ranks[module] = a.shape[0]
        alphas[module] = scale * (math.sqrt(ranks[module]) if rslora else ranks[module])
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    everything = _modules(family, config, [n for n in decoder.PROJECTIONS if n in decoder.specs(config)["layers"]])
    short = {module: _suffix(module, everything) for module in ranks}
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _short(alpha),
        "lora_dropout": 0.0 if lora is None else lora.dropout,
        "target_modules": sorted(short.values()),
        "rank_pattern": {short[m]: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {short[m]: _short(x) for m, x in alphas.items() if x != alpha},
        "fan_in_fan_out": any(row.order[0] in decoder.PROJECTIONS[name][0] for members in modules.values() for name, row in members),
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty. Choose another folder; nothing was changed.")
    partial = folder.with_name(f"{folder.name}.unfinished")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
    (partial / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    partial.replace(folder)


def read_adapter(folder: Path, family: Family, config: decoder.Config) -> tuple[dict[str, Any], Lora]:
    """Read a PEFT adapter for a model: the adapters with their scales as whole tensors, and the settings that declare them.

    Everything that the files hold is used, or refused by name. Where ranks differ, adapters are filled up with zeros; the settings' alpha
    is that of the first projection.
    """
    said = _config(folder)
    tensors = _tensors(folder)
    shapes = dict(tree.paths(decoder.specs(config)))
    layers: dict[str, Any] = {}
    for module, members in _modules(family, config, [n for n in decoder.PROJECTIONS if f"layers.{n}.weight" in shapes]).items():
        names = [f"base_model.model.{module.format(i)}.lora_{{}}.weight" for i in range(config.layers)]
        if not any(n.format(w) in tensors for n in names for w in "AB"):
            continue
        lacking = [n.format(w) for n in names for w in "AB" if n.format(w) not in tensors]
        if lacking:
            raise UserError(
                f"{folder / TENSORS} lacks {', '.join(lacking[:5])}: an adapter stands beside a module in every layer or in none."
            )
        found = [(tensors.pop(n.format("A")), tensors.pop(n.format("B"))) for n in names]
        rank = max(a.shape[0] for a, _ in found)
        scales = [_scale(said, module.format(i), a.shape[0]) for i, (a, _) in enumerate(found)]
        for name, row in members:
            spec = shapes[f"layers.{name}.weight"]
            size = dict(zip(spec.axes, spec.shape, strict=True))
            parts = [_ours(folder, names[i], row, decoder.PROJECTIONS[name], size, rank, *pair) for i, pair in enumerate(found)]
            a, b = (torch.stack([p[j] for p in parts]) for j in (0, 1))
            layers[name] = {"lora": {"a": a, "b": b, "scale": torch.tensor(scales, dtype=torch.float64).to(a.dtype)}}
    if tensors:
        raise UserError(
            f"{folder / TENSORS} holds tensors that no projection of this model has a place for: {', '.join(sorted(tensors)[:5])}."
        )
    if not layers:
        raise UserError(f"{folder / TENSORS} holds no adapter.")
    rank = max(p["lora"]["a"].shape[-1] for p in layers.values())
    layers = {name: {"lora": _filled(p["lora"], rank)} for name, p in layers.items()}
    scale, rslora = float(next(iter(layers.values()))["lora"]["scale"][0]), bool(said.get("use_rslora"))
    alpha = _short(scale * (math.sqrt(rank) if rslora else rank))
    return {"layers": layers}, Lora(rank, float(alpha), tuple(layers), float(said.get("lora_dropout") or 0.0), rslora)


def _modules(family: Family, config: decoder.Config, chosen: list[str]) -> Modules:
    rows = family.names(config)
    found: Modules = {}
    for name in chosen:
        row = rows[f"layers.{name}.weight"]
        found.setdefault(row.name.removesuffix(".weight"), []).append((name, row))
    return found


def _theirs(held: list[tuple[Row, Any, tuple[str, str]]], layer: int, config: decoder.Config) -> tuple[Tensor, Tensor]:
    """Give one module's A (rank, in) and B (out, rank)."""
    shared = all(torch.equal(pair["a"], held[0][1]["a"]) for _, pair, _ in held)
    downs: list[Tensor] = []
    for _, pair, (inner, _) in held[: 1 if shared else None]:
        ours = pair["a"][layer]
        downs.append(ours.flatten(0, -2).t() if len(inner) > 1 else ours.t())
    a = torch.cat(downs)
    row, pair, (_, outer) = held[0]
    places = replace(row, order=f"{outer}_")
    ours = pair["b"][layer]
    wide = their_shape(places, f"_{outer}", ours.shape)[0]
    b, done = ours.new_zeros(wide, a.shape[0]), 0
    for row, pair, (_, outer) in held:
        ours = pair["b"][layer]
        give(replace(row, order=f"{outer}_"), f"_{outer}", ours, b[:, done : done + ours.shape[0]])
        done += 0 if shared else ours.shape[0]
    return a, b


def _ours(
    folder: Path, name: str, row: Row, sides: tuple[str, str], size: Mapping[str, int], rank: int, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Cut one projection's A (in, rank) and B (rank, out) out of its module's."""
    inner, outer = sides
    have = a.shape[0]
    down, up = (have, math.prod(size[c] for c in inner)), [have, *(size[c] for c in outer)]
    places = replace(row, order=f"{outer}_")
    for which, x, want in (("A", a, down), ("B", b, their_shape(places, f"_{outer}", up))):
        if tuple(x.shape) != tuple(want):
            raise UserError(f"{folder / TENSORS}: {name.format(which)} has shape {tuple(x.shape)}, expected {tuple(want)} for this model.")
    ours = a.t().reshape(*(size[c] for c in inner), have), take(places, f"_{outer}", up, b)
    full = _filled({"a": ours[0], "b": ours[1].unsqueeze(0)}, rank)
    return full["a"], full["b"][0]


def _filled(pair: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Fill an adapter up to a rank with zeros; A's last and B's second dimension is the rank. (The scale stays.)"""
    more = rank - pair["a"].shape[-1]
    a, b = pair["a"], pair["b"]
    a = torch.cat([a, a.new_zeros(*a.shape[:-1], more)], -1)
    return {**pair, "a": a, "b": torch.cat([b, b.new_zeros(b.shape[0], more, *b.shape[2:])], 1)}


def _one_scale(module: str, scales: list[Tensor]) -> float:
    values = {float(x) for scale in scales for x in scale}
    if len(values) > 1:
        raise UserError(
            f"the adapters of {module} count {', '.join(map(str, sorted(values)))} times: PEFT's format has one number for all."
        )
    return values.pop()


def _scale(said: Mapping[str, Any], module: str, rank: int) -> float:
    """Give how often a module's adapter counts."""
    patterns = said.get("alpha_pattern") or {}
    found = [alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key.removeprefix('^')})", module)]
    alpha = float(found[0] if found else said["lora_alpha"])
    return alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Expected a folder that PEFT wrote.") from None
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else said
        raise UserError(f"{path}: peft_type is {kind!r}; LORA is what can be read.")
    for name, value in said.items():
        if name not in KNOWN and value and (name, value) != ("bias", "none"):
            raise UserError(f"{path}: {name} is {value!r}, which is not supported. Train the adapter without it.")
    if said.get("init_lora_weights") not in STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {said['init_lora_weights']!r}, which changed the model beside it. Have PEFT convert the adapter "
            "(save_pretrained with path_initial_model_for_weight_conversion), and read that."
        )
    if not isinstance(said.get("lora_alpha"), int | float):
        raise UserError(f"{path}: lora_alpha is {said.get('lora_alpha')!r}: expected a number.")
    return said


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        hint = " adapter_model.bin is pickled, which is not read: save it again with safe_serialization=True." if pickled else ""
        raise UserError(f"{path} does not exist.{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}.") from None


def _suffix(module: str, others: Collection[str]) -> str:
    """Give the shortest end of a module's name that no other module has (GPT-2 has two c_proj)."""
    words = module.split(".")
    ends = (".".join(words[-n:]) for n in range(1, len(words)))
    return next(end for end in ends if not any(o != module and f".{o}".endswith(f".{end}") for o in others))


def _short(x: float) -> float | int:
    x = float(f"{x:.6g}")  # the scale was a float32
    return int(x) if x == int(x) else x
