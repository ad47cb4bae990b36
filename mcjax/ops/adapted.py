"""A weight and a low-rank change of it, multiplied apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mcjax.bitplane import BitPlanes, MixedPlanes


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "a", "b"], meta_fields=[])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Adapted:
    """A weight of logical shape [..., d_in, d_out] that low-rank factors are added to.

        x (W + A B) = x W + (x A) B

    Attributes:
      weight: W, planes or an array.
      a: A, float [..., d_in, rank].
      b: B, float [..., rank, d_out].
    """

    weight: Any
    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., d_in, d_out], of the whole where the weight is `Columns`."""
        return (*self.weight.shape[:-1], self.b.shape[-1])

    @property
    def bits(self) -> Any:
        """Planes of the weight."""
        return self.weight.bits

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of the weight."""
        return self.weight.widths

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and both factors."""
        return self.weight.nbytes + self.a.nbytes + self.b.nbytes

    def at_width(self, width: int) -> Adapted:
        """As `BitPlanes.at_width`, with the same factors."""
        return replace(self, weight=self.weight.at_width(width))

    def added(self, x: jax.Array) -> jax.Array:
        """What the factors add to a product: x [..., d_in] to [..., d_out] of x's dtype."""
        return low_rank((self.a, self.b), x)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """``W + A B``, [..., d_in, d_out] of `dtype`."""
        if isinstance(self.weight, BitPlanes | MixedPlanes):
            weight = self.weight.dequantize(jnp.float32)
        else:
            weight = self.weight.astype(jnp.float32)
        change = jnp.matmul(*(f.astype(jnp.float32) for f in (self.a, self.b)), precision="highest")
        return (weight + change).astype(dtype)

    def __repr__(self) -> str:
        return f"Adapted({self.weight!r}, rank={self.a.shape[-1]})"


def low_rank(factors: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    """``(x A) B`` of x [..., d_in], in x's dtype."""
    a, b = factors
    return jnp.dot(jnp.dot(x, a.astype(x.dtype)), b.astype(x.dtype))


def plain(weight: Any) -> Any:
    """A weight without such factors."""
    return weight.weight if isinstance(weight, Adapted) else weight
