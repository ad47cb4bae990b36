"""Rows grouped by expert, times planes, by Pallas kernels for GPU and TPU.

Both kernels take rows in blocks of one expert each, planned here, and make the weight a slab at a
time: bit j of a tile of words, elementwise with table entries, in registers and without moving
anything. The features of x are put in that order instead, once, while its rows are gathered. The
GPU's kernel is in `mcjax.ops.triton`; rows too few for its matrix units are `mcjax.ops.dp4a`'s.

On TPU (Mosaic) a *unit* is what one word of a group holds: 32 input features of each of G groups.
x becomes [units, rows, 32 * G] with unit ``tile * words + v`` and, inside, feature ``j * G + g``
for bit j and group g of the tile. Stacking 32 slabs of whole tiles of registers moves nothing, so
the grid visits a unit at a time and multiplies all its ``32 * G`` features at once, for few rows
too.
Experts steer the copies of planes through scalar prefetch, and the grid ends at the last block that
has rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mcjax import tables as tables_lib
from mcjax.bitplane import WORD, BitPlanes, MixedPlanes
from mcjax.ops.grouped import expert_map, group_rows
from mcjax.ops.linear import alike, varying_as

TARGETS = ("gpu", "tpu")

_LEAST = 16  # rows, groups or outputs that a product on a GPU's matrix unit takes at least
_MOST_ROWS = {"gpu": 256, "tpu": 128}
_LANES = 128
REACH = 1 << 31
"""Entries that a signed 32-bit offset tells apart."""


def supported(shape: Sequence[int], group_size: int, width: int, dtype: Any) -> bool:
    """Whether the kernels multiply rows of `dtype` with such planes, on GPU and TPU alike.

    Sizes need not be multiples of any tile: edges are masked.

    Args:
      shape: logical [E, d_in, d_out], none of them 0.
      group_size: input features that share a table entry.
      width: planes of each expert, at most.
      dtype: of the rows.
    """
    if len(shape) != 3 or min(shape) < 1 or group_size < WORD or group_size % WORD:
        return False
    experts, d_in, d_out = shape
    table = experts, tables_lib.num_rows(width), pl.cdiv(d_in, group_size), d_out
    fits = 1 <= width <= 8 and is_addressed(table)
    return fits and jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16)


def is_addressed(table: Sequence[int]) -> bool:
    """Whether a GPU's kernels find every byte of a table of this shape, see `addressed`."""
    return is_within_reach(math.prod(table)) or table[-1] % 4 == 0


def is_within_reach(entries: int) -> bool:
    """Whether Triton finds every byte of so many.

    The offsets that JAX makes for it have 32 bits and a sign, and 64 bits for arrays of more than
    4 GiB.
    """
    return entries <= REACH or entries > 2 * REACH


def addressed(table: jax.Array) -> jax.Array:
    """A table of bytes as a GPU's kernels take it: four in a word where those are out of reach."""
    return table if is_within_reach(table.size) else table.view(jnp.uint32)


