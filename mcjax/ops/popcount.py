"""Products by counting bits: int8 activations cut into planes of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes


def quantize_activations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to int8: int32 values in [-127, 127] of x's shape, and a scale [..., 1]."""
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    scale = jnp.where(peak > 0, peak / 127, 1)
    return jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int32), scale


def popcount_dot(x: jax.Array, planes: BitPlanes) -> jax.Array:
    """X [..., d_in] times planes [d_in, d_out] with x rounded to int8 by rows.

    With q planes of x (c_q = 2^q, c_7 = -128) and S_g the sum of x over group g:

        y_o = s sum_g [(offset_g - sum_p alpha_gp) S_g + 2 sum_p alpha_gp sum_q c_q popcount(b & x)]

    Returns:
      [..., d_out] of x's dtype.
    """
    bits, words, groups, d_out = planes.planes.shape
    rows, scale = quantize_activations(x.reshape(-1, x.shape[-1]))
    rows = jnp.pad(rows, ((0, 0), (0, groups * planes.group_size - planes.d_in)))
    grouped = rows.reshape(-1, groups, words, WORD)
    alpha, offset = tables_lib.decode(planes.tables[-1], bits)
    shifts = jnp.arange(WORD, dtype=jnp.uint32)
    unsigned = grouped.astype(jnp.uint32)

    def one_row(row, total):
        # row: uint32 [groups, words, 32]; total: int32 [groups]
        y = jnp.sum((offset - jnp.sum(alpha, axis=0)) * total[:, None], axis=0)
        for p in range(bits):
            count = jnp.zeros((groups, d_out), jnp.int32)
            for q in range(8):
                word = jnp.sum(((row >> q) & 1) << shifts, axis=-1, dtype=jnp.uint32)
                for v in range(words):
                    both = planes.planes[p, v] & word[:, v, None]
                    weight = -128 if q == 7 else 1 << q
                    count = count + weight * jax.lax.population_count(both).astype(jnp.int32)
            y = y + jnp.sum(2 * alpha[p] * count, axis=0)
        return y

    y = jax.vmap(one_row)(unsigned, jnp.sum(grouped, axis=(-1, -2)))
    return (y * scale).reshape(*x.shape[:-1], d_out).astype(x.dtype)
