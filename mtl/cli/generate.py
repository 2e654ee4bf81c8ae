"""Continue text with a checkpoint's model: `mtl generate CKPT --prompt "..."`, alone or under torchrun."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.distributed.tensor import DTensor

import sharding_rules
from experiments.initial import model_config, newest
from mtl import checkpoint, tree
from mtl.axes import names
from mtl.checkpoint.contents import Contents
from mtl.cli.prompt_text import Language, language, read_prompts
from mtl.errors import UserError
from mtl.generate.decode import check, generate
from mtl.generate.sampling import Sampling
from mtl.generate.text import Continuation, stream
from mtl.generate.weights import lay_side_by_side
from mtl.inspect.mesh import parse_mesh
from mtl.models import decoder
from mtl.params import ParamSpec, layouts
from mtl.precision import PRECISIONS, Precision
from mtl.runtime import process
from mtl.sharding.layout import box
from mtl.sharding.mesh import Mesh, MeshShape, make_mesh
from mtl.sharding.rules import Rules, check_mesh
from mtl.sharding.shard_map import to_global


@dataclass(frozen=True)
class GenerateSettings:
    """What to continue, and how."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint, or a run's folder (its newest one)."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; give it again for more prompts, which run together."""
    prompt_ids: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A prompt as token ids, such as "1 15043 3186"; needs no tokenizer."""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A file of prompts: one a line, or in a .jsonl file one object a line with "prompt" (text) or "prompt_ids" (a list)."""
    max_tokens: int = 128
    """Write at most so many tokens a prompt."""
    temperature: float = 0.0
    """0 takes the best token; above, tokens are drawn."""
    top_k: int = 0
    """Draw from so many best tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest best tokens whose probability reaches this."""
    seed: int = 0
    """Decides the draws, on every mesh alike."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; give it again for more."""
    tokenizer: str | None = None
    """Take the tokenizer of this folder, or "bytes"; by default the checkpoint's own."""
    mesh: Annotated[str, tyro.conf.arg(metavar="AXIS=N,...")] = ""
    """Devices along each axis, such as tensor=2; by default all on tensor where the heads divide, else on fsdp."""
    rules: str | None = None
    """A shipped table's name, a path to a table, or a module; by default chosen from the mesh."""
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 on GPUs, fp32 elsewhere."""
    compile: Literal["auto", "none", "step"] = "auto"
    """Compile the step of one token; auto does so on CUDA devices."""
    json: bool = False
    """Print one JSON object a prompt instead of text: prompt, text, token ids, why it ended."""


def main(arguments: list[str]) -> None:
    """Read the settings, check them against the checkpoint, and write."""
    try:
        settings = tyro.cli(
            GenerateSettings, args=arguments, prog="mtl generate", description=__doc__, console_outputs=process.place_rank() == 0
        )
    except SystemExit as stop:
        process.leave_together(int(stop.code or 0))
        raise
    how = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)
    at = process.place()
    process.prepare_environment()
    contents = checkpoint.inspect(newest(settings.checkpoint))
    config = decoder.for_evaluation(model_config(contents))
    rules, shape = choose_layout(settings, config, at.world)
    speech = language(contents, settings.tokenizer, config.vocab)
    prompts = [speech.encode(text) for text in settings.prompt] + [_ids(text) for text in settings.prompt_ids]
    prompts += read_prompts(settings.prompts, speech.encode) if settings.prompts else []
    check(decoder, config, prompts, settings.max_tokens)
    name = settings.precision if settings.precision != "auto" else ("bf16" if at.device.type in ("cuda", "xpu") else "fp32")
    backend = "inductor" if settings.compile == "step" or (settings.compile == "auto" and at.device.type == "cuda") else None
    with process.process_group(at):
        mesh = make_mesh(shape, at.device.type)
        params = restore_params(contents, config, rules, mesh, PRECISIONS[name])
        lay_side_by_side(decoder, config, mesh, rules, params)
        rows = [Continuation(speech.decode, p, settings.stop, speech.ends, speech.special) for p in prompts]
        tokens = generate(decoder, config, mesh, rules, PRECISIONS[name], params, prompts, settings.max_tokens, how, speech.ends, backend)
        begin = time.perf_counter()
        show = Show(prompts, speech, at.rank == 0 and not settings.json)
        for pieces in stream(tokens, rows):
            show(pieces, rows)
        if at.rank == 0:
            finish(settings, prompts, speech, rows, time.perf_counter() - begin)


def choose_layout(settings: GenerateSettings, config: decoder.Config, world: int) -> tuple[Rules, MeshShape]:
    """Find rules and mesh, and refuse those that the model cannot be laid out by."""
    if settings.mesh or settings.rules:
        rules = sharding_rules.load(settings.rules) if settings.rules else None
        given = settings.mesh or f"{sharding_rules.world_axis(rules) if rules else 'fsdp'}=-1"
        shape = parse_mesh(given).fill(world)
    else:
        fits = config.heads % world == 0 and config.mlp % world == 0
        rules, shape = None, MeshShape(tensor=world) if fits else MeshShape(fsdp=world)
    rules = rules or sharding_rules.load(sharding_rules.choose(shape))
    check_mesh(rules, shape)
    for table in ("store", "compute"):
        layouts(decoder.specs(config), rules, shape, table)
    for axis, size in decoder.sizes(config).items():
        if axis in rules.act:
            rules.layout("act", (axis,), (size,), shape, f"model.{axis}, activation")
    return rules, shape


def restore_params(contents: Contents, config: decoder.Config, rules: Rules, mesh: Mesh, precision: Precision) -> Any:
    """Read the parameters alone, each device its part, in the type that they are used in."""
    if any(name.endswith(".lora.a") for name in contents.arrays):
        raise UserError(f"{contents.path} holds adapters alone. Add them to their model first: mtl lora merge {contents.path} --out CKPT.")

    def make(path: str, spec: ParamSpec) -> DTensor:
        layout = rules.layout("store", names(spec.axes), spec.shape, mesh.shape, f"parameter {path!r}")
        kind = precision.compute if len(spec.axes.replace("L", "")) > 1 else precision.param
        return to_global(torch.empty(box(spec.shape, layout, mesh)[1], dtype=kind, device="meta"), spec.shape, layout, mesh)

    return checkpoint.restore(contents.path, {"params": tree.map_paths(make, decoder.specs(config))})["params"]


class Show:
    """Prints text as it comes: the first prompt's at once, the others' in their order."""

    def __init__(self, prompts: Sequence[Sequence[int]], speech: Language, on: bool) -> None:
        """Show the continuations of ``prompts``, or nothing."""
        self.prompts, self.speech, self.on = prompts, speech, on
        self.row, self.waiting = -1, [""] * len(prompts)

    def __call__(self, pieces: Sequence[str], rows: Sequence[Continuation]) -> None:
        """Print what is new of the row in turn, and go on to the next where it is over."""
        if not self.on:
            return
        self.waiting = [a + b for a, b in zip(self.waiting, pieces, strict=True)]
        while self.row < len(rows):
            if self.row >= 0:
                print(self.waiting[self.row], end="", flush=True)
                self.waiting[self.row] = ""
                if rows[self.row].reason is None:
                    return
                print()
            self.row += 1
            if self.row < len(rows) and len(rows) > 1:
                print(f"--- {self.row}: {self.speech.decode(list(self.prompts[self.row]))}")


def finish(
    settings: GenerateSettings, prompts: Sequence[Sequence[int]], speech: Language, rows: Sequence[Continuation], seconds: float
) -> None:
    """Print JSON where asked, and the counts."""
    if settings.json:
        for prompt, row in zip(prompts, rows, strict=True):
            said = {
                "prompt": speech.decode(list(prompt)), "text": row.text, "prompt_ids": list(prompt), "ids": row.tokens,
                "prompt_tokens": len(prompt), "tokens": len(row.tokens), "finish": row.reason,
            }  # fmt: skip
            print(json.dumps(said, ensure_ascii=False))
    count = sum(len(row.tokens) for row in rows)
    said = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)} of {sum(map(len, prompts))} tokens, {count} new tokens in {seconds:.2f} s"
    print(f"[{said}, {count / seconds:.1f} tokens/s, prompts and compilation counted]", file=sys.stderr)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f'--prompt-ids {text!r}: expected token ids, such as "1 15043 3186".') from None