def table_entry(load: Callable[[jax.Array], jax.Array], dtype: Any, out: jax.Array) -> jax.Array:
    """An entry of an `addressed` table of a dtype, int32.

    Args:
      load: gives what lies at a place of the table's last axis.
      dtype: of the table.
      out: int32, the output features whose entries are wanted.
    """
    if dtype == jnp.uint8:
        return load(out).astype(jnp.int32)
    shift = (8 * (out % 4)).astype(jnp.uint32)
    return (lax.shift_right_logical(load(out // 4), shift) & np.uint32(255)).astype(jnp.int32)


class _Config(NamedTuple):
    """What is fixed when a product is traced.

    Attributes:
      block_rows: rows of one block, None to choose.
      block_out: output features of one block, None to choose.
      target: "gpu", "tpu", or None for whatever the program is lowered for.
      interpret: run the kernel in Pallas' interpreter.
    """

    block_rows: int | None
    block_out: int | None
    target: str | None
    interpret: bool | pltpu.InterpretParams


def grouped_dot(
    x: jax.Array,
    planes: BitPlanes | MixedPlanes,
    index: jax.Array,
    keep: jax.Array | None = None,
    *,
    block_rows: int | None = None,
    block_out: int | None = None,
    target: str | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Every row times its own expert, as `mcjax.ops.grouped.expert_map` does for one product.

    Rows are grouped by expert and padded to whole blocks; blocks without rows, and so rows that
    are not kept, cost nothing. Weights are rounded to x's dtype, sums are float32; float32 rows are
    multiplied at the default precision of `jnp.dot`. Derivatives with respect to x run in plain
    JAX, the planes have none.

    Args:
      x: float32 or bfloat16 [N, d_in].
      planes: a weight of logical shape [E, d_in, d_out]; on TPU each width of `MixedPlanes` is one
        kernel call, over its own experts' blocks alone.
      index: int [N], each row's expert.
      keep: bool [N] or None for all.
      block_rows: rows of a block, a power of two (at least 16 are taken); by default twice what an
        expert has on average, at most 256 (on TPU 128).
      block_out: output features of a block, a power of two (on GPU at least 16 are taken, on TPU
        128); by default 128 on GPU and 256 on TPU.
      target: "gpu" or "tpu" takes that kernel; None takes the one of the platform that the program
        is lowered for, and plain JAX on others or where nothing is `supported`.
      interpret: runs the kernel (that of the GPU unless `target` says otherwise) in Pallas'
        interpreter, on any platform; that of the TPU also in its simulator.

    Returns:
      [N, d_out] of x's dtype; zeros where a row is not kept.

    Raises:
      ValueError: if shapes do not fit, blocks are not such sizes, or a kernel is demanded for what
        it does not support.
    """
    x, index = jnp.asarray(x), jnp.asarray(index)
    keep = jnp.ones(index.shape, bool) if keep is None else jnp.asarray(keep)
    if x.ndim != 2 or len(planes.shape) != 3 or x.shape[1] != planes.shape[1]:
        raise ValueError(f"x {x.shape} does not multiply experts of shape {planes.shape}")
    if index.shape != x.shape[:1] or keep.shape != x.shape[:1]:
        raise ValueError(f"index {index.shape} and keep {keep.shape} must be [{x.shape[0]}]")
    if target not in (None, *TARGETS):
        raise ValueError(f"target must be None or one of {TARGETS}, got {target!r}")
    for name, size in (("block_rows", block_rows), ("block_out", block_out)):
        if size is not None and (size < 1 or size & (size - 1)):
            raise ValueError(f"{name} must be a power of two, got {size}")
    target = "gpu" if interpret and target is None else target
    width = max(read.width for read in reads_of(planes))
    shapes = [(len(read.planes), *planes.shape[1:]) for read in reads_of(planes)]
    fits = x.shape[0] > 0 and all(
        supported(shape, planes.group_size, read.width, x.dtype)
        for shape, read in zip(shapes, reads_of(planes), strict=True)
    )
    if not fits and target is not None:
        raise ValueError(
            f"no kernel for {x.dtype} rows {x.shape} times planes of shape {planes.shape}, groups "
            f"of {planes.group_size} and {width} bits"
        )
    if not fits:
        return reference(x, planes, index, keep)
    return _grouped_dot(_Config(block_rows, block_out, target, interpret), x, planes, index, keep)


def launch(kernel: Callable, out_shape: Any, **options: Any) -> Callable[..., Any]:
    """`pl.pallas_call`, inside a `jax.shard_map` too.

    What comes back varies over all of its axes that anything given varies over.
    """

    def call(*operands):
        operands = alike(operands)
        shapes = jax.tree.map(lambda shape: varying_as(shape, operands[0]), out_shape)
        return pl.pallas_call(kernel, out_shape=shapes, **options)(*operands)

    return call


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _grouped_dot(config: _Config, x, planes, index, keep):
    if config.target is not None:
        return _product(config.target, config, x, planes, index, keep)
    return lax.platform_dependent(
        x,
        planes,
        index,
        keep,
        cuda=partial(_product, "gpu", config),
        tpu=partial(_product, "tpu", config),
        default=reference,
    )


@_grouped_dot.defjvp
def _jvp(config, primals, tangents):
    x, *rest = primals
    change = jax.jvp(lambda x: reference(x, *rest), (x,), tangents[:1])[1]
    return _grouped_dot(config, *primals), change


def reference(x: jax.Array, planes: BitPlanes | MixedPlanes, index, keep) -> jax.Array:
    """What the kernels compute, in plain JAX."""
    return expert_map(dequantized_dot, (planes,), x, index, keep)


def dequantized_dot(weights, rows):
    """Rows times the one weight, dequantised."""
    (weight,) = weights
    if isinstance(weight, MixedPlanes):
        return weight.choose(lambda one: dequantized_dot((one,), rows))
    return jnp.dot(rows, weight.dequantize(rows.dtype))


class Read(NamedTuple):
    """What a kernel is given of a stack: all its planes, since a slice would be a copy.

    Attributes:
      planes: uint32 [n, bits, words, groups, d_out].
      table: uint8 [n, rows, groups, d_out], that of the width that is read.
      width: planes that are read, the first.
    """

    planes: jax.Array
    table: jax.Array
    width: int


def reads_of(planes: BitPlanes | MixedPlanes) -> tuple[Read, ...]:
    """What is read of each stack."""
    pairs = [(planes, planes.bits)] if isinstance(planes, BitPlanes) else []
    if isinstance(planes, MixedPlanes):
        pairs = list(zip(planes.stacks, planes.reads, strict=True))
    return tuple(Read(s.planes, s.tables[s.widths.index(k)], k) for s, k in pairs)


def places_of(planes: BitPlanes | MixedPlanes) -> tuple[jax.Array, jax.Array]:
    """Each expert's stack and its slot there, int32 [E]."""
    if isinstance(planes, MixedPlanes):
        return planes.stack, planes.slot
    slot = jnp.arange(planes.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(slot), slot


class Plan(NamedTuple):
    """Rows put into blocks of one expert each, stack by stack and there expert by expert.

    Attributes:
      source: int32 [rows], the row of x for each row of the blocks, N for filling.
      place: int32 [N], where each row of x went, `rows` if it is not kept; None if all stayed.
      owner: int32 [blocks], each block's stack, one beyond the last for a block without rows.
      slots: int32 [blocks], each block's expert as its place in its stack.
      spans: int32 [stacks, 2], the first block of each stack and how many it has.
    """

    source: jax.Array
    place: jax.Array | None
    owner: jax.Array
    slots: jax.Array
    spans: jax.Array


def plan_blocks(planes, index, keep, block_rows: int) -> Plan:
    """Puts rows of the experts int `index` [N], those that `keep` bool [N] says, into blocks."""
    rows, experts = index.shape[0], planes.shape[0]
    stack, slot = places_of(planes)
    by_stack = jnp.argsort(stack, stable=True)
    index = (
        jnp.zeros(experts, jnp.int32).at[by_stack].set(jnp.arange(experts, dtype=jnp.int32))[index]
    )
    stack, slot = stack[by_stack], slot[by_stack]
    count = len(reads_of(planes))
    edges = jnp.searchsorted(stack, jnp.arange(count + 1))
    # An expert's last block may be all but one row filling. One block more than can be used is
    # where a kernel without blocks may write.
    blocks = (rows + min(experts, rows) * (block_rows - 1)) // block_rows + 1
    groups = group_rows(index, keep, experts)
    blocks_of = pl.cdiv(groups.rows_of, block_rows)
    end = jnp.cumsum(blocks_of)
    start = end - blocks_of
    numbers = jnp.arange(rows, dtype=jnp.int32)
    position = jnp.zeros(rows, jnp.int32).at[groups.order].set(numbers)
    place = start[index] * block_rows + position - groups.first[index]
    place = jnp.where(keep, place, blocks * block_rows).astype(jnp.int32)
    source = jnp.full(blocks * block_rows, rows, jnp.int32).at[place].set(numbers, mode="drop")
    expert = jnp.searchsorted(end, jnp.arange(blocks), side="right")
    last = jnp.minimum(expert, experts - 1)
    owner = jnp.where(expert < experts, stack[last], count).astype(jnp.int32)
    slots = slot[last].astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros_like(end[:1]), end])[edges]
    spans = jnp.stack([before[:-1], jnp.diff(before)], axis=1)
    return Plan(source, place, owner, slots, spans.astype(jnp.int32))


def _product(target, config, x, planes, index, keep):
    rows, (experts, _, d_out) = x.shape[0], planes.shape
    # Twice the average, since an uneven load would make several blocks read the same planes.
    # At least what a matrix unit or a register of bfloat16 takes.
    block_rows = config.block_rows or _power_of_two(
        pl.cdiv(2 * rows, experts), 1, _MOST_ROWS[target]
    )
    block_rows = max(block_rows, _LEAST)
    plan = plan_blocks(planes, index, keep, block_rows)
    if target == "gpu":
        from mcjax.ops.triton import matrix_dot  # imports what is above

        block_out = _power_of_two(d_out, _LEAST, max(config.block_out or 128, _LEAST))
        out: Any = matrix_dot(x, planes, plan, block_rows, block_out, config.interpret)
    else:
        # 32 groups are a whole tile of bytes, which is what tables are.
        groups = reads_of(planes)[0].planes.shape[-2]
        ordered = _order(x, plan.source, groups, planes.group_size, _power_of_two(groups, 8, 32))
        block_out = min(d_out, max(config.block_out or 256, _LANES))
        out = None  # each stack's kernel adds its own blocks to what the ones before wrote
        for span, read in zip(plan.spans, reads_of(planes), strict=True):
            out = _tpu_call(
                span, plan.slots, ordered, read, out, block_rows, block_out, config.interpret
            )
    y = out.at[:, plan.place].get(mode="clip").sum(0)
    return jnp.where(keep[:, None], y, 0).astype(x.dtype)


def _power_of_two(size, least, most):
    return min(most, max(least, pl.next_power_of_2(size)))


def _order(x, source, groups, group_size, tile):
    """Gathered rows [rows, d_in] as [units, rows, 32 * tile], zero where there is no feature."""
    tiles, words = pl.cdiv(groups, tile), group_size // WORD
    x = x.at[source].get(mode="fill", fill_value=0)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile * group_size - x.shape[1])))
    x = x.reshape(-1, tiles, tile, words, WORD).transpose(1, 3, 0, 4, 2)
    return x.reshape(tiles * words, -1, WORD * tile)


