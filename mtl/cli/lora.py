"""Use low-rank adapters: `mtl lora merge ADAPTERS --base BASE --out CKPT`, and to PEFT by `mtl lora export ADAPTERS --out DIR`."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro

import sharding_rules
from experiments.adapters import adapters_of, read_adapters
from experiments.initial import TOKENIZER, Start, built_in, model_config, newest, open_start
from mtl import checkpoint, tree
from mtl.checkpoint.contents import Contents
from mtl.data import tokenizers
from mtl.data.tokenizers import description
from mtl.errors import UserError, unknown
from mtl.lora.adapters import merge
from mtl.lora.peft import CONFIG, write_adapter
from mtl.models.hf.family import write_config
from mtl.runtime import process
from mtl.sharding.mesh import MeshShape, make_mesh
from mtl.sharding.shard_map import to_local


@dataclass(frozen=True)
class Merge:
    """Add adapters to the model they were trained beside, and write a plain checkpoint."""

    adapters: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTERS")]
    """A run with --lora.rank or one of its checkpoints, or a folder that PEFT wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="CKPT")]
    """The checkpoint to write; it must not exist."""
    base: Annotated[str | None, tyro.conf.arg(metavar="hf:DIR")] = None
    """The model beside: a folder of Hugging Face, or a checkpoint or run of mtl (its folder); by default what the run's --init was."""


@dataclass(frozen=True)
class Export:
    """Write a run's adapters in PEFT's format."""

    adapters: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTERS")]
    """A run with --lora.rank, or one of its checkpoints."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write; it must not exist, or be empty."""
    base_name: str | None = None
    """What adapter_config.json calls the model beside; by default the folder of the run's --init hf:DIR."""


def main(arguments: list[str]) -> None:
    """Run one of the two."""
    known = {"merge": Merge, "export": Export}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nusage: mtl lora merge|export ... (mtl lora merge --help says more)")
        return
    if arguments[0] not in known:
        raise unknown("command of mtl lora", arguments[0], known)
    kind: Any = known[arguments[0]]
    at = dataclasses.replace(process.place(), device=torch.device("cpu"))
    if at.world > 1:
        raise UserError(f"mtl lora runs as one process, but {at.world} were started.")
    settings = tyro.cli(kind, args=arguments[1:], prog=f"mtl lora {arguments[0]}")
    print(merged(settings, at) if isinstance(settings, Merge) else exported(cast("Export", settings)))


def merged(settings: Merge, at: process.Place) -> str:
    """Write a checkpoint of the model with its adapters added."""
    peft = (settings.adapters / CONFIG).exists()
    contents = None if peft else checkpoint.inspect(newest(settings.adapters))
    base = settings.base or (None if contents is None else contents.config.get("init"))
    if base is None:
        raise UserError("--base is missing: name the model that the adapters were trained beside (hf:DIR, or a checkpoint's folder).")
    start = open_start(base)
    params = read_adapters(settings.adapters, start.config)[0] if contents is None else adapters_of(contents, start.config)[0]
    rules = sharding_rules.load("single")
    with process.process_group(at), contextlib.nullcontext(make_mesh(MeshShape(), "cpu")) as mesh:
        plain = tree.map(to_local, start.load(rules, mesh, torch.float32))
        state, config = {"params": merge(tree.join(plain, params))}, {"model": dataclasses.asdict(start.config)}
        checkpoint.save(settings.out, state, config=config, extra={**start.beside, **tokenizer_of(base, start, contents)})
    return f"{settings.out}: {len(params['layers'])} adapted projections of {start.config.layers} layers merged into {base}"


def tokenizer_of(base: str, start: Start, contents: Contents | None) -> dict[str, bytes]:
    """Describe what the merged model's tokens are, beyond what came with its base: those of the adapters' run, or plain bytes."""
    if contents is not None and TOKENIZER in contents.files:
        return {TOKENIZER: contents.read(TOKENIZER)}
    plain = not start.beside and built_in(checkpoint.inspect(newest(Path(base))))
    return {TOKENIZER: description.dumps(description.describe(tokenizers.load("bytes"))).encode()} if plain else {}


def exported(settings: Export) -> str:
    """Write a PEFT folder."""
    contents = checkpoint.inspect(newest(settings.adapters))
    config = model_config(contents)
    params, lora = adapters_of(contents, config)
    source = json.loads(contents.read("_hf/config.json")) if "_hf/config.json" in contents.files else None
    family, _ = write_config(config, source)
    name = settings.base_name or (contents.config.get("init") or "").removeprefix("hf:")
    write_adapter(settings.out, family, config, params, name, lora)
    return f"{settings.out}: adapters of rank {lora.rank} beside {', '.join(params['layers'])}"
