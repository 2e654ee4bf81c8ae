"""From spans to tokens and the weight of each in the loss."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtl.data.chat.rows import ROLES
from mtl.data.chat.templates import Span
from mtl.data.tokenizers import Tokenizer
from mtl.errors import UserError


class Encoded(NamedTuple):
    """The tokens of a conversation, and how much each counts as a target."""

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def parse_weights(text: str) -> dict[str, float]:
    """Read loss weights by role, as in ``assistant=1,user=0.1``; roles that are not named have 0."""
    found: dict[str, float] = {}
    for part in text.replace(" ", "").split(","):
        role, _, number = part.partition("=")
        try:
            found[role] = float(number)
        except ValueError:
            raise UserError(f"--role-weights {text!r}: {part!r} is no role=number, as in assistant=1,user=0.1.") from None
        if role not in ROLES:
            raise UserError(f"--role-weights {text!r}: {role!r} is no role; expected {', '.join(ROLES)}.")
        if not 0 <= found[role] < float("inf"):
            raise UserError(f"--role-weights {text!r}: {part!r} is no weight; expected a number from 0 on.")
    if not any(found.values()):
        raise UserError(f"--role-weights {text!r}: no role counts, so nothing can be learnt. Give one a weight above 0.")
    return found


def encode(tokenizer: Tokenizer, chats: Sequence[Sequence[Span]], weights: Mapping[str, float]) -> list[Encoded]:
    """Give tokens and weights of many conversations.

    Text between special tokens is tokenised in one piece, as it is when the model is used, and cut where the weight changes: after the
    tokens that the text up to there has by itself. Where these are not how the whole begins, the pieces are tokenised apart.
    """
    runs = [_runs(spans, weights) for spans in chats]
    texts = sorted({text for chat in runs for run in chat if isinstance(run, list) for text in _wanted(run)})
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True)) if texts else {}
    return [_join(tokenizer, chat, ids) for chat in runs]


Run = list[tuple[str, float]]


def _runs(spans: Sequence[Span], weights: Mapping[str, float]) -> list[Run | tuple[str, float]]:
    """Join text between special tokens to runs of (text, weight), neighbours differing in weight; special tokens stand between them."""
    runs: list[Run | tuple[str, float]] = []
    for span in spans:
        weight = weights.get(span.role, 0.0) if span.role else 0.0
        if span.special:
            runs.append((span.text, weight))
        elif span.text:
            if not runs or not isinstance(runs[-1], list):
                runs.append([])
            run = runs[-1]
            assert isinstance(run, list)
            if run and run[-1][1] == weight:
                run[-1] = (run[-1][0] + span.text, weight)
            else:
                run.append((span.text, weight))
    return runs


def _prefixes(run: Run) -> list[str]:
    return ["".join(text for text, _ in run[: i + 1]) for i in range(len(run))]


def _wanted(run: Run) -> list[str]:
    """List the texts whose tokens are needed: each beginning of a run, and its parts."""
    return [*_prefixes(run), *(text for text, _ in run)]


def _join(tokenizer: Tokenizer, runs: list[Run | tuple[str, float]], ids: Mapping[str, npt.NDArray[np.integer]]) -> Encoded:
    tokens: list[npt.NDArray[np.integer]] = [np.zeros(0, np.int32)]
    counts: list[float] = []
    for run in runs:
        if isinstance(run, tuple):
            tokens.append(np.array([tokenizer.special[run[0]]]))
            counts.append(run[1])
            continue
        begun = [ids[text] for text in _prefixes(run)]
        whole, ends = begun[-1], [len(b) for b in begun]
        if not all(np.array_equal(whole[:end], b) for end, b in zip(ends, begun, strict=True)):
            parts = [ids[text] for text, _ in run]
            whole, ends = np.concatenate(parts), np.cumsum([len(p) for p in parts]).tolist()
        tokens.append(whole)
        counts += [weight for (_, weight), size in zip(run, np.diff([0, *ends]), strict=True) for _ in range(size)]
    return Encoded(np.concatenate(tokens).astype(np.int32), np.array(counts, dtype=np.float32))
