"""Fine-tune on chats: `python experiments/finetune.py PRESET --data chats.jsonl --flags`, alone or under torchrun."""

if __name__ == "__main__":  # before the slow imports, so that no signal is lost while they run
    from mtl.runtime import signals

    CAUGHT = signals.install()

import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments import pretrain
from experiments.initial import TOKENIZER
from experiments.language import TokenizerSettings, settled
from experiments.settings import Experiment
from experiments.work import Kind, Work
from mtl import random
from mtl.data import tokenizers
from mtl.data.chat.corpus import Corpus, OnLong, make_corpus
from mtl.data.chat.encode import parse_weights
from mtl.data.chat.jinja import jinja_template, read_template
from mtl.data.chat.rows import Chat, read_chats
from mtl.data.chat.samples import Packed, Padded
from mtl.data.chat.templates import BUILTIN, Template, builtin
from mtl.data.identity import digest_arrays
from mtl.data.tokenizers import Tokenizer, description
from mtl.errors import UserError
from mtl.models import decoder
from mtl.runtime import process


@dataclass(frozen=True)
class ChatSettings:
    """Which chats are read, and how they become sequences."""

    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")] = ()
    """JSONL files: {"messages": [{"role", "content"}, ...]} or {"system", "question", "answer"} a row."""
    valid: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILES")] = ()
    """Chats to evaluate on; without them a share of data, held-out, is kept for it."""
    held_out: float = 0.05
    """The share of data's rows that is kept for evaluation, chosen by their content; 0 keeps none."""
    template: str | None = None
    """chatml, llama2, llama3, mistral, or a Jinja template: a tokenizer_config.json, its folder, or a .jinja file. By default the template
    that the model of --init brings, else chatml."""
    role_weights: str = "assistant=1"
    """How much the words of a role count in the loss, such as assistant=1,user=0.1."""
    packing: Literal["best-fit", "pad"] = "best-fit"
    """best-fit packs conversations into sequences and keeps them apart; pad takes one a sequence, as long as the batch's longest."""
    on_long: OnLong = "split"
    """A conversation longer than train.seq-len: cut into pieces, truncated, or skipped; all are counted."""
    epochs: float | None = None
    """Passes over the data; sets train.steps."""


@dataclass(frozen=True)
class FineTune(Experiment):
    """One fine-tuning run: the settings of pre-training, and what the chats need."""

    chat: Annotated[ChatSettings, tyro.conf.arg(name="")] = field(default_factory=ChatSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)


def settings(preset: Experiment, flags: list[str]) -> FineTune:
    """Make the default settings from a preset's."""
    return FineTune(**{f.name: getattr(preset, f.name) for f in fields(preset)})


def work(setup: FineTune) -> tuple[FineTune, Work]:
    """Read the chats, settle the vocabulary and the number of steps, and make samples."""
    chat, train = setup.chat, setup.train
    if not chat.data:
        raise UserError("--data is missing: give JSONL files of chats, as in --data chats.jsonl.")
    if train.seq_len < 1:
        raise UserError(f"--train.seq-len is {train.seq_len}: it must be at least 1.")
    language, name = settled(setup.tokenizer, chat.template, setup.init)
    setup = replace(setup, tokenizer=language, chat=replace(chat, template=name))
    chat, weights = setup.chat, parse_weights(chat.role_weights)
    tokenizer, template, new = open_language(setup, [role for role, weight in weights.items() if weight])
    setup = replace(setup, model=with_vocabulary(setup.model, tokenizer))
    rows, held = split([c for path in chat.data for c in read_chats(path)], chat)
    corpus, held_out = (make_corpus(r, template, tokenizer, weights, train.seq_len, chat.on_long) if r else None for r in (rows, held))
    if corpus is None:
        raise UserError(f"--data {' '.join(map(str, chat.data))}: there are no rows to train on ({len(held)} are held out).")
    pad = tokenizer.pad if tokenizer.pad is not None else 0
    samples = make_samples(chat, corpus, train.seq_len, train.seed, pad, True)
    evaluated = None if held_out is None else make_samples(chat, held_out, train.seq_len, 0, pad, False)
    setup = with_steps(setup, len(samples))
    prompt, ends = question(held_out or corpus)
    epochs = setup.train.steps * train.global_batch_size / len(samples)
    about = description.describe(tokenizer)
    said = [
        f"template {template.name}, tokenizer {tokenizer.kind}: {tokenizer.vocab_size} ids{', new: ' + ', '.join(new) if new else ''}",
        f"training: {corpus.counts}; {described(samples)}",
        f"held out: {held_out.counts}" if held_out else "held out: nothing (--valid or --held-out)",
        f"{setup.train.steps} steps of {train.global_batch_size} sequences are {epochs:.1f} epochs",
    ]
    count = 0 if evaluated is None else min(train.eval_samples, len(evaluated))
    length = None if isinstance(samples, Packed) else lambda i, multiple: padded_length(samples, setup, i, multiple)
    return setup, Work(
        samples, evaluated, count, tuple(said), length, prompt=prompt, ends=ends,
        decode=lambda ids: tokenizer.decode([i for i in ids if i < tokenizer.vocab_size]),
        following=f'mtl generate RUN --prompt-ids "{" ".join(map(str, prompt))}" (the answer of its newest checkpoint)',
        beside={TOKENIZER: description.dumps(about).encode()}, decides=deciding(setup, corpus, about),
    )  # fmt: skip


