"""An array of which each device holds a part, whole only for as long as it is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mcjax.ops.columns import within

WHOLE = "whole"
"""What gathered arrays are called, for policies of `jax.checkpoint`."""


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
        whole = jax.lax.all_gather(part, self.axes, axis=part.ndim + self.at, tiled=True)
        return checkpoint_name(whole, WHOLE)


def put_together(tree: Any, dtype: Any) -> Any:
    """The tree with every `Fragment` whole."""
    return jax.tree.map(
        lambda leaf: leaf.whole(dtype) if isinstance(leaf, Fragment) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, Fragment),
    )
