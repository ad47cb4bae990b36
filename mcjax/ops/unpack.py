"""Planes written out as a weight, by one kernel on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mcjax.bitplane import WORD, BitPlanes
from mcjax.ops.pallas import decode, launch, slab

_TILE = 8  # groups
_BLOCK_OUT = 128


def unpack(planes: BitPlanes, dtype: Any, interpret: bool = False) -> jax.Array:
    """As `BitPlanes.in_plane_order`, with each table entry decoded once instead of for each weight.

    Args:
      planes: a weight of logical shape [d_in, d_out].
      dtype: of the result.
      interpret: run in Pallas' interpreter, on any platform.

    Returns:
      [words * 32 * groups, d_out] of `dtype`.
    """
    _, words, groups, d_out = planes.planes.shape
    out = launch(
        _kernel,
        grid=(pl.cdiv(d_out, _BLOCK_OUT), pl.cdiv(groups, _TILE), words),
        out_shape=jax.ShapeDtypeStruct((words, WORD, groups, d_out), dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="planes_unpack",
    )(planes.planes, planes.tables[-1])
    return out.reshape(-1, d_out)


def _kernel(planes, table, out):
    width, _, groups, d_out = planes.shape
    column, tile, word = (pl.program_id(axis) for axis in range(3))
    shape = (_TILE, _BLOCK_OUT)
    group = tile * _TILE + lax.broadcasted_iota(jnp.int32, shape, 0)
    inside = (group < groups) & (
        column * _BLOCK_OUT + lax.broadcasted_iota(jnp.int32, shape, 1) < d_out
    )
    at = pl.ds(tile * _TILE, _TILE), pl.ds(column * _BLOCK_OUT, _BLOCK_OUT)

    def load(ref, *place):
        ref = ref.at[(*map(jnp.int32, place), *at)]
        return pltriton.load(ref, mask=inside, other=jnp.zeros((), ref.dtype))

    codes = [load(table, r).astype(jnp.int32) for r in range(table.shape[0])]
    added, base = decode(codes, width)
    of_planes = [load(planes, p, word) for p in range(width)]

    for j in range(WORD):
        weight = slab(of_planes, j, added, base).astype(out.dtype)
        pltriton.store(out.at[(word, jnp.int32(j), *at)], weight, mask=inside)
