"""Rows grouped by expert times planes on the matrix units of a GPU, in one Triton kernel.

The words of one plane, [words, groups, d_out], are `Q = words * groups` rows of which each holds 32
input features. Bit j of `K` of those rows is a slab of the weight, [K, block_out], elementwise with
table entries that are loaded and decoded once for all 32 slabs. The features of x are put in that
order instead, [Q / K, 32, rows, K], while its rows are gathered. A program owns
[block_rows, block_out] of the result and makes it transposed, ``slab' x'``: there the matrix unit
takes the slab from the registers that it was made in. When there are too few programs for the
device, slabs are split over several, whose partial sums are added afterwards.

JAX deprecates its Triton backend from 0.11 on, without a date; what needs it is here, in
`mcjax.ops.dp4a` and in `mcjax.ops.unpack`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes, MixedPlanes
from mcjax.ops.pallas import Plan, addressed, decode, launch, reads_of, slab, table_entry

_WARPS = 8
_REGISTERS = 208  # of 255, the others being addresses and what is being computed
_BITS = 2  # slabs made in one turn of a loop
_PROGRAMS = 512  # about four for each multiprocessor of a data-centre GPU


def matrix_dot(
    x: jax.Array,
    planes: BitPlanes | MixedPlanes,
    plan: Plan,
    block_rows: int,
    block_out: int,
    interpret: bool,
) -> jax.Array:
    """Rows x [N, d_in] in the blocks of a plan times their experts.

    Args:
      x: float32 or bfloat16.
      planes: a weight of logical shape [E, d_in, d_out].
      plan: of the rows.
      block_rows: rows of its blocks, a power of two of at least 16.
      block_out: output features of a program, likewise.
      interpret: run in Pallas' interpreter.

    Returns:
      [splits, rows of all blocks, d_out], to be summed over the first axis.
    """
    reads = reads_of(planes)
    words, groups, d_out = reads[0].planes.shape[-3:]
    depth = _depth(max(read.width for read in reads), block_rows, block_out)
    ordered = _order(x, plan.source, words, groups, depth)
    grid = plan.slots.shape[0], pl.cdiv(d_out, block_out)
    splits = max(1, min(len(ordered), _PROGRAMS // (grid[0] * grid[1])))
    held = []
    for read in reads:
        held += [read.planes.reshape(*read.planes.shape[:2], -1, d_out), addressed(read.table)]
    return launch(
        partial(_kernel, block_rows, block_out, [read.width for read in reads]),
        grid=(*grid, splits),
        out_shape=jax.ShapeDtypeStruct(
            (splits, plan.source.shape[0], d_out), x.dtype if splits == 1 else jnp.float32
        ),
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="planes_matrix_dot",
    )(plan.owner, plan.slots, ordered, *held)


def _depth(width, block_rows, block_out):
    """Rows of words that make a slab: 32 if a thread's registers then hold all that lasts, or 16.

    Those are, for each weight of a slab, its words and decoded table, and the sums.
    """
    threads = 32 * _WARPS
    weights, sums = 32 * block_out // threads, block_rows * block_out // threads
    held = weights * (width + tables_lib.num_steps(width) + 1) + sums
    return 32 if held <= _REGISTERS else 16


def _order(x, source, words, groups, depth):
    """Rows [rows, d_in] gathered into [Q / depth, 32, rows, depth], zero where no feature is."""
    x = x.at[source].get(mode="fill", fill_value=0)
    x = jnp.pad(x, ((0, 0), (0, words * groups * WORD - x.shape[1])))
    x = x.reshape(-1, groups, words, WORD).transpose(3, 0, 2, 1).reshape(WORD, len(x), -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % depth)))
    return x.reshape(*x.shape[:2], -1, depth).transpose(2, 0, 1, 3)


def _kernel(block_rows, block_out, widths, owner, slots, x, *refs):
    *held, out = refs
    block, column, split = (pl.program_id(axis) for axis in range(3))
    for s, width in enumerate(widths):
        planes, table = held[2 * s : 2 * s + 2]

        @pl.when(owner[block] == s)
        def _(width=width, planes=planes, table=table):
            sizes = block_rows, block_out, width
            _one_block(sizes, slots[block], x, planes, table, out, block, column, split)


def _one_block(sizes, slot, x, planes, table, out, block, column, split):
    block_rows, block_out, width = sizes
    _, _, length, d_out = planes.shape
    groups, (tiles, _, _, depth), splits = table.shape[-2], x.shape, out.shape[0]
    rows = pl.ds(block * block_rows, block_rows)
    o = column * block_out + lax.broadcasted_iota(jnp.int32, (depth, block_out), 1)

    def one_tile(tile, total):
        q = tile * depth + lax.broadcasted_iota(jnp.int32, (depth, block_out), 0)
        mask = None
        if length % depth or d_out % block_out:
            mask = (q < length) & (o < d_out)

        def load(ref, row, feature, o):
            at = ref.at[jnp.full_like(q, slot), jnp.full_like(q, row), feature, o]
            if mask is None:
                return pltriton.load(at)
            return pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype))

        codes = [
            table_entry(partial(load, table, r, q % groups), table.dtype, o)
            for r in range(table.shape[1])
        ]
        added, base = decode(codes, width)
        of_planes = [load(planes, p, q, o).T for p in range(width)]
        added, base = [step.T for step in added], base.T

        def some_bits(i, total):
            shift = (i * _BITS).astype(jnp.uint32)
            rest = [lax.shift_right_logical(w, jnp.full_like(w, shift)) for w in of_planes]
            for j in range(_BITS):
                weight = slab(rest, j, added, base).astype(x.dtype)
                part = pltriton.load(x.at[tile, i * _BITS + j, rows, :])
                total = total + jnp.dot(weight, part.T, preferred_element_type=jnp.float32)
            return total

        return lax.fori_loop(0, WORD // _BITS, some_bits, total)

    total = lax.fori_loop(
        split * tiles // splits,
        (split + 1) * tiles // splits,
        one_tile,
        jnp.zeros((block_out, block_rows), jnp.float32),
    )
    at = out.at[split, rows, pl.ds(column * block_out, block_out)]
    mask = None
    if d_out % block_out:
        outs = column * block_out + lax.broadcasted_iota(jnp.int32, (block_rows, block_out), 1)
        mask = outs < d_out
    pltriton.store(at, total.T.astype(out.dtype), mask=mask)
