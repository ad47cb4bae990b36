"""Products by counting bits: int8 activations cut into planes of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes
from mcjax.ops.rounding import quantize_activations
from mcjax.ops.tiled import backward, fold_tiles

_TWICE_PLACE = np.array([2, 4, 8, 16, 32, 64, 128, -256], np.int32)[:, None, None]
"""Twice what each bit of an int8 stands for."""


@jax.custom_vjp
@jax.jit  # traced once for each shape, not for each of a model's weights
def popcount_dot(x: jax.Array, planes: BitPlanes) -> jax.Array:
    """X [N, d_in] times planes [d_in, d_out] with x rounded to int8 by rows.

    With q planes of x (c_q = 2^q, c_7 = -128), S_g the sum of x over group g and offsets
    ``r_g sum_p alpha_gp``:

        y_o = s sum_g sum_p alpha_gp [2 sum_q c_q popcount(b_gp & x_gq) + (r_g - 1) S_g]

    The gradient is that of the product with x as it is (straight through the rounding).

    Returns:
      [N, d_out] of x's dtype.
    """
    bits, words, groups, _ = planes.planes.shape
    level, scale = quantize_activations(x)
    level = jnp.pad(level, ((0, 0), (0, groups * planes.group_size - planes.d_in)))
    level = level.reshape(-1, groups, words, WORD)
    total = jnp.sum(level, axis=(-1, -2)).astype(jnp.float32)
    shifts = jnp.arange(WORD, dtype=jnp.uint32)
    place = jnp.arange(8, dtype=jnp.uint32)[:, None, None, None]
    bit = (level.astype(jnp.uint32)[:, None] >> place) & 1
    activation = jnp.sum(bit << shifts, axis=-1, dtype=jnp.uint32)  # [N, 8, groups, words]
    table, last = planes.tables[-1], tables_lib.num_steps(bits) - 1
    relative: Any = -1.0
    if tables_lib.has_offset(bits):
        relative = tables_lib.offset_ratio(table[-1]) - 1

    alpha = tables_lib.step_value(table[: last + 1])
    if last < bits - 1:  # uniform
        alpha = alpha * tables_lib.basis(bits)[0, :, None, None]

    # Array axes rather than sums written out: a third of the program, and no slower.
    def one_row(i, row, y):
        activation, total = row
        count: Any = 0
        for v in range(words):
            both = planes.planes[:, None, v] & activation[0, :, :, v, None]
            count = count + jax.lax.population_count(both)  # [bits, 8, groups, d_out]
        count = jnp.sum(count.astype(jnp.int32) * _TWICE_PLACE, axis=1).astype(jnp.float32)
        each = alpha * (count + relative * total[0, :, None])
        # A sum by a product with ones leaves all of the above one fused pass on CPU.
        each, ones = each.reshape(bits * groups, -1), jnp.ones((1, bits * groups))
        return jax.lax.dynamic_update_slice(y, jnp.dot(ones, each, precision="highest"), (i, 0))

    rows = activation, total

    def cut(i):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), rows)

    # Row by row: what a row costs is a pass over the planes.
    y = fold_tiles(len(x), 1, cut, one_row, jnp.zeros((len(x), planes.shape[-1])))
    return (y * scale).astype(x.dtype)


def _forward(x, planes):
    return popcount_dot(x, planes), planes


popcount_dot.defvjp(_forward, backward)