def decode(codes: list[jax.Array], width: int) -> tuple[list[jax.Array], jax.Array]:
    """A table's rows, each int [G, block_out], as what bits add and what no bit gives.

    Of each segment of planes it is what its last plane adds, with which the integer that its bits
    make is multiplied.

    The sums of `mcjax.tables.decode` written without leading axes, which registers do not have.
    Any byte decodes to a finite number, so that entries beyond the last group, whatever they are,
    vanish in products with the zeros of x there.
    """
    segments = tables_lib.segments(width)
    steps = [tables_lib.step_value(code) for code in codes[: len(segments)]]
    added = [step * 0.5 ** (n - 2) for step, n in zip(steps, segments, strict=True)]
    first, *spans = (step * (2 - 0.5 ** (n - 1)) for step, n in zip(steps, segments, strict=True))
    half_span = sum(spans, start=first)
    return added, (tables_lib.offset_ratio(codes[-1]) - 1) * half_span


def slab(words: list[jax.Array], j: int, added: list[jax.Array], base: jax.Array) -> jax.Array:
    """Bit `j` of words uint32 [G, block_out], one of each plane, as weights float32."""
    value = base
    for step, (first, *others) in zip(added, in_segments(words), strict=True):
        if not others:
            value = jnp.where(first & np.uint32(1 << j) != 0, value + step, value)
            continue
        code = (first >> np.uint32(j)) & 1
        for word in others:
            code = 2 * code + ((word >> np.uint32(j)) & 1)
        value = value + step * code.astype(jnp.int32).astype(jnp.float32)
    return value


