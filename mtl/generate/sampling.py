"""From logits to the next token: the best one, or a draw that any mesh repeats."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl import random
from mtl.errors import UserError

PIECE = 256
"""Logits that are compared at once."""


@dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature 0 takes the best token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if not 0.0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: expected a number from 0 (always the best token) on.")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: expected how many of the best tokens to draw from, or 0 for all.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top-p is {self.top_p}: expected a share of the probability, over 0 and at most 1.")


def choose(logits: Tensor, how: Sampling, rows: Tensor, count: Tensor) -> Tensor:
    """Choose one token a row from logits [B, V]: the draw depends on (seed, row's number, how many came before, token) alone.

    The largest of (logit / temperature + Gumbel noise) is a draw from the softmax, so no order of the tokens and no running sum matters.
    """
    if how.temperature == 0.0:
        return best(logits)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    kept = allowed(logits.to(dtype) / how.temperature, how)
    key = random.bits(random.bits(random.key("sample", how.seed), rows), count).unsqueeze(-1)
    draw = random.uniform(key, torch.arange(logits.shape[-1], device=logits.device), dtype)
    return best(kept - (-draw.log()).log())


def best(logits: Tensor) -> Tensor:
    """Give the place of each row's largest logit, of equals the first: those of pieces, then the best of them.

    A GPU runs a row of one search in one program, on one of its many processors.
    """
    pieces = F.pad(logits, (0, -logits.shape[-1] % PIECE), value=-math.inf).unflatten(-1, (-1, PIECE))
    top, place = pieces.max(-1)
    piece = top.argmax(-1, keepdim=True)
    return (piece * PIECE + place.gather(-1, piece)).squeeze(-1)


def allowed(logits: Tensor, how: Sampling) -> Tensor:
    """Hide all but the top_k best tokens, then all but the fewest best whose probability reaches top_p. Equals of the last one stay."""
    if 0 < how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if how.top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        odds = ordered.softmax(-1)
        beyond = odds.cumsum(-1) - odds >= how.top_p  # those before it reach top_p already: the best token always stays
        least = ordered.masked_fill(beyond, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits
