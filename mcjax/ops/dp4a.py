"""Few rows times planes on a GPU: rows are int8, and four bits of a weight meet them at once.

One instruction, dp4a, adds the products of four bytes to an int32. Bit ``j + 8 k`` of a word is
byte k of ``(word >> j) & 0x01010101``, so with four values of a row packed in that order three
instructions take four bits of one plane. Group by group of a row x = scale * q,

    y[r, o] = sum_g scale[r, g] (base[g, o] sum_i q[r, i]
                                 + sum_p 2 alpha_p[g, o] sum_i b_p[i, o] q[r, i])

over the features i of g, with ``base = offset - sum_p alpha_p``. Rows are rounded here, each group
with a scale of its own: to int8 if the caller wants that, else to 15 bits and a sign in two int8
*limbs*, ``q = 128 limb_0 + limb_1``, which leaves less error than bfloat16 does.

Everything that a row of a mixture's block needs is three kernels and two roundings; experts of all
widths, and both of the weights that gate and raise a row, share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mcjax.bitplane import WORD, BitPlanes, MixedPlanes
from mcjax.ops.grouped import expert_map
from mcjax.ops.pallas import (
    Plan,
    addressed,
    decode,
    dequantized_dot,
    in_segments,
    launch,
    places_of,
    plan_blocks,
    reads_of,
    table_entry,
)

_TILE = 4  # groups that a program multiplies at once
_BLOCK_OUT = 128
_PROGRAMS = 4096  # what keeps a data-centre GPU's memory busy
_MOST_ROWS = 2  # of a block; with four of them registers run short
_STEPS = WORD // 4  # words are taken apart in so many steps
_BYTES = 0x01010101
_INT8 = 127
_LEAST_SCALE = 1e-30  # of a group of zeros

Weights = Sequence[BitPlanes | MixedPlanes]


class Rounded(NamedTuple):
    """Rows as integers.

    Attributes:
      packed: int32 [rows, limbs, words, 8, groups]; byte k of step j of word v of group g is input
        feature ``g * group_size + 32 v + j + 8 k``; groups are padded with zeros to whole tiles.
      scale: float32 [rows, groups].
    """

    packed: jax.Array
    scale: jax.Array


def expert_dots(
    x: jax.Array,
    weights: Weights,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Rows times their experts, for several weights of one shape and allocation at once.

    Args:
      x: float [N, d_in], or fewer rows, of which each meets as many experts in a row.
      weights: planes of logical shape [E, d_in, d_out].
      index: int [N], each row's expert.
      keep: bool [N] or None for all.
      act_bits: 8 to round to int8, None for 16 bits.
      interpret: run in Pallas' interpreter, on any platform.

    Returns:
      For each weight [N, d_out] of x's dtype; zeros where a row is not kept.
    """
    return _call(_dots, _reference_dots, _Config(act_bits, interpret), x, weights, index, keep)


