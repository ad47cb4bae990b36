"""Products by counting bits: activations of 8 or 16 bits cut into planes of their own."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes, MixedPlanes
from mcjax.ops.linear import alike
from mcjax.ops.rounding import quantize_activations
from mcjax.ops.tiled import fold_tiles, tiled_dot


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def popcount_dot(x: jax.Array, planes: BitPlanes | MixedPlanes, act_bits: int = 8) -> jax.Array:
    """X [N, d_in] times planes [d_in, d_out] with x rounded to `act_bits` by rows.

    With q planes of x (c_q = 2^q, of the last its negative), S_g the sum of x over group g and
    offsets ``r_g sum_p alpha_gp``:

        y_o = s sum_g sum_p alpha_gp [2 sum_q c_q popcount(b_gp & x_gq) + (r_g - 1) S_g]

    The gradient is that of the product with x as it is (straight through the rounding).

    Returns:
      [N, d_out] of x's dtype.
    """
    x, planes = alike((x, planes))
    # Before the width is chosen, so that two weights of an expert share what is made of their rows.
    rows, scale = _in_planes(x, planes.group_size, act_bits)
    if isinstance(planes, MixedPlanes):
        y = planes.look_up(partial(_count, rows))
    else:
        y = _count_apart(rows, planes)
    return (y * scale).astype(x.dtype)


@popcount_dot.defjvp
def _straight_through(act_bits, primals, tangents):
    return popcount_dot(*primals, act_bits), tiled_dot(tangents[0], primals[1])


class _Rows(NamedTuple):
    """Rows of integers in two's complement, as planes.

    Attributes:
      planes: uint32 [N, act_bits, groups, words], the least significant bit first.
      total: float32 [N, groups], sums of the integers.
    """

    planes: jax.Array
    total: jax.Array


def _in_planes(x: jax.Array, group_size: int, act_bits: int) -> tuple[_Rows, jax.Array]:
    """Rows x [N, d_in] as planes, and their scale [N, 1]."""
    level, scale = quantize_activations(x, act_bits)
    groups = -(-x.shape[1] // group_size)
    level = jnp.pad(level, ((0, 0), (0, groups * group_size - x.shape[1])))
    level = level.reshape(-1, groups, group_size // WORD, WORD)
    total = jnp.sum(level, axis=(-1, -2), dtype=jnp.int32).astype(jnp.float32)
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, None, None]
    place = jnp.arange(act_bits, dtype=jnp.uint32)[None, :, None, None, None]
    bit = (level.astype(jnp.uint32)[:, None] >> place) & 1
    return _Rows(jnp.sum(bit << shifts, axis=-1, dtype=jnp.uint32), total), scale


@partial(jax.jit, static_argnums=3)  # traced once a shape, not for each of a model's weights
def _count(rows: _Rows, stack: BitPlanes, slot: jax.Array, width: int) -> jax.Array:
    """The product of rows of integers with a weight of a stack, float32 [N, d_out].

    Args:
      rows: of integers.
      stack: [n, d_in, d_out].
      slot: int32 [], the weight.
      width: the planes of it to read.
    """
    words, groups, d_out = stack.planes.shape[-3:]
    count, act_bits = rows.planes.shape[:2]
    table, steps = stack.tables[stack.widths.index(width)], tables_lib.num_steps(width)

    # What is read is cut out of the stack right where it is used and for that use alone. Then XLA
    # reads it in place; of a cut with several uses it makes a function of its own, which looks
    # `slot` up anew for each number and keeps the loop from being vectorised: 7 times slower.
    def cut(array, start, size):
        """Entries from `start` and of `size` along the first axes of the weight."""
        rest = array.shape[1 + len(size) :]
        starts = [slot, *map(jnp.int32, start), *[jnp.int32(0)] * len(rest)]
        sizes = (1, *size, *rest)
        return jax.lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)[0]

    relative = tables_lib.offset_ratio(cut(table, (steps,), (1,))[0]) - 1
    alpha = tables_lib.alphas(tables_lib.step_value(cut(table, (0,), (steps,))), width)

    # Array axes rather than sums written out: a third of the program, and no slower.
    def one_row(i, row, y):
        out = jnp.zeros((1, d_out), jnp.float32)
        for first in range(0, act_bits, 8):  # of more at once XLA on CPU makes no single pass
            ones: Any = 0
            for v in range(words):
                planes = cut(stack.planes, (0, v), (width, 1))  # [width, 1, groups, d_out]
                both = planes & row.planes[:, first : first + 8, :, v, None]
                ones = ones + jax.lax.population_count(both)  # [width, 8, groups, d_out]
            # Shifts are half of what multiplications cost here. The sign's place counts negative:
            # in two's complement -a is (a ^ -1) - (-1).
            places = jnp.arange(first + 1, first + ones.shape[1] + 1, dtype=jnp.int32)
            sign = jnp.where(places == act_bits, jnp.int32(-1), jnp.int32(0))
            places, sign = (a[None, :, None, None] for a in (places, sign))
            each = jnp.sum(((ones.astype(jnp.int32) << places) ^ sign) - sign, 1, dtype=jnp.int32)
            each = each.astype(jnp.float32)
            if first == 0:
                each = each + (relative * row.total[0, :, None])[None]
            # A sum by a product with ones leaves all of the above one fused pass on CPU.
            each = (alpha * each).reshape(width * groups, -1)
            unit = jnp.ones((1, width * groups), jnp.float32)
            out = out + jnp.dot(unit, each, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(y, out, i, axis=0)

    def row(i):
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), rows)

    # Row by row: what a row costs is a pass over the planes.
    return fold_tiles(count, 1, row, one_row, jnp.zeros((count, d_out), jnp.float32))


def _count_apart(rows: _Rows, planes: BitPlanes) -> jax.Array:
    """`_count` of a weight that may itself be cut out of something."""
    stack = jax.tree.map(lambda a: a[None], planes)
    # XLA takes a loop of one turn for none, and then sees through to that cut. So it is not to know
    # the number of turns: one, unless a sum were no number, which none is.
    turns = 1 + jnp.any(jnp.isnan(rows.total)).astype(jnp.int32)

    def whole(i, y):
        return _count(rows, stack, jnp.int32(0) * i, planes.bits)

    y = jnp.zeros((rows.total.shape[0], planes.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(jnp.int32(0), turns, whole, alike((y, rows, planes))[0])