def in_segments(planes: Sequence[jax.Array]) -> list[Sequence[jax.Array]]:
    """What there is one of for each plane, by segments of `mcjax.tables`."""
    segments = tables_lib.segments(len(planes))
    ends = np.cumsum(segments).tolist()
    return [planes[end - n : end] for n, end in zip(segments, ends, strict=True)]


def _tpu_call(span, slots, x, read: Read, out, block_rows, block_out, interpret):
    units, rows, features = x.shape
    planes, table, width = read
    _, _, words, groups, d_out = planes.shape
    tile = min(features // WORD, groups)
    existing = () if out is None else (out,)
    block: dict[str, Callable] = {
        "x": lambda o, i, u, span, slots: (u, span[0] + i, 0),
        "planes": lambda o, i, u, span, slots: (
            slots[span[0] + i],
            0,
            lax.rem(u, words),
            lax.div(u, words),
            o,
        ),
        "table": lambda o, i, u, span, slots: (slots[span[0] + i], 0, lax.div(u, words), o),
        "out": lambda o, i, u, span, slots: (0, span[0] + i, o),
    }
    return launch(
        partial(_tpu_kernel, width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            # A grid of no blocks at all is avoided: it visits one and does nothing there.
            grid=(pl.cdiv(d_out, block_out), jnp.maximum(span[1], 1), units),
            in_specs=[
                pl.BlockSpec((None, block_rows, features), block["x"]),
                pl.BlockSpec((None, width, None, tile, block_out), block["planes"]),
                pl.BlockSpec((None, table.shape[1], tile, block_out), block["table"]),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in existing),
            ],
            out_specs=pl.BlockSpec((None, block_rows, block_out), block["out"]),
            scratch_shapes=[pltpu.VMEM((block_rows, block_out), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((1, rows, d_out), x.dtype),
        input_output_aliases={5: 0} if existing else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="planes_grouped_dot",
    )(span, slots, x, planes, table, *existing)


def _tpu_kernel(width, span, slots, x, planes, table, *existing_out_and_total):
    del slots  # they place the blocks
    out, total = existing_out_and_total[-2:]
    u = pl.program_id(2)

    @pl.when(pl.program_id(1) < span[1])
    def one_unit():
        @pl.when(u == 0)
        def begin():
            total[...] = jnp.zeros_like(total)

        # Fewer groups than a tile come as they are and are filled up here.
        filling = ((0, x.shape[-1] // WORD - table.shape[-2]), (0, 0))
        codes = [jnp.pad(table[r].astype(jnp.int32), filling) for r in range(table.shape[0])]
        added, base = decode(codes, width)
        words = [jnp.pad(planes[p], filling) for p in range(width)]
        slabs = [slab(words, j, added, base) for j in range(WORD)]
        weight = jnp.concatenate(slabs).astype(x.dtype)
        total[...] += jnp.dot(x[...], weight, preferred_element_type=jnp.float32)

        @pl.when(u == pl.num_programs(2) - 1)
        def end():
            out[...] = total[...].astype(out.dtype)
