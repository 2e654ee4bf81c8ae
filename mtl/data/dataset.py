"""From settings to samples: corpora opened and split, blended and ordered, checked against the model's vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mtl import random
from mtl.data.blend import Blend
from mtl.data.corpus import SPLITS, Corpus, Joined, Shard, open_corpus, split_bounds
from mtl.data.fill_middle import FillMiddle
from mtl.data.megatron_stream import megatron_samples
from mtl.data.mixture import Entry, read_mixture
from mtl.data.samples import Documents, Sample, Samples
from mtl.data.stream import Reading, Stream
from mtl.data.tokenizers import description
from mtl.errors import UserError

DEFAULT_SPLIT = "969,30,1"
FILL_MIDDLE_NAMES = (
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
    ("<PRE>", "<MID>", "<SUF>"),
)


@dataclass(frozen=True)
class DataSettings:
    """Which data a run reads, and how."""

    paths: tuple[str, ...] = ()
    """A corpus, several, `weight path` pairs, or a list file; split by data.split. By default text that Python ships."""
    train: tuple[str, ...] = ()
    """The same for training alone, unsplit."""
    valid: tuple[str, ...] = ()
    """The same for evaluation while training, unsplit."""
    test: tuple[str, ...] = ()
    """The same for evaluation at the end, unsplit."""
    split: str | None = None
    """Shares of train, valid and test in every corpus; 969,30,1 by default."""
    order: Literal["stateless", "megatron"] = "stateless"
    """stateless builds nothing and never reshuffles; megatron is Megatron-LM's order bit for bit."""
    dtype: str | None = None
    """The element type of plain arrays of tokens (.bin without .idx), such as uint16."""
    skip_bytes: int = 0
    """Length of the header that such arrays have."""
    apart: bool = False
    """Keep attention within documents."""
    reset_positions: bool = False
    """Count positions from 0 in every document."""
    mask_ends: bool = False
    """Give the last token of a document no loss."""
    end: int | None = None
    """The end-of-document id; by default the tokenizer's that is described beside the data."""
    fim_rate: float = 0.0
    """The share of documents turned to fill-in-the-middle."""
    fim_spm_rate: float = 0.5
    """The share of these with the suffix first."""
    fim_ids: tuple[int, int, int] | None = None
    """Ids of prefix, middle and suffix; by default the tokenizer's tokens of such names."""
    set_vocab: bool = False
    """Give the model the vocabulary size of the data."""

    @property
    def given(self) -> bool:
        """Tell whether any data is named."""
        return bool(self.paths or self.train or self.valid or self.test)


@dataclass(frozen=True)
class Source:
    """One opened corpus of a split, with its weight where it has one."""

    name: str
    weight: Fraction | None
    corpus: Corpus


@dataclass(frozen=True)
class Dataset:
    """One split: its samples, and the tokens of each corpus for the count of epochs."""

    samples: Samples
    sizes: Mapping[str, int]
    shares: Mapping[str, float]
    sources: Sequence[Source] = ()

    def epochs(self, tokens: float) -> dict[str, float]:
        """Say how often each corpus has been seen after so many tokens."""
        return {name: tokens * self.shares[name] / size for name, size in self.sizes.items()}


class Blended:
    """A blend of endless samples."""

    def __init__(self, blend: Blend, streams: Sequence[Samples]) -> None:
        """Take the schedule and a stream for each of its corpora."""
        self.blend, self.streams = blend, streams

    def __call__(self, index: int, seq_len: int) -> Sample:
        """Give one sample."""
        k, number = self.blend(index)
        return self.streams[k](number, seq_len)


def open_sources(settings: DataSettings, split: str) -> list[Source]:
    """Open the corpora of one split; those that have nothing in it are refused in train and left out elsewhere."""
    own: tuple[str, ...] = getattr(settings, split)
    if own and settings.paths:
        raise UserError(f"--data and --data.{split} are both given: use --data (split by --data.split) or --data.train, .valid and .test.")
    if settings.split is not None and not settings.paths:
        raise UserError(f"--data.split is {settings.split!r}, but --data is not given: --data.train, .valid and .test are not split.")
    if not own and not settings.paths:
        return []
    shares = settings.split or DEFAULT_SPLIT
    bounds = (0.0, 1.0) if own else split_bounds(shares)[SPLITS.index(split)]
    entries = read_mixture(own or settings.paths, f"--data.{split}" if own else "--data")
    found = [(e, open_corpus(e.path, bounds, settings.dtype, settings.skip_bytes)) for e in _distinct(entries)]
    empty = [e for e, corpus in found if corpus.size == 0]
    if empty and (split == "train" or own or len(empty) == len(found)):
        if not own and split != "train" and (settings.split is None or bounds is None):
            return []
        part = "holds no tokens" if own else f"has no tokens in split {split} of {shares}"
        raise UserError(f"corpus {empty[0].path} {part}. Choose other data or another --data.split.")
    return [Source(e.name, e.weight, corpus) for e, corpus in found if corpus.size]


