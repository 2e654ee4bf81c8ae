"""Look into a corpus: counts, lengths with a histogram, decoded samples, special tokens, and whether it is whole."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mtl.cli.bytes_bar import BytesBar
from mtl.cli.tokenizer_flags import TokenizerFlags
from mtl.data.indexed import Indexed
from mtl.data.shards import open_readable
from mtl.data.statistics import Lengths, bars, document_lengths, picture
from mtl.data.tokenizers import Description, Tokenizer, beside, describe, read, reopen
from mtl.errors import UserError

_SHOWN = 400


@dataclass(frozen=True)
class Inspect:
    """Look into a corpus: counts, lengths with a histogram, decoded samples, special tokens, and whether it is whole."""

    corpus: tyro.conf.Positional[Path]
    """The corpus's name without .bin and .idx; or, with --dtype, a .npy or .bin shard."""
    tokenizer: Annotated[TokenizerFlags, tyro.conf.arg(name="")] = field(default_factory=TokenizerFlags)
    samples: int = 3
    """Documents to decode, spread over the corpus."""
    document: int | None = None
    """Decode this document, whole, and nothing else."""
    verify: bool = False
    """Read every byte: all lengths and pointers must fit together, all ids lie in the vocabulary; also counts special tokens."""
    picture: Path | None = None
    """Write the histogram of lengths as a picture (.svg)."""
    dtype: str | None = None
    """Element type of a shard, such as uint16."""
    json: bool = False
    """Print one JSON object."""


def main(arguments: list[str]) -> None:
    """Look into a corpus."""
    flags = tyro.cli(tyro.conf.OmitArgPrefixes[Inspect], args=arguments, prog="mtl data inspect")
    corpus = open_readable(flags.corpus, flags.dtype)
    tokenizer, description, trouble = _tokenizer(flags)
    if flags.document is not None:
        if not 0 <= flags.document < corpus.documents:
            raise UserError(f"--document {flags.document}: {flags.corpus} has documents 0 to {corpus.documents - 1}.")
        print(_text(corpus, flags.document, tokenizer, None))
        return
    if flags.samples < 0:
        raise UserError(f"--samples is {flags.samples}: it must not be negative.")
    if flags.picture and flags.picture.suffix != ".svg":
        raise UserError(f"--picture {flags.picture}: the picture is an .svg file; name it so.")
    lengths = document_lengths(corpus)
    report = _report(flags, corpus, lengths, tokenizer, description)
    if flags.picture:
        _draw(flags.picture, picture(lengths, f"{flags.corpus.name}: tokens a document"))
    if flags.json:
        print(json.dumps(report))
    else:
        _print(report, bars(lengths), trouble)


def _draw(path: Path, drawn: str) -> None:
    try:
        path.write_text(drawn)
    except OSError as error:
        raise UserError(f"--picture {path} cannot be written: {error.strerror}.") from None


def _tokenizer(flags: Inspect) -> tuple[Tokenizer | None, Description | None, str]:
    """Open the tokenizer that is given, or that the description beside the corpus speaks of; say why there is none."""
    description = read(beside(flags.corpus))
    given = flags.tokenizer.load()
    if given is not None:
        mine = describe(given)
        if description and (difference := description.differs(mine)):
            raise UserError(f"{flags.corpus} was built with another tokenizer than the one given: {difference}.")
        return given, mine, ""
    if description is None:
        return None, None, "no tokenizer is described beside the corpus: give --tokenizer and its files to see text"
    try:
        return reopen(description, flags.corpus.parent), description, ""
    except UserError as error:
        return None, description, str(error)


