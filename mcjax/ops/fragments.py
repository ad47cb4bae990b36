"""Arrays that are whole only for as long as they are used.

Of some each device holds a part, others are made of planes whose tables train.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mcjax.bitplane import MixedPlanes, Planes
from mcjax.ops.columns import within

WHOLE = "whole"
"""What these arrays are called, for policies of `jax.checkpoint`."""


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

    def whole(self, dtype: Any) -> jax.Array:
        """The array, of `dtype`. Its gradient comes back in parts, added up over devices."""
        part = self.part.astype(dtype)
        if not all(map(within, self.axes)):
            return part
        return jax.lax.all_gather(part, self.axes, axis=part.ndim + self.at, tiled=True)


def passing(leaf: Any) -> bool:
    """Whether a leaf of weights is an array only for as long as that is used."""
    return isinstance(leaf, Fragment) or (isinstance(leaf, Planes) and leaf.trains)


def put_together(tree: Any, dtype: Any) -> Any:
    """The tree with all that is `passing` as arrays of `dtype`."""

    def whole(leaf):
        if not passing(leaf):
            return leaf
        made = leaf.whole(dtype) if isinstance(leaf, Fragment) else _values(leaf, dtype)
        return checkpoint_name(made, WHOLE)

    return jax.tree.map(whole, tree, is_leaf=passing)


@partial(jax.checkpoint, static_argnums=1)
def _values(planes: Planes, dtype: Any) -> jax.Array:
    """The weight, of which the way back keeps planes and tables and nothing between."""
    return planes.few(dtype) if isinstance(planes, MixedPlanes) else planes.dequantize(dtype)
