"""Where numbers of planes and tables lie in a TPU's memory.

A TPU keeps an array in tiles of its last two axes, and XLA by itself puts those axes last that fill
tiles best. The kernels read planes [..., groups, d_out] and tables row by row, so that where groups
are few, such as 6 of 768 features, a program would copy all planes for every token: 4.4 GB for a
Qwen3-30B-A3B of 2.5 bits, as its compiler says. So arrays of planes are put there row by row, with
a part of a tile unused where that does not fill it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding, SingleDeviceSharding

from mcjax.ops import device

_KINDS = (np.uint32, np.uint8)
"""Types of planes and tables."""


def rows(leaf: Any, where: Sharding) -> Sharding | Format:
    """Where an array is to be put: row by row if it is of planes or tables and goes to a TPU."""
    platform = next(iter(where.device_set)).platform
    if platform != "tpu" or leaf.dtype not in _KINDS:
        return where
    return Format(Layout(tuple(range(leaf.ndim))), where)


def put(tree: Any) -> Any:
    """A tree of arrays on its devices, or those of this host on the default one."""

    def one(leaf):
        if not isinstance(leaf, jax.Array):
            target = device.first()
            if target.platform != "tpu":
                return jax.device_put(leaf)
            return jax.device_put(leaf, rows(leaf, SingleDeviceSharding(target)))
        wanted = rows(leaf, leaf.sharding)
        return jax.device_put(leaf, wanted) if isinstance(wanted, Format) else leaf

    return jax.tree.map(one, tree)
