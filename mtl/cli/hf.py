"""Bring models from Hugging Face and back: `mtl hf import SRC --out CKPT`, `mtl hf export CKPT --out DIR`, alone or under torchrun."""

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from torch import Tensor

import sharding_rules
from experiments.initial import BESIDE, TOKENIZER, beside, model_config, newest, spread
from mtl import checkpoint, params, tree
from mtl.checkpoint import arrays
from mtl.checkpoint.contents import Contents
from mtl.checkpoint.peers import peers
from mtl.data.tokenizers import description
from mtl.errors import UserError, unknown
from mtl.inspect.mesh import parse_mesh
from mtl.models import decoder
from mtl.models.hf import export as folder
from mtl.models.hf.family import write_config
from mtl.models.hf.fields import dtype as declared
from mtl.models.hf.files import CONFIG
from mtl.models.hf.load import abstract_params, open_model
from mtl.runtime import process
from mtl.sharding.mesh import make_mesh
from mtl.sharding.rules import check_mesh

__all__ = ["main", "model_config", "newest"]


DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""mtl's short names of types."""


@dataclass(frozen=True)
class Import:
    """Read a folder of safetensors into a checkpoint, box by box, and check it in full before."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The folder with config.json and model.safetensors or its shards."""
    out: Annotated[Path, tyro.conf.arg(metavar="CKPT")]
    """The checkpoint to write; it must not exist."""
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    """Files are laid out for this mesh, such as fsdp=4,tensor=2, one device a process; by default evenly over the processes."""
    rules: str | None = None
    """A shipped table's name, a path to a table, or a module; by default chosen from the mesh."""


@dataclass(frozen=True)
class Export:
    """Write a checkpoint's parameters as a folder that transformers loads."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint, or a run's folder (its newest one)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write; it must not exist, or be empty."""
    dtype: Literal["float64", "float32", "float16", "bfloat16", "fp64", "fp32", "fp16", "bf16"] | None = None
    """The type of the tensors; by default the one that they have."""
    shard_size: str = "5GB"
    """The most bytes in one file."""


def main(arguments: list[str]) -> None:
    """Run one of the two."""
    known = {"import": Import, "export": Export}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nusage: mtl hf import|export ... (mtl hf import --help says more)")
        return
    if arguments[0] not in known:
        raise unknown("command of mtl hf", arguments[0], known)
    kind: Any = known[arguments[0]]
    try:
        settings = tyro.cli(kind, args=arguments[1:], prog=f"mtl hf {arguments[0]}", console_outputs=process.place_rank() == 0)
    except SystemExit as stop:
        process.leave_together(int(stop.code or 0))
        raise
    at = dataclasses.replace(process.place(), device=torch.device("cpu"))
    with process.process_group(at) if at.world > 1 else contextlib.nullcontext():
        said = import_folder(settings) if isinstance(settings, Import) else export_folder(cast("Export", settings))
    if at.rank == 0:
        print(said)


