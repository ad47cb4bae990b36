"""Products with bfloat16 weights, which need not be widened whole: embeddings and heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mcjax.ops.tiled import TILE_BYTES, fold_tiles


@jax.custom_vjp
def narrow_dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """X [N, d_in] times the transpose of a weight [d_out, d_in], in x's dtype: [N, d_out].

    On CPU several float32 rows times bfloat16 widen a tile of the weight at a time, since the whole
    would be written out for every product; one row is widened as it is read.
    """
    d_out, d_in = weight.shape
    tile = TILE_BYTES // (4 * d_in)
    narrow = (x.dtype, weight.dtype) == (jnp.float32, jnp.bfloat16)
    if jax.default_backend() != "cpu" or not narrow or len(x) == 1 or not 0 < tile < d_out:
        return x @ weight.T.astype(x.dtype)
    # As integers: XLA on CPU would widen bfloat16 before cutting it, and so the whole of it. That
    # copies the weight, at half the bytes and a third of the time.
    halves = lax.bitcast_convert_type(weight, jnp.uint16)

    def cut(start):
        return lax.dynamic_slice_in_dim(halves, start, tile)

    def visit(start, own, out):
        wide = lax.bitcast_convert_type(own.astype(jnp.uint32) << 16, jnp.float32)
        return lax.dynamic_update_slice(out, x @ wide.T, (0, start))

    return fold_tiles(d_out, tile, cut, visit, jnp.zeros((len(x), d_out), x.dtype))


def _forward(x, weight):
    return narrow_dot(x, weight), (x, weight)


def _backward(residuals, cotangent):
    x, weight = residuals
    return cotangent @ weight.astype(x.dtype), (cotangent.T @ x).astype(weight.dtype)


narrow_dot.defvjp(_forward, _backward)
