"""A weight whose output features are shared out along an axis of a mesh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["axis"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Columns:
    """A weight of logical shape [..., d_in, d_out], of which each device holds d_out / n columns.

    Its product needs all of x and gives a device the features of its own columns, which are then
    gathered: what travels is activations, never planes. No sum changes its order, so results are
    those of one device. Rows could not be shared out likewise: rotation mixes all input features.

    Attributes:
      weight: planes or an array; inside `jax.shard_map` what this device holds of it.
      axis: of the mesh.
    """

    weight: Any
    axis: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape of `weight` as held."""
        return tuple(self.weight.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    @property
    def rotated(self) -> bool:
        """Whether input features are rotated."""
        return getattr(self.weight, "rotated", False)

    def unrotated(self) -> Columns:
        """As `BitPlanes.unrotated`."""
        return replace(self, weight=self.weight.unrotated())

    def __repr__(self) -> str:
        return f"Columns({self.weight!r}, axis={self.axis!r})"


def held(weight: Any) -> Any:
    """What this device holds of a weight: of `Columns` theirs, of others all."""
    return weight.weight if isinstance(weight, Columns) else weight


def gathered(y: jax.Array, weight: Any) -> jax.Array:
    """Products with a weight's columns, all [..., d_out] of them on every device of its axis."""
    if isinstance(weight, Columns) and within(weight.axis):
        return jax.lax.all_gather(y, weight.axis, axis=y.ndim - 1, tiled=True, to="invarying")
    return y


def within(axis: str) -> bool:
    """Whether this is inside a `jax.shard_map` over the axis."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes
