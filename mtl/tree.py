"""Trees of tensors: nested dicts, tuples and lists, mapped over and named by path. The only user of torch's pytree."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

Tree = Any
"""Nested dicts, tuples, lists and named tuples with leaves of any kind."""


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Split a tree into its leaves and its structure."""
    return pytree.tree_flatten(tree)


def unflatten(structure: Any, leaves: Iterable[Any]) -> Tree:
    """Put leaves back into a structure that `flatten` gave."""
    return pytree.tree_unflatten(list(leaves), structure)


def spell_structure(structure: Any) -> str:
    """Write a structure of dicts, lists and tuples as JSON; any other raises NotImplementedError."""
    return pytree.treespec_dumps(structure)


def read_structure(text: str) -> Any:
    """Read what `spell_structure` wrote."""
    return pytree.treespec_loads(text)


def leaves(tree: Tree) -> list[Any]:
    """List the leaves in order."""
    return pytree.tree_leaves(tree)


def leaves_like(tree: Tree, other: Tree) -> list[Any]:
    """List what ``other``, of the same structure and deeper, has at the leaves of ``tree``."""
    return pytree.tree_structure(tree).flatten_up_to(other)


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply a function to the leaves of one tree, or of several of one structure."""
    return pytree.tree_map(fn, tree, *rest)


def paths(tree: Tree) -> list[tuple[str, Any]]:
    """List (path, leaf) pairs; a path is its keys joined by dots, as in ``layers.attention.query``."""
    return [(_spell(keys), leaf) for keys, leaf in pytree.tree_flatten_with_path(tree)[0]]


def keyed(tree: Tree, empty: bool = False) -> list[tuple[tuple[str | int, ...], Any]]:
    """List (keys, leaf) pairs: names of dict entries and fields, numbers of places. With ``empty``, empty containers count as leaves."""

    def is_empty(x: Any) -> bool:
        return isinstance(x, dict | list | tuple) and not x

    found = pytree.tree_flatten_with_path(tree, is_leaf=is_empty if empty else None)[0]
    return [(tuple(k.idx if isinstance(k, pytree.SequenceKey) else _spell((k,)) for k in keys), leaf) for keys, leaf in found]


def map_paths(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Apply ``fn(path, leaf)`` to every leaf."""
    return pytree.tree_map_with_path(lambda keys, leaf: fn(_spell(keys), leaf), tree)


def join(first: Tree, second: Tree) -> Tree:
    """Put two nested dicts, or lists of them, together; where both have a leaf, the second's counts. None is an empty tree."""
    if isinstance(first, list) and isinstance(second, list):
        return [join(a, b) for a, b in zip(first, second, strict=True)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return first if second is None or (isinstance(first, list) and second == {}) else second
    return {**first, **{key: join(first.get(key), value) for key, value in second.items()}}


def unstack(tree: Tree) -> list[Tree]:
    """Take a tree of stacked tensors apart along their first dimension: views."""
    found, structure = flatten(tree)
    return [unflatten(structure, each) for each in zip(*(x.unbind(0) for x in found), strict=True)]


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack the tensors of equal trees."""
    return map(lambda *each: torch.stack(each), *trees)


def total(values: Iterable[Any]) -> Any:
    """Sum at least one value, in order."""
    return functools.reduce(lambda x, y: x + y, values)


def _spell(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)
