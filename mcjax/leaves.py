"""A tree's leaves by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

IsLeaf = Callable[[Any], bool]


def named(tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[str], list[Any], Any]:
    """Names of leaves, keys joined by "/" as in "encoder/layer_0/kernel", leaves, and structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return names, [leaf for _, leaf in pairs], structure


def replaced(
    tree: Any,
    values: Mapping[str, Any],
    function: Callable[[str, Any, Any], Any],
    is_leaf: IsLeaf | None = None,
) -> Any:
    """The tree with ``function(name, leaf, value)`` in place of the leaves that have a value.

    Raises:
      ValueError: if a value's name is no leaf's.
    """
    names, leaves, structure = named(tree, is_leaf)
    missing = sorted(set(values) - set(names))
    if missing:
        raise ValueError(f"there is no leaf {missing[0]!r}: the tree has {some(names)}")
    made = [
        function(name, leaf, values[name]) if name in values else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def some(names: Any) -> str:
    """A few names, for messages."""
    names = list(names)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "no leaf"


@partial(jax.jit, donate_argnums=0)
def added(one: Any, other: Any) -> Any:
    """The sum of two trees of the same structure; the first one's arrays are given up."""
    return jax.tree.map(jnp.add, one, other)