def import_folder(settings: Import) -> str:
    """Read a folder into a checkpoint; every process writes its share of the files."""
    model = open_model(settings.source)
    state: tree.Tree = {"params": abstract_params(model)}
    if settings.mesh or settings.rules:
        shape = parse_mesh(settings.mesh).fill(peers().world)
        rules = sharding_rules.load(settings.rules or sharding_rules.choose(shape))
        check_mesh(rules, shape)
        layouts = params.layouts(decoder.specs(model.config), rules, shape)
        state = {"params": spread(state["params"], layouts, make_mesh(shape, "cpu"))} if shape.devices() > 1 else state
    checkpoint.save(
        settings.out,
        state,
        config={"model": dataclasses.asdict(model.config)},
        extra=beside(model),
        part=lambda name, part: model.read(name.removeprefix("params."), part),
    )
    count = params.count(decoder.specs(model.config))
    notes = [f"\nnote: {text}" for text in remarks(model.source.config)]
    return f"{settings.out}: {model.family.name}, {count / 1e6:.1f} M parameters from {settings.source}{''.join(notes)}"


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Say what config.json asks for that training here does otherwise; the field itself is kept."""
    return [
        f"{name} is {config[name]}: training here drops none of attention's weights (it is kept for exports)."
        for name in ("attention_dropout", "attn_pdrop")
        if config.get(name) and config.get("model_type") != "falcon"
    ]


def export_folder(settings: Export) -> str:
    """Write a checkpoint's parameters as a folder; every process writes its share of the files."""
    limit = folder.parse_size(settings.shard_size)
    contents = checkpoint.inspect(newest(settings.checkpoint))
    config = model_config(contents)
    kept = {name.removeprefix(BESIDE): contents.read(name) for name in contents.files if name.startswith(BESIDE)}
    came: dict[str, Any] = json.loads(kept.pop("import.json", b"{}"))
    source: dict[str, Any] | None = json.loads(kept[CONFIG]) if CONFIG in kept else None
    family, values = write_config(config, source, trained_length(contents))
    values = values if source is not None else {**values, **special_ids(contents)}
    held = {path: contents.arrays.get(f"params.{path}") for path, _ in tree.paths(decoder.specs(config))}
    check_held(contents, config, held)
    asked = DTYPES.get(settings.dtype or "", settings.dtype)
    dtypes = {path: getattr(torch, asked or info.dtype) for path, info in held.items() if info is not None}
    if source is None or {path: str(kind).removeprefix("torch.") for path, kind in dtypes.items()} != came.get("dtypes"):
        values = with_dtype(values, dtypes)
    files = folder.shards(folder.tensors(family, config, dtypes), limit)
    texts = kept if values == source else {**kept, CONFIG: (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()}
    group, partial = peers(), folder.unfinished(settings.out)
    group.together("begin the export", lambda: folder.begin(settings.out) if group.rank == 0 else None)
    read = reader(contents)
    try:
        mine = [name for i, name in enumerate(files) if i % group.world == group.rank]
        group.together("write tensors", lambda: [folder.write_tensors(partial / name, files[name], read) for name in mine])
        group.together("commit the export", lambda: folder.commit(settings.out, files, texts) if group.rank == 0 else None)
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{settings.out}: {family.name}, {sum(len(g) for g in files.values())} tensors in {len(files)} file{'s' * (len(files) > 1)}"


def trained_length(contents: Contents) -> int:
    """Say how long the sequences were that a run trained on, or what configs have by default."""
    train = contents.config.get("train") if isinstance(contents.config, dict) else None
    length = train.get("seq_len") if isinstance(train, dict) else None
    return length if isinstance(length, int) and length > 0 else 2048


def special_ids(contents: Contents) -> dict[str, int | None]:
    """Give the ids of special tokens in the tokenizer that a run describes; null where there is none, not what a family has by default."""
    said = description.loads(contents.read(TOKENIZER).decode(), TOKENIZER) if TOKENIZER in contents.files else None
    roles = {"bos_token_id": "bos", "eos_token_id": "eod", "pad_token_id": "pad"}
    return {name: None if said is None else getattr(said, role) for name, role in roles.items()}


def check_held(contents: Contents, config: decoder.Config, held: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose parameters are not its configuration's."""
    problems = [f"params.{path}: missing" for path, info in held.items() if info is None]
    for path, spec in tree.paths(decoder.specs(config)):
        info = held[path]
        if info is not None and tuple(info.shape) != spec.shape:
            problems.append(f"params.{path}: shape {info.shape}, expected {spec.shape}")
    if problems:
        raise UserError(f"{contents.path} does not hold the model that its configuration describes.\n  " + "\n  ".join(problems))


def with_dtype(values: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """Declare the type that most parameters have, under the name that config.json uses for it."""
    most = str(Counter(dtypes.values()).most_common(1)[0][0]).removeprefix("torch.")
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return dict(values) if declared(values) == most else {**values, **dict.fromkeys(names, most)}


def reader(contents: Contents) -> folder.Read:
    """Read single layers of a checkpoint's arrays."""
    ctx, opened = arrays.context(), dict[str, Any]()

    def read(path: str, layer: int | None) -> Tensor:
        name = f"params.{path}"
        info = contents.arrays[name]
        if name not in opened:
            opened[name] = arrays.open_old(contents.item, name, ctx, contents.driver, contents.ocdbt).result()
        shape = info.shape if layer is None else (1, *info.shape[1:])
        offset = (0 if layer is None else layer, *(0 for _ in info.shape[1:]))
        out = torch.empty(shape, dtype=arrays.DTYPES[info.dtype])
        try:
            arrays.read_into(opened[name], offset, arrays.as_numpy(out)).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{contents.path}: array {name!r} is damaged or incomplete: {error}") from None
        return out if layer is None else out[0]

    return read
