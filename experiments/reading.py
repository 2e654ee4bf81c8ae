"""What pre-training reads: its data flags come to samples for training and evaluation; and how any run's batches are made."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.data_settings import DataFlags
from experiments.initial import TOKENIZER
from experiments.settings import Experiment
from experiments.work import Work
from mtl.data.batch_sizes import BatchSizes, constant, ramp, read_schedule
from mtl.data.batches import BatchShape, host_batch
from mtl.data.dataset import Dataset, DataSettings, check_vocabulary, data_vocabulary, describe, open_dataset
from mtl.data.feed import Feed
from mtl.data.identity import digest_arrays, identify
from mtl.data.megatron_stream import MegatronSamples
from mtl.data.python_text import python_text
from mtl.data.samples import Samples, Windows
from mtl.data.tokenizers import description
from mtl.data.tokenizers.description import reopen
from mtl.errors import UserError
from mtl.sharding.parallel import Parallel

MEGATRON = "the index of data.order megatron (it follows train.steps where a corpus comes more than once)"
FOLLOWING = "torchrun --nproc-per-node 2 experiments/pretrain.py PRESET --mesh.tensor 2 (the same numbers on two processes)"


@dataclass(frozen=True)
class Pretrain(Experiment):
    """One pre-training run."""

    data: DataFlags = field(default_factory=DataFlags)


def settings(preset: Experiment, flags: list[str]) -> Pretrain:
    """Make the default settings from a preset's."""
    return Pretrain(**{f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)})


def work(setup: Pretrain) -> tuple[Pretrain, Work]:
    """Open the data, or the text that Python ships; refuse what cannot be trained on before a run folder exists."""
    if setup.data.set_vocab:
        setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, vocab=data_vocabulary(setup.data)))
    found = corpora(setup) if setup.data.given else built_in(setup)
    for samples in (found.train, found.held_out, found.test):
        if samples is not None:
            samples(0, setup.train.seq_len)
    return setup, found


def built_in(setup: Pretrain) -> Work:
    """Read the text that ships with Python, as bytes."""
    ignored = [f.name for f in dataclasses.fields(DataSettings) if getattr(setup.data, f.name) != getattr(DataFlags(), f.name)]
    if ignored:
        raise UserError(f"data.{ignored[0].replace('_', '-')} is given, but --data is not: the built-in text has no such setting.")
    if setup.model.vocab < 256:
        raise UserError(f"--model.vocab is {setup.model.vocab}: the built-in text is bytes and needs at least 256.")
    texts = python_text()
    train, valid = (
        Dataset(Windows(text, seed, name), {"python": len(text)}, {"python": 1.0})
        for text, seed, name in zip(texts, (setup.train.seed, 0), ("train", "validation"), strict=True)
    )
    return Work(
        train.samples, valid.samples, setup.train.eval_samples, bytes_per_token=1.0, epochs=_epochs(setup, train), prompt=tuple(b"def "),
        decode=as_bytes, following=FOLLOWING, decides={"data": f"Python's own text, digest {digest_arrays(texts)}"},
    )  # fmt: skip


