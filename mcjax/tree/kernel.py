"""A weight of any shape as bit planes, and trees that hold some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax.core.meta import AxisMetadata

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.leaves import named, replaced, some
from mcjax.notes import note
from mcjax.ops import Adapted
from mcjax.tree.view import Layout


@partial(jax.tree_util.register_dataclass, data_fields=["planes"], meta_fields=["layout", "dtype"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Kernel(AxisMetadata):
    """A weight as bit planes of its matrices.

    `mcjax.tree.serving` multiplies the planes. Where a function that knows nothing of them takes it
    for an array, a bare `module.apply` or a layer of NNX for instance, it is written out as one,
    with a note; under Flax's own `nn.scan` and `nn.vmap` it cannot be.

    Attributes:
      planes: of shape [*batch, d_in, d_out]; with low-rank factors too, see `mcjax.lora`.
      layout: where these lie in the weight.
      dtype: of the weight.
    """

    planes: BitPlanes | Adapted
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
    def widths(self) -> tuple[int, ...]:
        """The widths that it can be sliced to, ascending."""
        return self.planes.widths

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

    def __jax_array__(self) -> jax.Array:
        note(f"{self} is written out as an array; mcjax.tree.serving(function) multiplies planes")
        return self.dequantize()

    def __getitem__(self, index: Any) -> jax.Array:
        return self.__jax_array__()[index]

    def unbox(self) -> jax.Array:
        """What a Flax module takes for the parameter: the weight as an array."""
        return self.__jax_array__()

    def replace_boxed(self, val: Any) -> Any:
        """What takes the parameter's place: as it is."""
        return val

    def add_axis(self, index: int, params: dict[Any, Any]) -> Kernel:
        """Refuses to be stacked by Flax's transformations."""
        raise ValueError(
            f"{self} is under nn.scan or nn.vmap, which cut parameters apart; serve it with "
            "mcjax.tree.serving(function)"
        )

    remove_axis = add_axis

    def __repr__(self) -> str:
        return f"Kernel(shape={self.shape}, matrices={self.planes.shape}, bits={self.bits})"


def holds_planes(leaf: Any) -> bool:
    """Whether a leaf is a weight as planes, of whatever kind, or one with factors beside it."""
    return isinstance(leaf, Kernel | BitPlanes | MixedPlanes | Adapted)


def is_kernel(leaf: Any) -> bool:
    """Whether a leaf is a `Kernel`."""
    return isinstance(leaf, Kernel)


def slice_tree(tree: Any, bits: int | Mapping[str, int]) -> Any:
    """Every weight that is planes at fewer bits.

    Args:
      tree: with `Kernel`s or `BitPlanes`, with or without adapters.
      bits: one width for all, or each one's by its name, see `mcjax.tree.allocate`.

    Raises:
      ValueError: if a weight has no such width, or the names are not those of its weights.
    """
    names, leaves, _ = named(tree, holds_planes)
    held = [name for name, leaf in zip(names, leaves, strict=True) if holds_planes(leaf)]
    widths = bits if isinstance(bits, Mapping) else dict.fromkeys(held, bits)
    if set(widths) != set(held):
        other = some(sorted(set(widths) ^ set(held)))
        raise ValueError(f"widths of other weights: they differ in {other}")

    def at(name, leaf, width):
        inner = leaf.weight if isinstance(leaf, Adapted) else leaf
        if not holds_planes(inner):
            return leaf
        if isinstance(inner, MixedPlanes):
            raise ValueError(f"{name} has matrices of several widths already")
        if width not in leaf.widths:
            raise ValueError(f"{name} has widths {leaf.widths}, not {width}")
        return leaf.slice(width) if isinstance(leaf, Kernel) else leaf.at_width(width)

    return replaced(tree, widths, at, holds_planes)


def dequantize_tree(tree: Any) -> Any:
    """Every `Kernel` as the array that it stands for."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_kernel(leaf) else leaf, tree, is_leaf=is_kernel
    )
