"""A weight of any shape as bit planes: what `mcjax.tree` puts in place of an array."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from mcjax.bitplane import BitPlanes
from mcjax.tree.view import Layout


@partial(jax.tree_util.register_dataclass, data_fields=["planes"], meta_fields=["layout", "dtype"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Kernel:
    """A weight as bit planes of its matrices.

    Attributes:
      planes: of shape [*batch, d_in, d_out].
      layout: where these lie in the weight.
      dtype: of the weight.
    """

    planes: BitPlanes
    layout: Layout
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.layout.shape

    @property
    def bits(self) -> int:
        """Number of planes."""
        return self.planes.bits

    @property
    def nbytes(self) -> int:
        """Bytes of planes and tables together."""
        return self.planes.nbytes

    def slice(self, width: int) -> Kernel:
        """The same weight at fewer bits."""
        return replace(self, planes=self.planes.at_width(width))

    def dequantize(self) -> jax.Array:
        """The weight at its full width, of its own shape and dtype."""
        return self.layout.to_weight(self.planes.dequantize(self.dtype))

    def __repr__(self) -> str:
        return f"Kernel(shape={self.shape}, matrices={self.planes.shape}, bits={self.bits})"


def is_kernel(leaf: Any) -> bool:
    """Whether a leaf is a `Kernel`."""
    return isinstance(leaf, Kernel)
