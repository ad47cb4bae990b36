"""A tree's leaves by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def named(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
    """Names of leaves, keys joined by "/" as in "encoder/layer_0/kernel", leaves, and structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return names, [leaf for _, leaf in pairs], structure
