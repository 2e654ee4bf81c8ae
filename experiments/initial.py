"""What a run starts from instead of fresh weights: `--init hf:DIR`, a folder of Hugging Face, or `--init CKPT`, a checkpoint of mtl."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl import checkpoint, params, tree
from mtl.checkpoint.contents import Contents
from mtl.data.tokenizers import description
from mtl.errors import UserError
from mtl.lora.adapters import Lora
from mtl.models import decoder
from mtl.models.grow import grow
from mtl.models.hf.files import CONFIG
from mtl.models.hf.load import Model, load_params, open_model
from mtl.optim.transforms import Optimizer
from mtl.precision import Precision
from mtl.sharding.layout import Layout, box
from mtl.sharding.mesh import Mesh
from mtl.sharding.rules import Rules
from mtl.sharding.shard_map import to_global
from mtl.train.state import TrainState, start_state

BESIDE = "_hf/"
"""Where a checkpoint keeps what came with its model: config.json, generation_config.json, tokenizer files; and import.json, ours."""
TOKENIZER = "_tokenizer.json"
"""Where a checkpoint describes the tokenizer that its model was trained with, where a run knew it."""
OF_THE_RUN = ("attention_impl", "loss_impl", "z_loss", "init_std", "dropout_embed", "dropout_attention", "dropout_mlp", "dropout_lora")
"""Settings of a model that a run chooses; the others are what its weights mean."""


class Start(NamedTuple):
    """A model to start from: its configuration, its parameters on a mesh, and the files that its checkpoints carry on."""

    config: decoder.Config
    load: Callable[[Rules, Mesh, torch.dtype], tree.Tree]
    beside: Mapping[str, bytes]

    def state(self, specs: tree.Tree, rules: Rules, mesh: Mesh, precision: Precision, optimizer: Optimizer) -> TrainState:
        """Make the state of step 0: these parameters, grown where the run's vocabulary is larger, and a fresh optimizer."""
        return start_state(grow(self.load(rules, mesh, precision.param), specs, rules, mesh), mesh, precision, optimizer)


def open_start(text: str) -> Start:
    """Read what ``--init`` names, and check all of it but the values."""
    kind, colon, name = text.partition(":")
    if colon and kind == "hf":
        return from_folder(open_model(Path(name)))
    if not Path(text).is_dir():
        raise UserError(f"--init is {text!r}: expected hf:DIR (a folder of Hugging Face) or the folder of a checkpoint or run of mtl.")
    return from_checkpoint(checkpoint.inspect(newest(Path(text))))


def from_folder(model: Model) -> Start:
    """Start from a folder of Hugging Face; every process reads its slices alone."""
    return Start(model.config, lambda rules, mesh, dtype: load_params(model, rules, mesh, dtype), beside(model))


def from_checkpoint(contents: Contents) -> Start:
    """Start from a checkpoint's parameters."""
    config = model_config(contents)

    def load(rules: Rules, mesh: Mesh, dtype: torch.dtype) -> tree.Tree:
        specs = decoder.specs(config)
        empty = spread(params.abstract(specs, dtype), params.layouts(specs, rules, mesh.shape), mesh)
        return checkpoint.restore(contents.path, {"params": empty})["params"]

    kept = [name for name in contents.files if name.startswith(BESIDE) or name == TOKENIZER]
    return Start(config, load, {name: contents.read(name) for name in kept})


def agree(trained: bytes, asked: bytes) -> None:
    """Refuse to train a model on with another tokenizer than its own; special tokens may be added."""
    was, now = (description.loads(text.decode(), "the tokenizer's description") for text in (trained, asked))
    if difference := was.lost_in(now):
        raise UserError(f"--init brings a model that was trained with another tokenizer than this run's: {difference}.")


def beside(model: Model) -> dict[str, bytes]:
    """Collect the files that travel with a model, and what the types of its tensors were."""
    kinds = {path: str(kind).removeprefix("torch.") for path, kind in model.dtypes.items()}
    came = {"family": model.family.name, "dtypes": kinds}
    paths = {CONFIG: model.source.folder / CONFIG, **model.source.companions}
    return {**{BESIDE + name: path.read_bytes() for name, path in paths.items()}, BESIDE + "import.json": json.dumps(came).encode()}


def with_model(asked: decoder.Config, preset: decoder.Config, start: Start) -> decoder.Config:
    """Give the model of a run that starts from weights: theirs, with what the command line says of the run itself."""
    chosen: dict[str, Any] = {}
    for f in fields(decoder.Config):
        want, usual, held = (getattr(c, f.name) for c in (asked, preset, start.config))
        if f.name in ("attention_impl", "loss_impl", "z_loss") or (f.name in OF_THE_RUN and want != usual):
            chosen[f.name] = want
        elif want not in (usual, held):
            flag = f"--model.{f.name.replace('_', '-')}"
            raise UserError(f"{flag} is {want!r}, but --init brings a model where it is {held!r}: leave the flag out.")
    return replace(start.config, **chosen)


def lasting(model: decoder.Config, lora: Lora, optimizer: str) -> dict[str, Any]:
    """Collect what saved arrays mean, by setting and as JSON has it: a resumed run must find it equal."""
    own = {f"model.{name.replace('_', '-')}": value for name, value in asdict(model).items() if name not in OF_THE_RUN}
    thin = {f"lora.{name}": getattr(lora, name) for name in (("rank", "alpha", "targets", "rslora") if lora.rank else ("rank",))}
    return json.loads(json.dumps({**own, **thin, "optim.name": optimizer}))


def built_in(contents: Contents) -> bool:
    """Tell whether a run trained on the text that ships with Python, whose tokens are bytes."""
    config = contents.config if isinstance(contents.config, dict) else {}
    data = config.get("data") or {}
    return "preset" in config and "chat" not in config and not any(data.get(name) for name in ("paths", "train"))


def newest(path: Path) -> Path:
    """Give a checkpoint's folder: the one named, or the newest of a run."""
    steps = sorted((int(p.name), p) for p in (path / "checkpoints").glob("*") if p.name.isdigit())
    return steps[-1][1] if steps else path


def model_config(contents: Contents) -> decoder.Config:
    """Read the model's configuration from a checkpoint's."""
    saved = contents.config
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise UserError(f"{contents.path} does not say what model its arrays are (its configuration has no model).")
    return decoder.config_from(saved["model"])


def spread(abstract: tree.Tree, layouts: tree.Tree, mesh: Mesh) -> tree.Tree:
    """Lay an abstract tree out on a mesh, still without memory."""

    def split(x: Tensor, layout: Layout) -> Tensor:
        local = torch.empty(box(x.shape, layout, mesh)[1], dtype=x.dtype, device="meta")
        return to_global(local, x.shape, layout, mesh)

    return tree.map(split, abstract, layouts)