def open_dataset(settings: DataSettings, split: str, seed: int, seq_len: int, samples: int, vocab: int | None) -> Dataset | None:
    """Make one split's samples, or None where there is no such split.

    Megatron-LM's order is built for ``samples`` samples; the stateless order does not depend on it.
    """
    sources = open_sources(settings, split)
    if not sources:
        return None
    reading = choose_reading(settings, sources, vocab)
    sizes = {s.name: s.corpus.size for s in sources}
    total = sum(s.weight if s.weight is not None else s.corpus.size for s in sources)
    if not total:
        raise UserError(f"split {split} of --data: all corpora that have tokens in it have weight 0.")
    shares = {s.name: float(Fraction(s.weight if s.weight is not None else s.corpus.size) / total) for s in sources}
    if settings.order == "megatron":
        parts = [(s.name, s.corpus, s.weight) for s in sources]
        return Dataset(megatron_samples(parts, seq_len, samples, seed, reading), sizes, shares, sources)
    if sources[0].weight is None:
        whole = sources[0].corpus if len(sources) == 1 else Joined([s.corpus for s in sources])
        name = sources[0].name if len(sources) == 1 else "the joined corpora"
        return Dataset(Stream(whole, random.key("data", seed, split, 0), name, reading), sizes, shares, sources)
    streams = [Stream(s.corpus, random.key("data", seed, split, k), s.name, reading) for k, s in enumerate(sources)]
    return Dataset(Blended(Blend([s.weight or Fraction(0) for s in sources]), streams), sizes, shares, sources)


def choose_reading(settings: DataSettings, sources: Sequence[Source], vocab: int | None) -> Reading:
    """Say what is done with the tokens, from the settings and the tokenizer described beside the data."""
    about = describe(settings)
    end = settings.end if settings.end is not None else (about.eod if about else None)
    separate = settings.apart or settings.reset_positions or settings.mask_ends
    if separate and end is None and any(isinstance(s.corpus, Shard) for s in sources):
        raise UserError(
            "--data.apart, .reset-positions and .mask-ends need --data.end, the end-of-document id: plain arrays have no documents."
        )
    for name in ("fim_rate", "fim_spm_rate"):
        if not 0 <= getattr(settings, name) <= 1:
            raise UserError(f"--data.{name.replace('_', '-')} is {getattr(settings, name)}: it must lie from 0 to 1.")
    ids = settings.fim_ids
    if ids is None and settings.fim_rate and about:
        ids = next(((about.special[p], about.special[m], about.special[s]) for p, m, s in FILL_MIDDLE_NAMES if p in about.special), None)
    if settings.fim_rate and ids is None:
        raise UserError(
            f"--data.fim-rate {settings.fim_rate} needs --data.fim-ids (prefix, middle, suffix): the data's tokenizer has no such tokens."
        )
    named = {"--data.end": [] if end is None else [end], "--data.fim-ids": list(ids or ())}
    for name, values in named.items():
        if vocab is not None and any(not 0 <= i < vocab for i in values):
            raise UserError(f"{name} {' '.join(map(str, values))} lies outside the model's vocabulary, 0 to {vocab - 1} (--model.vocab).")
    fill = FillMiddle(settings.fim_rate, settings.fim_spm_rate, *ids) if settings.fim_rate and ids else None
    return Reading(Documents(settings.apart, settings.reset_positions, settings.mask_ends, end), fill, vocab)


def describe(settings: DataSettings) -> description.Description | None:
    """Find the tokenizer described beside the data; corpora that disagree on it are refused."""
    found: description.Description | None = None
    first = ""
    for name in ("paths", "train", "valid", "test"):
        words: tuple[str, ...] = getattr(settings, name)
        for entry in read_mixture(words, f"--data.{name}") if words else []:
            path = entry.path.removesuffix(".bin").removesuffix(".idx")
            about = description.read(description.beside(path))
            if about is not None and found is not None and (difference := found.differs(about)):
                raise UserError(f"corpora {first} and {path} were built with different tokenizers: {difference}.")
            if about is not None and found is None:
                found, first = about, path
    return found


def check_vocabulary(settings: DataSettings, vocab: int) -> None:
    """Refuse data whose tokenizer has ids that the model has not."""
    about = describe(settings)
    if about is not None and about.vocab_size > vocab:
        raise UserError(
            f"the data's tokenizer ({about.kind}) has {about.vocab_size} ids and the model {vocab} (--model.vocab). "
            f"Give --data.set-vocab or --model.vocab {about.vocab_size}, or other data."
        )


def data_vocabulary(settings: DataSettings) -> int:
    """Give the vocabulary size that is described beside the data."""
    about = describe(settings)
    if about is None:
        raise UserError(
            "--data.set-vocab needs a tokenizer described beside the data (mtl data build writes it): give --model.vocab instead."
        )
    return about.vocab_size


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Number the names that occur more than once."""
    names = [e.name for e in entries]
    return [e if names.count(e.name) == 1 else e._replace(name=f"{e.name}#{k}") for k, e in enumerate(entries)]