def corpora(setup: Pretrain) -> Work:
    """Open what --data names."""
    flags, t, sizes = setup.data, setup.train, batch_sizes(setup)
    check_vocabulary(flags, setup.model.vocab)
    train, valid, test = (
        open_dataset(flags, split, t.seed, t.seq_len, count, setup.model.vocab)
        for split, count in (("train", max(sizes.before(t.steps), 1)), ("valid", t.eval_samples), ("test", t.eval_samples))
    )
    if train is None:
        raise UserError("there is no data to train on: give --data or --data.train.")
    shown = (valid or train).samples(0, t.seq_len).tokens
    return Work(
        train.samples, valid and valid.samples, t.eval_samples, (_described(setup, train, valid, test, sizes),),
        bytes_per_token=_bytes_per_token(setup, valid), test=test and test.samples, epochs=_epochs(setup, train),
        prompt=tuple(shown[: min(16, max(1, t.seq_len // 2))].tolist()), decode=_decoder(flags),
        following=FOLLOWING if describe(flags) is None else 'mtl generate RUN --prompt "..." (text from its newest checkpoint)',
        beside=_tokenizer(flags), decides=deciding(flags, train),
    )  # fmt: skip


def deciding(flags: DataFlags, train: Dataset) -> dict[str, Any]:
    """Say what the samples depend on: settings first, so that a changed one is named; then what each corpus holds."""
    names = ["apart", "reset_positions", "mask_ends", "end", *(("fim_rate", "fim_spm_rate", "fim_ids") if flags.fim_rate else ())]
    named = {f"data.{name}".replace("_", "-"): getattr(flags, name) for name in names}
    weights = {s.name: "" if s.weight is None else f"{float(s.weight):g} of " for s in train.sources}
    named |= {f"data ({s.name})": weights[s.name] + identify(s.corpus) for s in train.sources}
    return named | ({MEGATRON: digest_arrays(train.samples.built.arrays())} if isinstance(train.samples, MegatronSamples) else {})


def _tokenizer(flags: DataFlags) -> dict[str, bytes]:
    """Let checkpoints say which tokenizer the data was built with."""
    about = describe(flags)
    return {} if about is None else {TOKENIZER: description.dumps(about).encode()}


def as_bytes(tokens: list[int]) -> str:
    """Show tokens that are bytes; a model with a larger vocabulary may give others."""
    return bytes(t if t < 256 else ord("?") for t in tokens).decode("utf-8", "replace")


def batch_sizes(setup: Experiment) -> BatchSizes:
    """Say how many samples every step takes."""
    batch, final = setup.batch, setup.train.global_batch_size
    if batch.workers < 0 or batch.prefetch < 1:
        raise UserError("--batch.workers must not be negative, and --batch.prefetch must be at least 1.")
    if batch.rampup is not None and batch.schedule is not None:
        raise UserError("--batch.rampup and --batch.schedule are both given: use one.")
    if batch.rampup is not None:
        return ramp(*batch.rampup, final)
    if batch.schedule is not None:
        return read_schedule(batch.schedule, batch.unit, setup.train.seq_len, final)
    return constant(final)


def taken(sizes: BatchSizes, first: int, saved: Mapping[str, int] | None) -> Callable[[int], int]:
    """Give how many samples the steps before one took: the data's whole state. A resumed run goes on from what was ``saved``."""
    moved = 0 if saved is None else saved["samples"] - sizes.before(first)
    return lambda step: moved + sizes.before(step)


def feed(
    setup: Experiment, found: Work, par: Parallel, dtype: torch.dtype, micro_batch: int, first: int, before: Callable[[int], int],
    length: Callable[[int], int],
) -> Feed:  # fmt: skip
    """Make the training batches from step ``first`` on; ``before`` counts the samples before a step, ``length`` a sample's tokens."""
    sizes = batch_sizes(setup)

    def make(i: int) -> Any:
        shape = BatchShape(sizes.size(i), micro_batch, length(i))
        return host_batch(par, found.train, before(i), shape, dtype)

    device = torch.device(par.mesh.device_type)
    return Feed(make, range(first, setup.train.steps), device, setup.batch.workers, setup.batch.prefetch)


def counted(found: Work, before: Callable[[int], int], batches: Feed) -> Callable[[int, Any, dict[str, Any]], None]:
    """Make the hook that adds how often each corpus was seen, and the seconds waited for the next batch."""

    def hook(i: int, state: Any, record: dict[str, Any]) -> None:
        record["data_wait"] = batches.waited
        if found.epochs is not None:
            record["epochs"] = dict(found.epochs(before(i)))

    return hook


def _epochs(setup: Experiment, train: Dataset) -> Callable[[int], Mapping[str, float]]:
    return lambda samples: train.epochs(samples * setup.train.seq_len)


def _bytes_per_token(setup: Pretrain, valid: Dataset | None) -> float | None:
    """Count the bytes among the targets that an evaluation reads, where tokens are bytes."""
    about = describe(setup.data)
    if about is None or about.kind != "bytes" or valid is None:
        return None
    special = set(about.special.values())
    found = [valid.samples(i, setup.train.seq_len) for i in range(setup.train.eval_samples)]
    count = sum(w for s in found for t, w in zip(s.targets.tolist(), s.weights.tolist(), strict=True) if t not in special)
    return count / max(sum(float(s.weights.sum()) for s in found), 1.0)


def _decoder(flags: DataFlags) -> Callable[[list[int]], str]:
    """Turn ids to text by the tokenizer described beside the data; where it is not to be had, show the ids."""
    about = describe(flags)
    try:
        tokenizer = reopen(about, Path.cwd()) if about is not None else None
    except UserError:
        tokenizer = None
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])


def _described(setup: Pretrain, train: Dataset, valid: Dataset | None, test: Samples | Dataset | None, sizes: BatchSizes) -> str:
    """Say what is read."""
    parts = ", ".join(f"{train.shares[name]:.3g} {name} ({size:,} tokens)" for name, size in train.sizes.items())
    lacking = [name for name, found in (("valid", valid), ("test", test)) if found is None]
    missing = f"; nothing held out for {' and '.join(lacking)}" if lacking else ""
    end = max(train.epochs(sizes.before(setup.train.steps) * setup.train.seq_len).values())
    return f"data {parts}, {setup.data.order} order; {end:.3g} epochs in {setup.train.steps} steps{missing}"
