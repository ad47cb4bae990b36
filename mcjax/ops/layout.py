"""How planes and tables are laid out in a TPU's memory.

A TPU keeps an array in tiles of its last two axes, and XLA by itself puts those axes last that fill
tiles best. The kernels read planes [..., groups, d_out] and tables row by row, so that where groups
are few, such as 6 of 768 features, a program would copy all planes for every token: 4.4 GB for a
Qwen3-30B-A3B of 2.5 bits, as its compiler says. So planes that are loaded or refined are put there
row by row, with a part of a tile unused where that does not fill it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

_KINDS = (np.uint32, np.uint8)
"""Types of planes and tables, and of no other parameters."""


def row_by_row(leaf: Any, where: Sharding) -> Sharding | Format:
    """Where a parameter is to lie: as `where` says, and planes and tables on a TPU row by row."""
    if _platform(where) != "tpu" or leaf.dtype not in _KINDS:
        return where
    return Format(Layout(tuple(range(leaf.ndim))), where)


def put(tree: Any) -> Any:
    """Parameters on devices: arrays of this host on the default one, others where they are.

    A device's array that has to be laid out anew is given up for the new one.
    """

    def one(leaf):
        if not isinstance(leaf, jax.Array):
            leaf = jax.device_put(leaf)
        wanted = row_by_row(leaf, leaf.sharding)
        if not isinstance(wanted, Format) or _order(leaf.format) == _order(wanted):
            return leaf
        return jax.device_put(leaf, wanted, donate=True)

    return jax.tree.map(one, tree)


def _platform(where: Sharding) -> str:
    device: Any = next(iter(where.device_set))
    return device.platform


def _order(form: Format) -> Any:
    return getattr(form.layout, "major_to_minor", None)
