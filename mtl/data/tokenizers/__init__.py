"""Tokenizers behind one small face: text to ids and back, special tokens by name, and a description to keep beside data."""

from mtl.data.tokenizers.description import Description, beside, describe, read, reopen, save
from mtl.data.tokenizers.load import KINDS, load
from mtl.data.tokenizers.tokenizer import Tokenizer, extend
from mtl.data.tokenizers.vocabulary import Flat, Ids

__all__ = ["KINDS", "Description", "Flat", "Ids", "Tokenizer", "beside", "describe", "extend", "load", "read", "reopen", "save"]
