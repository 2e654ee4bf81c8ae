"""Adapters from files: a folder that PEFT wrote, or a run with --lora.rank and its checkpoints; to train on from, to merge, to export."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from experiments.initial import newest
from mtl import checkpoint, tree
from mtl.checkpoint.arrays import DTYPES
from mtl.checkpoint.contents import Contents
from mtl.errors import UserError
from mtl.lora.adapters import Lora, adapter_specs, scale_specs
from mtl.lora.peft import CONFIG, read_adapter
from mtl.models import decoder
from mtl.models.hf.family import write_config
from mtl.params import abstract


def read_adapters(path: Path, config: decoder.Config) -> tuple[dict[str, Any], Lora]:
    """Read adapters for a model with their scales, as whole tensors, and the settings that declare them."""
    if (path / CONFIG).exists():
        return read_adapter(path, write_config(config, None)[0], config)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected a folder that PEFT wrote, or a run with --lora.rank or its checkpoint.")
    return adapters_of(checkpoint.inspect(newest(path)), config)


def adapters_of(contents: Contents, config: decoder.Config) -> tuple[dict[str, Any], Lora]:
    """Read a checkpoint's adapters with their scales, as whole tensors, and the settings that declare them."""
    said: Any = contents.config.get("lora") if isinstance(contents.config, Mapping) else None
    if not isinstance(said, Mapping) or not said.get("rank"):
        raise UserError(f"{contents.path} holds no adapters: its run had no --lora.rank.")
    saved = cast("Mapping[str, Any]", said)
    lora = Lora(
        int(saved["rank"]), float(saved["alpha"]), tuple(saved["targets"]), saved.get("dropout", 0.0), bool(saved.get("rslora", False))
    )
    specs = adapter_specs(decoder.specs(config), lora)
    kind = DTYPES[next(info.dtype for name, info in contents.arrays.items() if name.startswith("params."))]
    params = checkpoint.restore(contents.path, {"params": abstract(specs, kind)})["params"]
    scales = tree.map(lambda s: torch.full(s.shape, s.fill, dtype=kind), scale_specs(specs, lora))
    return tree.join(params, scales), lora


def settled(lora: Lora, config: decoder.Config) -> Lora:
    """Take rank, alpha and targets from the adapters that ``lora.start`` names; refuse flags that say otherwise."""
    if lora.start is None:
        return lora
    params, found = read_adapters(Path(lora.start), config)
    scales = {float(x) for pair in params["layers"].values() for x in pair["lora"]["scale"]}
    if len(scales) > 1:
        raise UserError(
            f"--lora.start {lora.start}: its adapters count {', '.join(map(str, sorted(scales)))} times, but those that are trained count "
            "alike. Merge it into its model (mtl lora merge) and train fresh ones beside that."
        )
    for name in ("rank", "alpha", "rslora"):
        asked, usual, has = getattr(lora, name), getattr(Lora(), name), getattr(found, name)
        if asked not in (usual, has):
            raise UserError(f"--lora.{name} is {asked}, but the adapters of --lora.start have {has}: leave the flag out.")
    chosen, held = (adapter_specs(decoder.specs(config), dataclasses.replace(found, targets=x.targets))["layers"] for x in (lora, found))
    if lora.targets != Lora().targets and chosen.keys() != held.keys():
        raise UserError(f"--lora.targets are {', '.join(lora.targets)}, but --lora.start has adapters beside {', '.join(held)}.")
    return dataclasses.replace(found, dropout=lora.dropout or found.dropout, start=lora.start)