def deciding(setup: FineTune, corpus: Corpus, about: description.Description) -> dict[str, Any]:
    """Say what the samples depend on: settings first, so that a changed one is named; then the tokens and weights that all comes to."""
    chat = setup.chat
    template = chat.template or "chatml"
    named: dict[str, Any] = {"template": template if template in BUILTIN else Path(template).name}
    named |= {"role-weights": chat.role_weights, "packing": chat.packing, "on-long": chat.on_long}
    named |= {"valid": bool(chat.valid), "held-out": 0.0 if chat.valid else chat.held_out}
    content = f"{corpus.counts}, digest {digest_arrays((corpus.tokens, corpus.weights, corpus.starts))}"
    return {f"--{name}": value for name, value in named.items()} | {
        "the tokenizer": f"{about.kind} {about.fingerprint[:12]}",
        "--data": content,
    }


def open_language(setup: FineTune, roles: list[str]) -> tuple[Tokenizer, Template, list[str]]:
    """Open the tokenizer and the template, and add the special tokens that the template writes; gives those that are new too."""
    asked, name = setup.tokenizer, setup.chat.template or "chatml"
    found = tokenizers.load(
        asked.kind or "bytes", bos=asked.bos, eod=asked.eos, pad=asked.pad,
        pattern=asked.pattern, vocab=asked.vocab, merges=asked.merges, model=asked.model,
    )  # fmt: skip
    before = set(found.special)
    if name in BUILTIN:
        bos, eos = found.roles.get("bos", "<s>"), found.roles.get("eod", "</s>")
        template = builtin(name, bos, eos, {**found.special, **dict.fromkeys(asked.special, 0)})
        found = tokenizers.extend(found, [*template.special, *asked.special])
    elif Path(name).exists() or Path(name).suffix in (".json", ".jinja"):
        source = read_template(Path(name))
        found = tokenizers.extend(found, [*source.special, *asked.special])
        template = jinja_template(source, tuple(found.special), roles)
    else:
        template = builtin(name, "", "", {})  # says what there is
    return found, template, [f"{n} {i}" for n, i in found.special.items() if n not in before]


def with_vocabulary(model: decoder.Config, tokenizer: Tokenizer) -> decoder.Config:
    """Let the model grow by special tokens; ordinary tokens that it lacks mean that the tokenizer is another one."""
    special = set(tokenizer.special.values())
    lacking = [i for i in range(model.vocab, tokenizer.vocab_size) if i not in special]
    if lacking:
        raise UserError(
            f"the tokenizer ({tokenizer.kind}) has {tokenizer.vocab_size} ids and the model {model.vocab} (--model.vocab); id {lacking[0]} "
            "is no special token. Give the model's own tokenizer, or another --model.vocab."
        )
    return replace(model, vocab=max(model.vocab, tokenizer.vocab_size))


def split(rows: list[Chat], chat: ChatSettings) -> tuple[list[Chat], list[Chat]]:
    """Give rows to train on and to evaluate on: files of their own, or a share chosen by content, so that equal rows stay together."""
    if chat.valid:
        return rows, [c for path in chat.valid for c in read_chats(path)]
    if not 0 <= chat.held_out < 1:
        raise UserError(f"--held-out is {chat.held_out}: it must lie from 0 to under 1.")
    border = chat.held_out * 2**64 - 2**63
    held = [random.key("held out", json.dumps([dict(m) for m in c.messages], sort_keys=True)) < border for c in rows]
    return [c for c, out in zip(rows, held, strict=True) if not out], [c for c, out in zip(rows, held, strict=True) if out]


def make_samples(chat: ChatSettings, corpus: Corpus, seq_len: int, seed: int, pad: int, shuffle: bool) -> Packed | Padded:
    """Make samples as --packing says."""
    return Packed(corpus, seq_len, seed, pad, shuffle) if chat.packing == "best-fit" else Padded(corpus, seed, pad, shuffle)


def with_steps(setup: FineTune, sequences: int) -> FineTune:
    """Turn epochs into steps, where they are given."""
    epochs, train = setup.chat.epochs, setup.train
    if epochs is None:
        return setup
    if not 0 < epochs < math.inf:
        raise UserError(f"--epochs is {epochs}: it must be a number above 0.")
    steps = math.ceil(epochs * sequences / max(train.global_batch_size, 1))
    return replace(setup, train=replace(train, steps=steps))


def padded_length(samples: Any, setup: FineTune, step: int, multiple: int) -> int:
    """Give the length of step's batch: its longest conversation, rounded up so that there are few lengths and the mesh divides each."""
    size, whole = setup.train.global_batch_size, setup.train.seq_len
    return min(whole, samples.longest(step * size, size, math.lcm(max(1, whole // 8), multiple)))


def described(samples: Packed | Padded) -> str:
    """Say what the documents come to."""
    if isinstance(samples, Padded):
        return f"{len(samples):,} sequences, padded to the longest of a batch"
    return f"{len(samples):,} sequences, {samples.packing.efficiency:.2%} full"


def question(corpus: Corpus) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give a conversation up to its first answer, and the token that ends the answer."""
    tokens, weights = corpus.document(0)
    targets = np.flatnonzero(weights)
    return tuple(tokens[: targets[0]].tolist()), (int(tokens[targets[-1]]),)


FINETUNE = Kind("finetune.py", "Fine-tune", settings, work)


if __name__ == "__main__":
    process.guarded(lambda: pretrain.main(CAUGHT, FINETUNE))
