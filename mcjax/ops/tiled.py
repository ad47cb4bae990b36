"""Products that dequantise a tile of output features at a time and never hold the whole weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes, MixedPlanes, unpack_signs
from mcjax.ops import device
from mcjax.ops.linear import alike, linear
from mcjax.ops.rounding import quantize_activations

TILE_BYTES = 4 << 20
"""Largest dequantised tile on a CPU; much larger buffers are mapped anew for every product."""


def tiled_dot(x: jax.Array, planes: BitPlanes | MixedPlanes) -> jax.Array:
    """X [N, d_in] times planes [d_in, d_out], in x's dtype with float32 sums; planes are constants.

    Features are multiplied in the order in which the planes hold them, so it is x that is permuted.
    """
    if isinstance(planes, MixedPlanes):
        return planes.choose(partial(tiled_dot, x))
    return linear(_forward, _backward, planes, x)


def _forward(planes, x):
    rows = planes.plane_order(x)

    def visit(start, weight, out):
        y = _product(rows, weight).astype(x.dtype)
        return lax.dynamic_update_slice_in_dim(out, y, start, axis=1)

    return _over_tiles(planes, x.dtype, visit, jnp.zeros((x.shape[0], planes.shape[-1]), x.dtype))


@jax.custom_jvp
def int8_dot(x: jax.Array, planes: BitPlanes) -> jax.Array:
    """X [N, d_in] times planes [d_in, d_out] as integers: x by rows, weights by output features.

    With unit_o = max_g (|offset_go| + sum_p alpha_gpo) / 127 weights are rounded to multiples of
    it, as they are unpacked. The gradient is that of the product with x and planes as they are.

    Returns:
      [N, d_out] of x's dtype.
    """
    x, planes = alike((x, planes))
    level, scale = quantize_activations(x)
    rows = planes.plane_order(level.astype(jnp.int8))

    def prepare(words, alpha, offset):
        peak = jnp.max(jnp.abs(offset) + jnp.sum(alpha, axis=0), axis=0)
        unit = jnp.where(peak > 0, peak / 127, 1)[None]
        return (words, alpha / unit[None], offset / unit), unit

    def visit(start, own, out):
        scaled, unit = own
        weight = jnp.round(unpack_signs(*scaled)).astype(jnp.int8)
        y = jnp.dot(rows, weight, preferred_element_type=jnp.int32).astype(jnp.float32) * unit
        return lax.dynamic_update_slice_in_dim(out, (y * scale).astype(x.dtype), start, axis=1)

    out = jnp.zeros((x.shape[0], planes.shape[-1]), x.dtype)
    return _over_decoded(planes, prepare, visit, out)


@int8_dot.defjvp
def _straight_through(primals, tangents):
    x, planes = primals
    return int8_dot(x, planes), tiled_dot(tangents[0], planes)


def _backward(planes, cotangent):
    """[N, d_out] times the transpose of planes [d_in, d_out]: [N, d_in], by the same tiles."""

    def visit(start, weight, change):
        tile = weight.shape[-1]
        dy = lax.dynamic_slice_in_dim(cotangent, start, tile, 1)
        # The last tile may overlap the one before it, which ended at a multiple of the size.
        done = (start + tile - 1) // tile * tile
        dy = jnp.where((start + jnp.arange(tile, dtype=jnp.int32) >= done)[None], dy, 0)
        return change + _product(dy, weight.T)

    features = planes.planes.shape[-2] * planes.group_size
    zeros = jnp.zeros((cotangent.shape[0], features), jnp.float32)
    change = _over_tiles(planes, cotangent.dtype, visit, zeros)
    return planes.feature_order(change).astype(cotangent.dtype)


def _over_tiles(planes: BitPlanes, dtype: Any, visit: Callable, carry: Any) -> Any:
    """Folds ``visit(start, tile dequantised to dtype, carry)`` over tiles of output features."""
    if device.platform() == "gpu":  # memory is not short, and the kernel is the quicker
        from mcjax.ops import unpack as kernel  # what it needs of Pallas is slow to import

        return visit(jnp.int32(0), kernel.unpack(planes, dtype), carry)

    def unpack(start, own, carry):
        return visit(start, unpack_signs(*own).astype(dtype), carry)

    return _over_decoded(planes, lambda *own: own, unpack, carry)


def _over_decoded(planes: BitPlanes, prepare: Callable, visit: Callable, carry: Any) -> Any:
    """Folds ``visit(start, prepare(words, alpha, offset), carry)`` over the same tiles."""
    d_out = planes.shape[-1]
    features = planes.planes.shape[-2] * planes.group_size
    count = -(-4 * features * d_out // TILE_BYTES)
    tile = -(-d_out // (128 * count)) * 128  # even tiles, so that the last overlaps little

    def decoded(own):
        return prepare(own.planes, *tables_lib.decode(own.tables[-1], own.bits))

    if tile >= d_out:
        return visit(jnp.int32(0), decoded(planes), carry)

    def cut(start):
        last = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=tile)
        return decoded(jax.tree.map(lambda a: last(a, axis=a.ndim - 1), planes))

    return fold_tiles(d_out, tile, cut, visit, carry)


def fold_tiles(length: int, tile: int, cut: Callable, visit: Callable, carry: Any) -> Any:
    """Folds ``visit(start, cut(start), carry)`` over `length` in steps of `tile`.

    The last tile overlaps the one before it where tiles do not divide `length`. Each is cut out a
    step ahead: as part of the carry it is a buffer of its own, where XLA would else fuse the
    cutting into all that is done with it.
    """

    def start(i):
        return jnp.minimum(jnp.int32(i) * jnp.int32(tile), jnp.int32(length - tile))

    def step(i, carry):
        ready, carry = carry
        return cut(start(i + 1)), visit(start(i), ready, carry)

    turns = jnp.int32(-(-length // tile))
    return lax.fori_loop(jnp.int32(0), turns, step, alike((cut(start(0)), carry)))[1]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
