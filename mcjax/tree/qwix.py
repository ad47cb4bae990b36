"""Trees that qwix quantised, as arrays that can be shrunk.

Neither format holds the other's values: steps of planes are powers of 2^(1/16) and have an offset
of their own, a `QArray`'s are any number and have an integer one. So its values are what is taken.
"""

from __future__ import annotations

from typing import Any

import jax


def is_qwix(leaf: Any) -> bool:
    """Whether a leaf is a `qwix.QArray`, by itself or with what qwix keeps beside it."""
    inner = getattr(leaf, "array", leaf)
    return all(hasattr(inner, name) for name in ("qvalue", "scale", "zero_point"))


def from_qwix(tree: Any) -> Any:
    """The tree with every `qwix.QArray` as the array that it stands for.

    Args:
      tree: from `qwix.quantize_params`, or with arrays from `qwix.quantize`. Those for products by
        reshaped weights have the shape that is multiplied.
    """

    def one(leaf):
        if not is_qwix(leaf):
            return leaf
        import qwix

        return qwix.dequantize(getattr(leaf, "array", leaf))

    return jax.tree.map(one, tree, is_leaf=is_qwix)
