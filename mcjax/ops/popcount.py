"""Products by counting bits: activations of 8 or 16 bits cut into planes of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes
from mcjax.ops.linear import alike
from mcjax.ops.rounding import quantize_activations
from mcjax.ops.tiled import fold_tiles, tiled_dot


@partial(jax.custom_jvp, nondiff_argnums=(2,))
@partial(jax.jit, static_argnums=2)  # traced once a shape, not for each of a model's weights
def popcount_dot(x: jax.Array, planes: BitPlanes, act_bits: int = 8) -> jax.Array:
    """X [N, d_in] times planes [d_in, d_out] with x rounded to `act_bits` by rows.

    With q planes of x (c_q = 2^q, of the last its negative), S_g the sum of x over group g and
    offsets ``r_g sum_p alpha_gp``:

        y_o = s sum_g sum_p alpha_gp [2 sum_q c_q popcount(b_gp & x_gq) + (r_g - 1) S_g]

    The gradient is that of the product with x as it is (straight through the rounding).

    Returns:
      [N, d_out] of x's dtype.
    """
    x, planes = alike((x, planes))
    bits, words, groups, _ = planes.planes.shape
    level, scale = quantize_activations(x, act_bits)
    level = jnp.pad(level, ((0, 0), (0, groups * planes.group_size - planes.d_in)))
    level = level.reshape(-1, groups, words, WORD)
    total = jnp.sum(level, axis=(-1, -2), dtype=jnp.int32).astype(jnp.float32)
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, None, None]
    place = jnp.arange(act_bits, dtype=jnp.uint32)[None, :, None, None, None]
    twice = 2 ** np.arange(1, act_bits + 1, dtype=np.int32)[None, :, None, None]
    twice[:, -1] *= -1
    bit = (level.astype(jnp.uint32)[:, None] >> place) & 1
    activation = jnp.sum(bit << shifts, axis=-1, dtype=jnp.uint32)  # [N, act_bits, groups, words]
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
        out = jnp.zeros((1, planes.shape[-1]), jnp.float32)
        for first in range(0, act_bits, 8):  # of more at once XLA on CPU makes no single pass
            count: Any = 0
            for v in range(words):
                both = planes.planes[:, None, v] & activation[:, first : first + 8, :, v, None]
                count = count + jax.lax.population_count(both)  # [bits, 8, groups, d_out]
            count = count.astype(jnp.int32) * twice[:, first : first + 8]
            each = jnp.sum(count, axis=1, dtype=jnp.int32).astype(jnp.float32)
            if first == 0:
                each = each + (relative * total[0, :, None])[None]
            # A sum by a product with ones leaves all of the above one fused pass on CPU.
            each = (alpha * each).reshape(bits * groups, -1)
            ones = jnp.ones((1, bits * groups), jnp.float32)
            out = out + jnp.dot(ones, each, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(y, out, i, axis=0)

    rows = activation, total

    def cut(i):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), rows)

    # Row by row: what a row costs is a pass over the planes.
    out = jnp.zeros((len(x), planes.shape[-1]), jnp.float32)
    # A row more if a scale were negative, which none is: XLA takes the only turn of a loop for no
    # loop, fuses whatever cut `planes` out of a stack into it, and then counts bits one by one.
    turns = len(x) + jnp.sum(scale < 0, dtype=jnp.int32)
    y = fold_tiles(len(x), 1, cut, one_row, out, turns)
    return (y * scale).astype(x.dtype)


@popcount_dot.defjvp
def _straight_through(act_bits, primals, tangents):
    x, planes = primals
    return popcount_dot(x, planes, act_bits), tiled_dot(tangents[0], planes)
