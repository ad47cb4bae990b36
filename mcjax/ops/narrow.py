"""Products with bfloat16 weights, which need not be widened whole: embeddings and heads."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mcjax.ops import device
from mcjax.ops.linear import linear
from mcjax.ops.tiled import TILE_BYTES, fold_tiles


def narrow_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """X [N, d_in] times the transpose of a weight [d_out, d_in], in x's dtype: [N, d_out].

    On CPU several float32 rows times bfloat16 widen a tile of the weight at a time, since the whole
    would be written out for every product; one row is widened as it is read.
    """
    d_out, d_in = weight.shape
    narrow = (x.dtype, weight.dtype) == (jnp.float32, jnp.bfloat16)
    if device.platform() == "cpu" and narrow and x.shape[0] != 1 and 4 * d_in <= TILE_BYTES:
        tile = TILE_BYTES // (4 * d_in)
        if tile < d_out:
            return _by_tiles(tile, x, weight)
    return x @ weight.T.astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_tiles(tile, x, weight):
    return linear(partial(_forward, tile), _backward, weight, x)


@_by_tiles.defjvp
def _jvp(tile, primals, tangents):
    (x, weight), (of_x, of_weight) = primals, tangents
    change = _by_tiles(tile, of_x, weight) + x @ of_weight.T.astype(x.dtype)
    return _by_tiles(tile, x, weight), change


def _forward(tile, weight, x):
    d_out = len(weight)
    # As integers: XLA on CPU would widen bfloat16 before cutting it, and so the whole of it. That
    # copies the weight, at half the bytes and a third of the time.
    halves = lax.bitcast_convert_type(weight, jnp.uint16)

    def cut(start):
        return lax.dynamic_slice_in_dim(halves, start, tile)

    def visit(start, own, out):
        wide = lax.bitcast_convert_type(own.astype(jnp.uint32) << 16, jnp.float32)
        return lax.dynamic_update_slice_in_dim(out, x @ wide.T, start, axis=1)

    return fold_tiles(d_out, tile, cut, visit, jnp.zeros((x.shape[0], d_out), x.dtype))


def _backward(weight, cotangent):
    return cotangent @ weight.astype(cotangent.dtype)