def swiglu(
    x: jax.Array,
    weights: Weights,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``down(silu(gate(x)) * up(x))`` of each row's expert; `weights` are gate, up and down.

    An expert's three weights have one width, `down` as `gate` and `up`.

    Otherwise as `expert_dots`.
    """
    return _call(_swiglu, _reference_swiglu, _Config(act_bits, interpret), x, weights, index, keep)


class _Config(NamedTuple):
    """What is fixed when a product is traced; see `expert_dots`."""

    act_bits: int | None
    interpret: bool

    @property
    def limbs(self) -> int:
        """Bytes that a value of a row is rounded to."""
        return 1 if self.act_bits == 8 else 2


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _call(function, reference, config, x, weights, index, keep):
    return function(config, x, weights, index, keep)


@_call.defjvp
def _jvp(function, reference, config, primals, tangents):
    x, *rest = primals
    change = jax.jvp(lambda x: reference(config, x, *rest), (x,), tangents[:1])[1]
    return function(config, *primals), change


def _reference_dots(config, x, weights, index, keep):
    x = jnp.repeat(x, index.shape[0] // x.shape[0], axis=0)
    return tuple(expert_map(dequantized_dot, (planes,), x, index, keep) for planes in weights)


def _reference_swiglu(config, x, weights, index, keep):
    *raising, down = weights
    gate, up = _reference_dots(config, x, raising, index, keep)
    return _reference_dots(config, jax.nn.silu(gate) * up, (down,), index, keep)[0]


def _dots(config, x, weights, index, keep):
    plan = _plan(x, weights[0], index, keep)
    rows = _round(config, x[None, None], weights[0])
    return _finish(_multiply(config, rows, weights, plan), plan, keep, x.dtype)


def _swiglu(config, x, weights, index, keep):
    *raising, down = weights
    plan = _plan(x, down, index, keep)
    rows = _round(config, x[None, None], raising[0])
    rows = _round(config, _multiply(config, rows, raising, plan), down)
    # What the first kernel wrote block by block is where the second one finds it.
    again = plan._replace(source=jnp.arange(plan.source.shape[0], dtype=jnp.int32))
    return _finish(_multiply(config, rows, (down,), again), plan, keep, x.dtype)[0]


def _finish(parts, plan, keep, dtype):
    """Sums of the kernel's programs, [splits, weights, rows of blocks, d_out], for each weight."""
    y = parts.sum(0)
    if plan.place is not None:
        y = y.at[:, plan.place].get(mode="clip")
    if keep is not None:
        y = jnp.where(keep[:, None], y, 0)
    return tuple(y.astype(dtype))


def _plan(x, planes, index, keep) -> Plan:
    """A block a row as long as no expert is likely to have two, blocks of two beyond."""
    rows, experts = index.shape[0], planes.shape[0]
    each = rows // x.shape[0]
    block_rows = min(_MOST_ROWS, pl.cdiv(rows, experts))
    if block_rows > 1:
        keep = jnp.ones(rows, bool) if keep is None else keep
        plan = plan_blocks(planes, index, keep, block_rows)
        return plan._replace(source=plan.source // each)
    owner, slot = (place[index] for place in places_of(planes))
    if keep is not None:
        owner = jnp.where(keep, owner, len(reads_of(planes)))
    return Plan(jnp.arange(rows, dtype=jnp.int32) // each, None, owner, slot, jnp.empty((0, 2)))


def _round(config, parts, planes) -> Rounded:
    """Rounds the sum of parts [splits, 1, N, d_in], or with two of them ``silu(a) * b``."""
    words, groups, _ = reads_of(planes)[0].planes.shape[-3:]
    groups = pl.cdiv(groups, _TILE) * _TILE
    rows, limbs = parts.shape[2], config.limbs
    packed, scale = launch(
        partial(_round_kernel, words, limbs),
        grid=(rows, groups),
        out_shape=(
            jax.ShapeDtypeStruct((rows, limbs, words, _STEPS, groups), jnp.int32),
            jax.ShapeDtypeStruct((rows, groups), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=1),
        interpret=config.interpret,
        name="round_rows",
    )(parts)
    return Rounded(packed, scale)


def _round_kernel(words, limbs, parts, packed, scale):
    splits, kinds, _, d_in = parts.shape
    row, group = pl.program_id(0), pl.program_id(1)
    lanes = pl.next_power_of_2(words * _STEPS)
    lane = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    word, step = lane // _STEPS, lane % _STEPS
    inside = lane < words * _STEPS

    def feature(k):
        at = group * (words * WORD) + word * WORD + step + k * _STEPS
        valid = inside & (at < d_in)

        def total(kind):
            value = jnp.zeros(lanes, jnp.float32)
            for split in range(splits):
                refs = parts.at[jnp.int32(split), jnp.int32(kind), row, at]
                part = pltriton.load(refs, mask=valid, other=jnp.zeros((), parts.dtype))
                value = value + part.astype(jnp.float32)
            return value

        return total(0) if kinds == 1 else jax.nn.silu(total(0)) * total(1)

    values = [feature(k) for k in range(4)]
    most = jnp.max(jnp.maximum(abs(values[0]), abs(values[1])))
    most = jnp.maximum(most, jnp.max(jnp.maximum(abs(values[2]), abs(values[3]))))
    unit = jnp.maximum(most, _LEAST_SCALE) / (_INT8 if limbs == 1 else 128 * _INT8 + 63)
    codes = [jnp.floor(value / unit + 0.5).astype(jnp.int32) for value in values]
    high = [(code + 64) >> 7 for code in codes]
    of_limbs = (
        [codes] if limbs == 1 else [high, [c - 128 * h for c, h in zip(codes, high, strict=True)]]
    )
    for limb, parts_of_word in enumerate(of_limbs):
        word_of = jnp.zeros_like(lane)
        for k, code in enumerate(parts_of_word):
            word_of = word_of | (code & 255) << 8 * k
        at = packed.at[row, jnp.int32(limb), word, step, group]
        pltriton.store(at, word_of, mask=inside)
    scale[row, group] = unit


def _multiply(config, rows: Rounded, weights: Weights, plan: Plan) -> jax.Array:
    """Partial sums float32 [splits, weights, rows of blocks, d_out]."""
    reads = [reads_of(planes) for planes in weights]
    d_out = weights[0].shape[-1]
    blocks = plan.slots.shape[0]
    block_rows = plan.source.shape[0] // blocks
    tiles = rows.scale.shape[1] // _TILE
    columns = pl.cdiv(d_out, _BLOCK_OUT)
    splits = max(1, min(tiles, _PROGRAMS // (blocks * columns * len(weights))))
    widths = [read.width for read in reads[0]]
    held = [(read.planes, addressed(read.table)) for every in reads for read in every]
    return launch(
        partial(_kernel, config.interpret, len(weights), widths),
        grid=(blocks, columns * len(weights), splits),
        out_shape=jax.ShapeDtypeStruct(
            (splits, len(weights), blocks * block_rows, d_out), jnp.float32
        ),
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=config.interpret,
        name="planes_dp4a",
    )(plan.owner, plan.slots, plan.source, *rows, *jax.tree.leaves(held))


def _kernel(interpret, num_weights, widths, owner, slots, source, packed, scale, *refs):
    *held, out = refs
    block, column, split = (pl.program_id(axis) for axis in range(3))
    columns, block_rows = pl.cdiv(out.shape[-1], _BLOCK_OUT), source.shape[0] // owner.shape[0]
    for w in range(num_weights):
        for s, width in enumerate(widths):
            at = 2 * (w * len(widths) + s)
            planes, table = held[at : at + 2]

            @pl.when((owner[block] == s) & (column // columns == w))
            def _(w=w, width=width, planes=planes, table=table):
                # A row that only fills a block up reads any row; nothing reads what it gives.
                first, last = block * block_rows, packed.shape[0] - 1
                own = [jnp.minimum(source[first + r], last) for r in range(block_rows)]
                rows, weight = (own, packed, scale), (planes, table, slots[block])
                place = block, w, column % columns, split
                _one_block(interpret, width, rows, weight, out, place)


def _one_block(interpret, width, rows, weight, out, place):
    own, packed, scale = rows
    planes, table, slot = weight
    block, kind, column, split = place
    _, _, words, groups, d_out = planes.shape
    limbs, tiles = packed.shape[1], packed.shape[-1] // _TILE
    splits, block_rows = out.shape[0], len(own)
    outs = pl.ds(column * _BLOCK_OUT, _BLOCK_OUT)
    inside = None
    if d_out % _BLOCK_OUT:
        inside = column * _BLOCK_OUT + lax.broadcasted_iota(jnp.int32, (1, _BLOCK_OUT), 1) < d_out
    shape = (_TILE, _BLOCK_OUT)

    def mask_of(tile):
        mask = inside
        if groups % _TILE:
            group = tile * _TILE + lax.broadcasted_iota(jnp.int32, (_TILE, 1), 0)
            mask = group < groups if mask is None else (group < groups) & mask
        return None if mask is None else jnp.broadcast_to(mask, shape)

    def load(at, tile, dtype):
        mask = mask_of(tile)
        if mask is None:
            return pltriton.load(at)
        return pltriton.load(at, mask=mask, other=jnp.zeros((), dtype))

    def codes_of(tile, r):
        if table.dtype == jnp.uint8:
            at = table.at[slot, jnp.int32(r), pl.ds(tile * _TILE, _TILE), outs]
            return load(at, tile, table.dtype).astype(jnp.int32)
        group, out = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        place = (jnp.full(shape, slot), jnp.full(shape, r, jnp.int32), tile * _TILE + group)

        def of_word(word):
            return load(table.at[(*place, word)], tile, table.dtype)

        return table_entry(of_word, table.dtype, column * _BLOCK_OUT + out)

    def one_tile(tile, totals):
        in_tile = pl.ds(tile * _TILE, _TILE)
        codes = [codes_of(tile, r) for r in range(table.shape[1])]

        def one_word(word, counts):
            counts = [list(of_row) for of_row in counts]
            at = pl.ds(tile * _TILE, _TILE), outs
            of_planes = [
                load(planes.at[slot, jnp.int32(p), jnp.int32(word), *at], tile, planes.dtype)
                for p in range(width)
            ]
            for step in range(_STEPS):
                bits = [(plane >> jnp.uint32(step)) & _BYTES for plane in of_planes]
                for i, (row, limb) in enumerate(_each(own, limbs)):
                    at = packed.at[row, jnp.int32(limb), jnp.int32(word), jnp.int32(step), in_tile]
                    x = pltriton.load(at)[:, None]
                    operands = [*bits, jnp.full((_TILE, 1), _BYTES, jnp.uint32)]
                    for k, operand in enumerate(operands):
                        counts[i][k] = _dp4a(operand, x, counts[i][k], interpret)
            return counts

        zeros = [
            *(jnp.zeros(shape, jnp.int32) for _ in range(width)),
            jnp.zeros((_TILE, 1), jnp.int32),
        ]
        counts = lax.fori_loop(0, words, one_word, [zeros] * (block_rows * limbs))
        added, base = decode(codes, width)
        for r in range(block_rows):
            of_row = counts[r * limbs]
            if limbs == 2:
                of_row = [128 * a + b for a, b in zip(of_row, counts[r * limbs + 1], strict=True)]
            *of_planes, total = of_row
            y = base * total.astype(jnp.float32)
            for step, each in zip(added, in_segments(of_planes), strict=True):
                count: Any = sum(c << (len(each) - 1 - p) for p, c in enumerate(each))
                y = y + step * count.astype(jnp.float32)
            unit = pltriton.load(scale.at[own[r], in_tile])[:, None]
            totals[r] = totals[r] + unit * y
        return totals

    totals = lax.fori_loop(
        split * tiles // splits,
        (split + 1) * tiles // splits,
        one_tile,
        [jnp.zeros(shape, jnp.float32)] * block_rows,
    )
    for r, total in enumerate(totals):
        at = out.at[split, jnp.int32(kind), block * block_rows + r, outs]
        mask = None if inside is None else inside.reshape(_BLOCK_OUT)
        pltriton.store(at, jnp.sum(total, axis=0), mask=mask)


def _each(rows, limbs):
    return [(row, limb) for row in rows for limb in range(limbs)]


def _dp4a(bits: jax.Array, x: jax.Array, total: jax.Array, interpret) -> jax.Array:
    """Adds to int32 `total` the products of the bytes of `bits`, unsigned, and `x`, signed."""
    if interpret:
        for k in range(0, 32, 8):
            byte = lax.shift_right_arithmetic(x << (24 - k), 24)
            total = total + ((bits >> jnp.uint32(k)) & 255).astype(jnp.int32) * byte
        return total
    bits, x, total = jnp.broadcast_arrays(bits, x, total)
    (total,) = pltriton.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        args=[bits, x, total],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, jnp.int32)],
    )
    return total