def _report(
    flags: Inspect, corpus: Indexed, lengths: Lengths, tokenizer: Tokenizer | None, description: Description | None
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "corpus": str(flags.corpus), "documents": corpus.documents, "sequences": corpus.sequences, "tokens": corpus.total,
        "dtype": corpus.dtype.name, "bytes": corpus.tokens.nbytes, "multimodal": corpus.modes is not None,
        "lengths": dataclasses.asdict(lengths),
    }  # fmt: skip
    if description:
        about = ("kind", "vocab_size", "eod", "bos", "pad", "special", "fingerprint")
        report["tokenizer"] = {name: getattr(description, name) for name in about}
    if flags.verify:
        size = description.vocab_size if description else None
        report["verified"] = {"bytes": _verify(corpus, size), "vocabulary_checked": size is not None}
        if description:
            report["special_counts"] = _count(corpus, dict(description.special))
    some = np.unique(np.linspace(0, corpus.documents - 1, min(flags.samples, corpus.documents)).astype(np.int64))
    report["samples"] = [{"document": int(d), "text": _text(corpus, int(d), tokenizer, _SHOWN)} for d in some]
    return report


def _verify(corpus: Indexed, vocab_size: int | None) -> int:
    total = corpus.tokens.nbytes + 12 * corpus.sequences + 8 * corpus.documents
    done = 0
    with BytesBar("verify") as bar:
        for size in corpus.verify(vocab_size):
            done += size
            bar.move(done, total, done)
    return done


def _count(corpus: Indexed, special: dict[str, int]) -> dict[str, int]:
    counts = dict.fromkeys(special, 0)
    for i in range(0, corpus.total, 1 << 22):
        block = corpus.tokens[i : i + (1 << 22)]
        if len(special) > 16:
            values, times = np.unique(block, return_counts=True)
            found = dict(zip(values.tolist(), times.tolist(), strict=True))
        else:
            found = {id_: int((block == id_).sum()) for id_ in special.values()}
        for name, id_ in special.items():
            counts[name] += found.get(id_, 0)
    return counts


def _text(corpus: Indexed, document: int, tokenizer: Tokenizer | None, limit: int | None) -> str:
    """Give a document's text, or its ids where no tokenizer is known."""
    tokens = corpus.document(document)
    some = tokens[:limit].tolist()
    text = tokenizer.decode(some) if tokenizer else " ".join(map(str, some))
    return text if limit is None or (len(text) <= limit and len(tokens) <= limit) else text[:limit] + " ..."


def _print(report: dict[str, Any], histogram: list[str], trouble: str) -> None:
    lengths = report["lengths"]
    several = "" if report["sequences"] == report["documents"] else f" in {report['sequences']:,} sequences"
    print(f"{report['corpus']}: {report['documents']:,} documents{several}, {report['tokens']:,} tokens of {report['dtype']}")
    if report["documents"]:
        percentiles = ", ".join(f"{p} %: {n:,}" for p, n in lengths["percentiles"].items())
        print(f"tokens a document: {lengths['shortest']:,} to {lengths['longest']:,}, mean {lengths['mean']:,.1f} ({percentiles})")
        if lengths["empty"]:
            print(f"{lengths['empty']:,} documents are empty")
        print("\n".join("  " + line for line in histogram))
    if known := report.get("tokenizer"):
        print(f"tokenizer {known['kind']}: vocabulary {known['vocab_size']:,}, eod {known['eod']}, bos {known['bos']}, pad {known['pad']}")
        counts = report.get("special_counts", {})
        for name, i in list(known["special"].items())[:20]:
            print(f"  {i} {name!r}" + (f": {counts[name]:,} times" if name in counts else ""))
        if len(known["special"]) > 20:
            print(f"  and {len(known['special']) - 20} special tokens more")
    if "verified" in report:
        checked = "ids lie in the vocabulary" if report["verified"]["vocabulary_checked"] else "no vocabulary known to check ids against"
        print(f"verified: {report['verified']['bytes']:,} bytes fit together; {checked}")
    if trouble:
        print(trouble)
    for sample in report["samples"]:
        print(f"\ndocument {sample['document']:,}:\n{sample['text']}")
