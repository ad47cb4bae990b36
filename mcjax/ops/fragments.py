"""Weights that are arrays only while a layer is at work.

A `Fragment` is cut into parts, one a device; planes whose tables train stand for arrays that are
made of them. `put_together` makes the arrays of one layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax

from mcjax.bitplane import MixedPlanes, Planes
from mcjax.ops.columns import within


@partial(jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["axes", "at"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Fragment:
    """An array cut along one of its axes, as fully sharded training keeps weights.

    Attributes:
      part: inside `jax.shard_map` what this device holds, else the array.
      axes: of the mesh, along which its parts lie.
      at: which of its axes is cut, counted from the end: -1 is the last.
    """

    part: jax.Array
    axes: tuple[str, ...]
    at: int

    def whole(self, dtype: Any, shared: Collection[str]) -> jax.Array:
        """The array, of `dtype`, see `put_together`."""
        array = self.part.astype(dtype)
        if not all(map(within, self.axes)):
            return array
        to = {axis: "varying" if axis in shared else "invarying" for axis in self.axes}
        for kind, axes in groupby(reversed(self.axes), to.__getitem__):  # the innermost first
            together, at = tuple(axes)[::-1], array.ndim + self.at
            array = jax.lax.all_gather(array, together, axis=at, tiled=True, to=kind)
        return array


def is_made(leaf: Any) -> bool:
    """Whether a leaf of weights has to be made into an array where it is used."""
    return isinstance(leaf, Fragment) or (isinstance(leaf, Planes) and leaf.trains)


def put_together(tree: Any, dtype: Any, shared: Collection[str]) -> Any:
    """The tree with arrays of `dtype` in place of all that `is_made`.

    Args:
      tree: weights.
      dtype: of arrays.
      shared: axes of a `jax.shard_map` that share out what the weights multiply. Over these a
        fragment's gradient is added up, along others it is the same everywhere.
    """

    def whole(leaf):
        if isinstance(leaf, Fragment):
            return leaf.whole(dtype, shared)
        return values(leaf, dtype) if is_made(leaf) else leaf

    return jax.tree.map(whole, tree, is_leaf=is_made)


@partial(jax.checkpoint, static_argnums=1)
def values(planes: Planes, dtype: Any) -> jax.Array:
    """What planes stand for. Derivatives by tables compute it again, so that no bit is kept."""
    if isinstance(planes, MixedPlanes):
        return planes.dequantize_each(dtype)
    return planes.dequantize(dtype)
