"""Products of activations with dense or plane weights."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mcjax import rotation
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.ops import choice, device
from mcjax.ops.adapted import Adapted, low_rank, plain
from mcjax.ops.columns import Columns, gathered, held
from mcjax.ops.grouped import Weight, expert_map
from mcjax.ops.linear import automatic, rows_as
from mcjax.ops.popcount import popcount_dot
from mcjax.ops.rounding import rounded
from mcjax.ops.tiled import int8_dot, tiled_dot


class Shifted(NamedTuple):
    """A weight whose product is moved, so that derivatives by what the product gives can be had.

    Attributes:
      weight: of logical shape [d_in, d_out].
      shift: [..., d_out], added to the product; zeros, usually.
    """

    weight: Weight
    shift: jax.Array


def dense(weight: Weight, dtype=jnp.float32) -> jax.Array:
    """The weight as an array [..., d_in, d_out] of `dtype`, dequantised if it is planes."""
    if isinstance(weight, BitPlanes | MixedPlanes | Adapted):
        return weight.dequantize(dtype)
    return weight.astype(dtype)


def aligned(x: jax.Array, *weights: Weight) -> tuple[jax.Array, tuple[Weight, ...]]:
    """Rows as their weights' planes multiply them, and these weights for rows that are so.

    Weights that multiply the same rows have them rotated once by this; others are as they were.

    Args:
      x: [..., d_in].
      *weights: of logical shape [..., d_in, d_out].
    """
    kinds = BitPlanes | MixedPlanes | Columns
    turned = [w for w in weights if isinstance(w, kinds) and w.rotated]
    if len(turned) < len(weights):
        return x, weights
    return rotation.rotate(x), tuple(w.unrotated() for w in turned)


def dot(
    x: jax.Array,
    planes: Weight | Shifted,
    act_bits: int | None = None,
    product: str | None = None,
) -> jax.Array:
    """Activations times one weight; differentiable with respect to x.

    Args:
      x: float [..., d_in].
      planes: a weight of logical shape [d_in, d_out], which may be `Shifted`, `Adapted` or
        `Columns`.
      act_bits: None multiplies in x's own type; 8 or 16 lets every row of x be rounded to so many
        bits first, a deliberate change of numerics by which few rows can be multiplied by counting
        bits. 8 costs some accuracy, 16 less than bfloat16 does; with 8 a CPU multiplies many rows
        as int8 with weights rounded likewise. On a GPU few rows are rounded in any case, to 16 bits
        if not to 8, and each group has its own scale.
      product: "popcount", "tiled", or "pallas" for kernels on GPU and TPU; None for the quickest
        here, see `mcjax.ops.choice`.

    Returns:
      [..., d_out] of x's dtype.

    Raises:
      ValueError: if shapes do not fit, `act_bits` is not None, 8 or 16, or the product is unknown
        or does not go with them.
    """
    if isinstance(planes, Shifted):
        y = dot(x, planes.weight, act_bits, product)
        return y + planes.shift.reshape(y.shape)
    if isinstance(planes, Adapted):
        return dot(x, planes.weight, act_bits, product) + planes.added(x)
    if isinstance(planes, Columns):
        return gathered(dot(x, planes.weight, act_bits, product), planes)
    if len(planes.shape) != 2 or x.shape[-1] != planes.shape[0]:
        raise ValueError(f"x {x.shape} does not multiply a weight of shape {planes.shape}")
    packed = isinstance(planes, BitPlanes | MixedPlanes)
    if act_bits not in (None, 8, 16) or (act_bits and not packed):
        raise ValueError(f"act_bits must be None, or 8 or 16 with planes; got {act_bits}")
    if not packed:
        return jnp.dot(x, dense(planes, x.dtype))
    product_of = partial(_dot, act_bits=act_bits, product=product)
    return automatic(product_of, x, planes, result=rows_as(x))


def _dot(
    x: jax.Array, planes: BitPlanes | MixedPlanes, act_bits: int | None, product: str | None
) -> jax.Array:
    if planes.rotated:
        x, planes = rotation.rotate(x), planes.unrotated()
    rows = x.reshape(-1, x.shape[-1])
    platform = device.platform()
    if product is not None and (
        product not in choice.PRODUCTS
        or (product == "popcount" and not choice.counts(platform, act_bits))
    ):
        raise ValueError(
            f"product {product!r} with act_bits {act_bits} is none of {choice.PRODUCTS}, or needs "
            "act_bits=8 or 16"
        )
    widths = planes.reads if isinstance(planes, MixedPlanes) else (planes.bits,)
    products = {product or choice.product(platform, rows.shape[0], k, act_bits) for k in widths}
    if platform == "cpu" and products == {"popcount"}:
        y = popcount_dot(rows, planes, act_bits)
        return y.reshape(*x.shape[:-1], -1)
    if isinstance(planes, MixedPlanes):
        return planes.choose(lambda one: _dot(x, one, act_bits, product))
    (product,) = products
    if product == "tiled" and act_bits == 8 and platform == "cpu":
        y = int8_dot(rows, planes)
    elif product == "tiled":
        y = tiled_dot(rounded(rows) if act_bits == 8 else rows, planes)
    else:
        experts = jax.tree.map(lambda a: a[None], planes)
        y = expert_rows_dot(rows, experts, jnp.zeros(rows.shape[0], int), None, act_bits, product)
    return y.reshape(*x.shape[:-1], -1)


def expert_dot(
    x: jax.Array,
    planes: Weight,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
    product: str | None = None,
) -> jax.Array:
    """Every token times each of the experts it is routed to.

    Args:
      x: float [T, d_in].
      planes: a weight of logical shape [E, d_in, d_out].
      index: int [T, K], the experts of each token.
      keep: bool [T, K]; pairs that are not kept are not computed and give zeros. None keeps all.
      act_bits: as in `dot`.
      product: as in `dot`.

    Returns:
      [T, K, d_out] of x's dtype.

    Raises:
      ValueError: if shapes do not fit.
    """
    if x.ndim != 2 or len(planes.shape) != 3 or x.shape[1] != planes.shape[1]:
        raise ValueError(f"x {x.shape} does not multiply experts of shape {planes.shape}")
    if index.shape[:1] != x.shape[:1] or (keep is not None and keep.shape != index.shape):
        raise ValueError(
            f"index {index.shape} and keep {None if keep is None else keep.shape} must be "
            f"[{x.shape[0]}, K]"
        )

    def every(x, planes, index, keep):
        x, (planes,) = aligned(x, planes)
        rows = jnp.repeat(x, index.shape[1], axis=0)
        keep = None if keep is None else keep.reshape(-1)
        y = expert_rows_dot(rows, planes, index.reshape(-1), keep, act_bits, product)
        return y.reshape(*index.shape, -1)

    return automatic(every, x, planes, index, keep, result=rows_as(x, 2))


def expert_rows_dot(
    x: jax.Array,
    planes: Weight,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
    product: str | None = None,
) -> jax.Array:
    """Every row times its expert: x [N, d_in], index int [N], keep bool [N] to [N, d_out].

    Otherwise as `expert_dot`.
    """
    if isinstance(planes, Columns):
        own = expert_rows_dot(x, planes.weight, index, keep, act_bits, product)
        return gathered(own, planes)
    platform = device.platform()
    if isinstance(planes, Adapted) and isinstance(plain(planes), Columns):  # gathered but once
        own = expert_rows_dot(x, plain(planes), index, keep, act_bits, product)
        block = choice.expert_rows(platform, x.shape[0], planes.shape[0], act_bits)
        return own + expert_map(low_rank, (planes.a, planes.b), x, index, keep, block)
    x, (planes,) = aligned(x, planes)
    how = expert_product(x.shape[0], planes, act_bits, product)
    if isinstance(planes, BitPlanes | MixedPlanes):  # what these need of Pallas is slow to import
        if how == "popcount" and platform == "gpu":
            from mcjax.ops.dp4a import expert_dots

            return expert_dots(x, (planes,), index, keep, act_bits)[0]
        if how == "pallas":
            from mcjax.ops.pallas import grouped_dot

            return grouped_dot(rounded(x) if act_bits == 8 else x, planes, index, keep)
    function = partial(_one_dot, act_bits, how)
    block = choice.expert_rows(platform, x.shape[0], planes.shape[0], act_bits)
    return expert_map(function, (planes,), x, index, keep, block)


def expert_product(
    rows: int, planes: Weight, act_bits: int | None, product: str | None
) -> str | None:
    """The product of so many rows with experts: one for all of them, or None for each its own."""
    platform, planes = device.platform(), held(planes)
    if product or platform == "cpu" or not isinstance(planes, BitPlanes | MixedPlanes):
        return product
    how = choice.product(platform, -(-rows // planes.shape[0]), planes.bits, act_bits)
    if how == "popcount" and platform == "gpu":
        from mcjax.ops.pallas import is_addressed, reads_of  # slow to import

        every = all(is_addressed(read.table.shape) for read in reads_of(planes))
        return how if every else "tiled"
    return how


def _one_dot(act_bits, product, weights, rows):
    (weight,) = weights
    return dot(rows, weight, act_bits, product)
