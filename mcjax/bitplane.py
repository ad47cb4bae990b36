"""Weights as bit planes: one stored matrix, every precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import rotation
from mcjax import tables as tables_lib
from mcjax.hosts import everywhere

WORD = 32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["planes", "tables"],
    meta_fields=["widths", "d_in", "group_size", "rotated"],
)
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class BitPlanes:
    """A weight of logical shape [..., d_in, d_out] kept as bit planes.

    With planes ``b_p in {0, 1}`` (p = 0 the most significant), groups g of `group_size`
    consecutive input features, and for each width k its own small table (alpha_k, offset_k):

        W_k[i, o] = offset_k[g(i), o] + sum_{p<k} alpha_k[p, g(i), o] * (2 b_p[i, o] - 1)

    A narrower width reads fewer planes and another table; it never changes a bit. d_in is padded
    to a whole number of groups; padded features never reach a result. If the weight is `rotated`,
    W_k is R' times the weight, with R of `mcjax.rotation`; products then rotate what they multiply.

    Attributes:
      planes: uint32 [..., bits, words, groups, d_out], ``words = group_size / 32``; bit j of word
        v of group g is input feature ``g * group_size + 32 v + j``.
      tables: one uint8 array [..., rows_k, groups, d_out] for each width, see `mcjax.tables`; or
        what it trains as, see `mcjax.tune`.
      widths: the widths that have a table, ascending; the last is the number of planes.
      d_in: input features, without padding.
      group_size: input features that share a table entry, a multiple of 32.
      rotated: whether its input features are rotated.
    """

    planes: jax.Array
    tables: tuple[Any, ...]
    widths: tuple[int, ...]
    d_in: int
    group_size: int
    rotated: bool = False

    @property
    def trains(self) -> bool:
        """Whether the widest width's table is numbers that train."""
        return isinstance(self.tables[-1], Mapping)

    @property
    def bits(self) -> int:
        """Number of planes."""
        return self.widths[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., d_in, d_out]."""
        return (*self.planes.shape[:-4], self.d_in, self.planes.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of planes and tables together."""
        return _nbytes(self)

    @property
    def effective_bits(self) -> float:
        """Stored bits per logical weight, tables included."""
        return 8 * self.nbytes / math.prod(self.shape)

    def slice(self, width: int | Sequence[int]) -> BitPlanes | MixedPlanes:
        """The same weight at fewer bits.

        Args:
          width: planes to keep; for [E, d_in, d_out] also E widths, one for each expert.

        Returns:
          `BitPlanes` with `width` planes and the one table of that width, or `MixedPlanes`.

        Raises:
          ValueError: if a width has no table, or the number of widths is not E.
        """
        if isinstance(width, int | np.integer):
            return self.at_width(int(width))
        allocation = tuple(int(k) for k in width)
        if self.ndim != 3 or len(allocation) != self.shape[0]:
            raise ValueError(
                f"{len(allocation)} widths {allocation} for a weight of shape {self.shape}; "
                "one width per expert needs shape [experts, d_in, d_out]"
            )
        stacks = []
        for k in sorted(set(allocation)):
            experts = np.flatnonzero(np.asarray(allocation) == k)
            stacks.append(jax.tree.map(lambda leaf, e=experts: leaf[e], self.at_width(k)))
        return mixed(stacks, allocation)

    def at_width(self, width: int) -> BitPlanes:
        """`slice` of one width."""
        if width not in self.widths:
            raise ValueError(f"width {width} is not one of the stored widths {self.widths}")
        return replace(
            self,
            planes=self.planes[..., :width, :, :, :],
            tables=(self.tables[self.widths.index(width)],),
            widths=(width,),
        )

    def unrotated(self) -> BitPlanes:
        """The same planes as those of R' W, which multiply rows that are rotated already."""
        return replace(self, rotated=False)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight at its full width, [..., d_in, d_out] of `dtype`."""
        return _dequantize(self, jnp.dtype(dtype))

    def in_plane_order(self) -> jax.Array:
        """The weight in the order that its bits lie in, float32 [..., words * 32 * groups, d_out].

        Nothing moves to get there, which makes it much the faster half of a product; the other half
        is `plane_order` of what it multiplies.
        """
        return unpack_signs(self.planes, *tables_lib.decode(self.tables[-1], self.bits))

    def plane_order(self, x: jax.Array) -> jax.Array:
        """Input features [..., d_in] in the order of `in_plane_order`, zeros for padding."""
        words, groups, _ = self.planes.shape[-3:]
        batch = x.shape[:-1]
        x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, groups * self.group_size - self.d_in)])
        x = jnp.moveaxis(x.reshape(*batch, groups, words, WORD), -3, -1)
        return x.reshape(*batch, -1)

    def feature_order(self, x: jax.Array) -> jax.Array:
        """The inverse of `plane_order`."""
        words, groups, _ = self.planes.shape[-3:]
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], words, WORD, groups), -1, -3)
        return x.reshape(*x.shape[:-3], -1)[..., : self.d_in]

    def values(self, alpha: jax.Array, offset: jax.Array) -> jax.Array:
        """The weight [..., d_in, d_out] with other numbers than its table's.

        Args:
          alpha: float32 [..., bits, groups, d_out].
          offset: float32 [..., groups, d_out].
        """
        value = jnp.swapaxes(unpack_signs(self.planes, alpha, offset), -1, -2)
        value = self.feature_order(value)
        value = rotation.unrotate(value) if self.rotated else value
        return jnp.swapaxes(value, -1, -2)

    def codes(self) -> jax.Array:
        """The integer codes, uint8 [..., d_in, d_out], most significant plane first."""
        return unpack(self.planes)[..., : self.d_in, :]

    def __repr__(self) -> str:
        return f"BitPlanes(shape={self.shape}, bits={self.bits}, group_size={self.group_size})"


@partial(jax.jit, static_argnums=1)
def _dequantize(planes: BitPlanes, dtype: Any) -> jax.Array:
    return planes.values(*tables_lib.decode(planes.tables[-1], planes.bits)).astype(dtype)


@partial(
    jax.tree_util.register_dataclass, data_fields=["stacks", "stack", "slot"], meta_fields=["most"]
)
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class MixedPlanes:
    """Weights of logical shape [..., d_in, d_out], each with its own width.

    One uniform `BitPlanes` for each width, and where in them each weight lies. Places are data, so
    a program depends on how many weights have which width and not on which ones they are, and the
    layers of a scan share stacks of which each looks up its own.

    Attributes:
      stacks: `BitPlanes` [n_s, d_in, d_out] of ascending width.
      stack: int32 [...], which stack holds each weight.
      slot: int32 [...], its place there.
      most: most planes of a weight that are read, None for all. Wider stacks have a table of this
        width too.
    """

    stacks: tuple[BitPlanes, ...]
    stack: jax.Array
    slot: jax.Array
    most: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., d_in, d_out]."""
        return (*self.stack.shape, *self.stacks[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def allocation(self) -> np.ndarray:
        """The width of each weight as held, int [...]; its values must be concrete.

        Where other processes have some of them, all processes must ask.
        """
        return np.array([stack.bits for stack in self.stacks])[everywhere(self.stack)]

    @property
    def reads(self) -> tuple[int, ...]:
        """Planes that are read of a weight, for each stack."""
        return tuple(
            stack.bits if self.most is None else min(self.most, stack.bits) for stack in self.stacks
        )

    @property
    def bits(self) -> float:
        """Planes that are read of a weight, on average over the stacks."""
        counts = [stack.shape[0] for stack in self.stacks]
        return sum(n * k for n, k in zip(counts, self.reads, strict=True)) / sum(counts)

    @property
    def trains(self) -> bool:
        """Whether tables are numbers that train."""
        return self.stacks[0].trains

    @property
    def d_in(self) -> int:
        """Input features, without padding."""
        return self.stacks[0].d_in

    @property
    def group_size(self) -> int:
        """Input features that share a table entry."""
        return self.stacks[0].group_size

    @property
    def rotated(self) -> bool:
        """Whether input features are rotated."""
        return self.stacks[0].rotated

    def unrotated(self) -> MixedPlanes:
        """As `BitPlanes.unrotated`."""
        return replace(self, stacks=tuple(stack.unrotated() for stack in self.stacks))

    @property
    def nbytes(self) -> int:
        """Bytes of planes and tables together."""
        return _nbytes(self.stacks)

    @property
    def effective_bits(self) -> float:
        """Stored bits per logical weight, tables included."""
        return 8 * self.nbytes / sum(math.prod(stack.shape) for stack in self.stacks)

    def at(self, i: Any) -> MixedPlanes:
        """Those at index i of the first axis: the same stacks, fewer places."""
        return replace(self, stack=_at(self.stack, i), slot=_at(self.slot, i))

    def look_up(self, function: Callable[[BitPlanes, jax.Array, int], Any]) -> Any:
        """``function(stack, slot, width)`` of the stack that holds the one weight that this is.

        `slot` is the weight's place in the stack, and `width` the planes to read of it.
        """

        def branch(stack, width):
            return lambda slot: function(stack, slot, width)

        return jax.lax.switch(self.stack, list(map(branch, self.stacks, self.reads)), self.slot)

    def choose(self, function: Callable[[BitPlanes], Any]) -> Any:
        """`function` of the one weight that this is, [d_in, d_out] as `BitPlanes` of its width."""

        def of_one(stack, slot, width):
            return function(jax.tree.map(lambda leaf: _at(leaf, slot), stack).at_width(width))

        return self.look_up(of_one)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weights in their own order, [..., d_in, d_out] of `dtype`."""
        if not self.stack.ndim:
            return self.choose(lambda one: one.dequantize(dtype))
        starts = jnp.asarray(np.cumsum([0] + [s.shape[0] for s in self.stacks])[:-1])
        stacks = [
            stack.at_width(width).dequantize(dtype)
            for stack, width in zip(self.stacks, self.reads, strict=True)
        ]
        return jnp.concatenate(stacks)[starts[self.stack] + self.slot]

    def dequantize_each(self, dtype: Any = jnp.float32) -> jax.Array:
        """As `dequantize`, one weight [d_in, d_out] after another, reading no others' planes."""
        if not self.stack.ndim:
            return self.choose(lambda one: one.dequantize(dtype))
        # Tables, which may have gradients, are looked up together: each has them added up once.
        row = [jnp.minimum(self.slot.reshape(-1), stack.shape[0] - 1) for stack in self.stacks]
        tables = [
            jax.tree.map(lambda a, own=own: a[own], stack.tables)
            for stack, own in zip(self.stacks, row, strict=True)
        ]

        def branch(s, tables):
            def make(slot):
                planes = _at(self.stacks[s].planes, slot)
                own = replace(self.stacks[s], planes=planes, tables=tables[s])
                return own.at_width(self.reads[s]).dequantize(dtype)

            return make

        @jax.checkpoint
        def one(given):
            stack, slot, tables = given
            branches = [branch(s, tables) for s in range(len(self.stacks))]
            return jax.lax.switch(stack, branches, slot)

        each = jax.lax.map(one, (self.stack.reshape(-1), self.slot.reshape(-1), tables))
        return each.reshape(self.shape)

    def __repr__(self) -> str:
        held = ", ".join(f"{s.shape[0]} of {s.bits} bits" for s in self.stacks)
        return f"MixedPlanes(shape={self.shape}, {held})"


def _at(array: jax.Array, i: Any) -> jax.Array:
    """Entry i >= 0 of the first axis."""
    return jax.lax.dynamic_index_in_dim(array, i, keepdims=False, allow_negative_indices=False)


def mixed(stacks: Sequence[BitPlanes], allocation: Any, most: int | None = None) -> MixedPlanes:
    """Weights in stacks by width, each stack holding its own in their order.

    Args:
      stacks: of ascending width.
      allocation: int [...], each weight's width.
      most: as in `MixedPlanes`.
    """
    stack, slot = places(allocation)
    return MixedPlanes(
        stacks=tuple(stacks), stack=jnp.asarray(stack), slot=jnp.asarray(slot), most=most
    )


def places(allocation: Any) -> tuple[np.ndarray, np.ndarray]:
    """Stack and slot, int32 [...], of weights of the widths int [...]."""
    widths = np.asarray(allocation)
    _, stack = np.unique(widths, return_inverse=True)
    stack = stack.reshape(-1)
    slot = np.zeros_like(stack)
    for s in range(stack.max(initial=-1) + 1):
        mine = stack == s
        slot[mine] = np.arange(mine.sum())
    return (
        stack.reshape(widths.shape).astype(np.int32),
        slot.reshape(widths.shape).astype(np.int32),
    )


Planes = BitPlanes | MixedPlanes


def pack(codes: jax.Array, bits: int, group_size: int) -> jax.Array:
    """Codes to planes.

    Args:
      codes: unsigned integers below ``2**bits``, [..., d_in, d_out]; d_in a multiple of
        `group_size`.
      bits: number of planes, 1 to 8.
      group_size: a multiple of 32.

    Returns:
      uint32 [..., bits, words, groups, d_out].

    Raises:
      ValueError: if the shape cannot be grouped.
    """
    *batch, d_in, d_out = codes.shape
    if group_size % WORD or group_size < WORD or d_in % group_size:
        raise ValueError(
            f"{d_in} input features cannot be cut into groups of {group_size}: "
            f"group sizes are multiples of {WORD} that divide the (padded) input features"
        )
    words = codes.astype(jnp.uint32).reshape(
        *batch, d_in // group_size, group_size // WORD, WORD, d_out
    )
    words = jnp.moveaxis(words, -4, -2)  # [..., words, 32, groups, d_out]
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[:, None, None]
    planes = [
        jnp.sum(((words >> (bits - 1 - p)) & 1) << shifts, axis=-3, dtype=jnp.uint32)
        for p in range(bits)
    ]
    return jnp.stack(planes, axis=-4)


def unpack(planes: jax.Array) -> jax.Array:
    """Planes uint32 [..., bits, words, groups, d_out] to codes uint8 [..., padded d_in, d_out]."""
    bits = planes.shape[-4]
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[:, None, None]
    weights = 2 ** jnp.arange(bits - 1, -1, -1, dtype=jnp.uint32)
    bit = (planes[..., None, :, :] >> shifts) & 1  # [..., bits, words, 32, groups, d_out]
    code = jnp.sum(bit * weights[:, None, None, None, None], axis=-5, dtype=jnp.uint32)
    code = jnp.moveaxis(code, -2, -4)
    return code.reshape(*planes.shape[:-4], -1, planes.shape[-1]).astype(jnp.uint8)


def unpack_signs(planes: jax.Array, alpha: jax.Array, offset: jax.Array) -> jax.Array:
    """``offset + sum_p alpha_p (2 b_p - 1)`` in the order that the bits lie in.

    Args:
      planes: uint32 [..., bits, words, groups, d_out].
      alpha: float32 [..., bits, groups, d_out].
      offset: float32 [..., groups, d_out].

    Returns:
      float32 [..., words * 32 * groups, d_out].
    """
    mask = (jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32))[:, None, None]
    mask = mask.reshape((1,) * (planes.ndim - 3) + mask.shape)
    value: Any = offset[..., None, None, :, :]
    for p in range(planes.shape[-4]):
        word = planes[..., p, :, None, :, :]  # [..., words, 1, groups, d_out]
        step = alpha[..., p, None, None, :, :]
        value = jnp.where(word & mask != 0, value + step, value - step)
    return value.reshape(*planes.shape[:-4], -1, planes.shape[-1])


def padded(d_in: int) -> int:
    """`d_in` rounded up to whole words."""
    return -(-d_in // WORD) * WORD


def resolve_group_size(d_in: int, group_size: int | None) -> int:
    """The group size to use: the one asked for, or the largest fitting multiple of 32 up to 128.

    Raises:
      ValueError: if an explicit `group_size` does not divide the padded input features.
    """
    if group_size is None:
        return max(g for g in range(WORD, 4 * WORD + 1, WORD) if padded(d_in) % g == 0)
    if group_size < WORD or group_size % WORD or padded(d_in) % group_size:
        raise ValueError(
            f"{d_in} input features cannot be cut into groups of {group_size}: choose a multiple "
            f"of {WORD} that divides {padded(d_in)}, or leave it out for "
            f"{resolve_group_size(d_in, None)}"
        )
    return group_size


def empty(
    shape: Sequence[int],
    widths: int | Sequence[int],
    group_size: int | None = None,
    rotated: bool = False,
) -> BitPlanes:
    """All-zero planes and tables of a given logical shape, for initialisers and restoring.

    Args:
      shape: logical [..., d_in, d_out].
      widths: one width, or the widths to keep tables for, ascending.
      group_size: see `resolve_group_size`.
      rotated: as in `BitPlanes`.
    """
    widths = (int(widths),) if isinstance(widths, int | np.integer) else tuple(widths)
    *batch, d_in, d_out = shape
    group_size = resolve_group_size(d_in, group_size)
    groups = padded(d_in) // group_size
    return BitPlanes(
        planes=jnp.zeros((*batch, widths[-1], group_size // WORD, groups, d_out), jnp.uint32),
        tables=tuple(
            jnp.zeros((*batch, tables_lib.num_rows(k), groups, d_out), jnp.uint8) for k in widths
        ),
        widths=widths,
        d_in=d_in,
        group_size=group_size,
        rotated=rotated,
    )


def draft_widths(width: int, draft: int | None) -> tuple[int, ...]:
    """The widths that an expert has tables for when it also drafts: its own and any narrower."""
    return (width,) if draft is None else tuple(sorted({min(draft, width), width}))


def _nbytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
