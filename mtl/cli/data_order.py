"""Show which documents each sample of a run is made of, or Megatron-LM's indices."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from mtl import random
from mtl.data.blend import Blend
from mtl.data.corpus import Joined, Part
from mtl.data.dataset import DEFAULT_SPLIT, DataSettings, Source, open_sources
from mtl.data.megatron_stream import build
from mtl.data.stream import Stream
from mtl.errors import UserError


@dataclass(frozen=True)
class Order:
    """Which order to show."""

    data: tuple[str, ...]
    """A corpus (a path without .bin and .idx), several, `weight path` pairs, or a list file."""
    seq_len: int
    """Tokens a sample."""
    samples: int | None = None
    """How many samples the run takes; megatron without it is one epoch."""
    seed: int = 1234
    """What decides the order."""
    order: Literal["stateless", "megatron"] = "stateless"
    split: str = DEFAULT_SPLIT
    """Shares of train, valid and test."""
    part: Literal["train", "valid", "test"] = "train"
    """Which of them to show."""
    dtype: str | None = None
    """The element type of plain arrays of tokens."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object."""


def main(arguments: list[str]) -> None:
    """Open the corpora and print the order."""
    flags = tyro.cli(Order, args=arguments, prog="mtl data order", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    for name, value in {"seq-len": flags.seq_len, "samples": flags.samples}.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be at least 1.")
    if not 0 <= flags.seed < 2**32 and flags.order == "megatron":
        raise UserError(f"--seed is {flags.seed}: Megatron's order takes seeds from 0 to {2**32 - 1}.")
    settings = DataSettings(paths=flags.data, split=flags.split, dtype=flags.dtype)
    sources = open_sources(settings, flags.part)
    if not sources:
        raise UserError(f"--data {' '.join(flags.data)} has no tokens in split {flags.part} of {flags.split}.")
    found = megatron_order(flags, sources) if flags.order == "megatron" else stateless_order(flags, sources)
    print(json.dumps(found) if flags.as_json else _lines(found))


def megatron_order(flags: Order, sources: list[Source]) -> dict[str, Any]:
    """Give the indices that Megatron-LM's builder gives: of one corpus, or of a blend and each of its corpora."""
    built = build([(s.name, s.corpus, s.weight) for s in sources], flags.seq_len, flags.samples, flags.seed)
    parts = [{name: value.tolist() for name, value in found._asdict().items()} for _, found in built.parts]
    head: dict[str, Any] = {"order": "megatron", "split": flags.split, "part": flags.part, "seed": flags.seed, "seq_len": flags.seq_len}
    said = [{"path": p.of.prefix, "documents": [p.first, p.stop], **found} for (p, _), found in zip(built.parts, parts, strict=True)]
    if built.blend is None:
        return head | {"samples": built.size} | said[0]
    return head | {"samples": built.size} | {name: x.tolist() for name, x in built.blend._asdict().items()} | {"datasets": said}


def stateless_order(flags: Order, sources: list[Source]) -> dict[str, Any]:
    """Give for each sample its corpus, epoch, and pieces: [document, first token, last + 1]; documents are numbered in the whole file."""
    if flags.samples is None:
        raise UserError("--samples is missing: the stateless order has no end.")
    weighted = sources[0].weight is not None
    groups = [[s] for s in sources] if weighted else [sources]
    blend = Blend([s.weight or 0 for s in sources]) if weighted else Blend([1])
    streams = [
        Stream(Joined([s.corpus for s in group]), random.key("data", flags.seed, flags.part, k), group[0].name)
        for k, group in enumerate(groups)
    ]
    samples: list[dict[str, Any]] = []
    for index in range(flags.samples):
        k, number = blend(index)
        pieces = [_numbered(groups[k], *piece) for piece in streams[k].pieces(number, flags.seq_len)]
        samples.append({"sample": index, "corpus": k, "number": number, "epoch": streams[k].epoch(number, flags.seq_len), "pieces": pieces})
    return {
        "order": "stateless", "split": flags.split, "part": flags.part, "seed": flags.seed, "seq_len": flags.seq_len,
        "corpora": [[s.name for s in group] for group in groups], "samples": samples,
    }  # fmt: skip


def _numbered(group: list[Source], document: int, first: int, stop: int) -> list[Any]:
    """Number a piece by its own file: [document, first, stop], before it the corpus's name where several are joined."""
    k = 0
    while document >= group[k].corpus.documents:
        document -= group[k].corpus.documents
        k += 1
    corpus = group[k].corpus
    document += corpus.first if isinstance(corpus, Part) else 0
    return [document, first, stop] if len(group) == 1 else [group[k].name, document, first, stop]


def _lines(found: dict[str, Any]) -> str:
    if found["order"] == "stateless":
        rows = found["samples"]
        parts = [" ".join(":".join(map(str, piece)) for piece in row["pieces"]) for row in rows]
        corpora = ", ".join("+".join(names) for names in found["corpora"])
        head = f"split {found['split']}, part {found['part']}, seed {found['seed']}; corpora {corpora}\n"
        head += "sample  corpus  number  epoch  document:first:stop\n"
        shown = [
            f"{row['sample']:6}  {row['corpus']:6}  {row['number']:6}  {row['epoch']:5}  {part}"
            for row, part in zip(rows, parts, strict=True)
        ]
        return head + "\n".join(shown)
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in found.items() if name != "datasets") + "".join(
        "\n\n" + "\n".join(f"{name}: {json.dumps(value)}" for name, value in part.items()) for part in found.get("datasets", [])
    )
