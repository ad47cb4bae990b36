"""Rows grouped by expert: every routed row is computed once, by its own expert alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.ops.adapted import Adapted
from mcjax.ops.linear import alike, linear

Weight = jax.Array | BitPlanes | MixedPlanes | Adapted


def expert_map(
    function: Callable[..., jax.Array],
    weights: tuple[Weight, ...],
    x: jax.Array,
    index: jax.Array,
    keep: jax.Array | None = None,
    block: int = 128,
) -> jax.Array:
    """Applies each row's expert to it, expert by expert and a block of rows at a time.

    Both loops have dynamic trip counts: an expert without rows is not touched, and rows that are
    not kept belong to no block, so they cost nothing. The gradient, with respect to x and to dense
    weights, runs over the same blocks.

    Args:
      function: (one expert's weights, rows [block, d_in]) -> [block, d_out], row by row; hashable
        and without captured arrays.
      weights: arrays or planes of logical shape [E, ...]. The last one's d_out is the result's.
      x: [N, d_in].
      index: int [N], each row's expert.
      keep: bool [N] or None for all.
      block: most rows computed at once.

    Returns:
      [N, d_out] of x's dtype; zeros where a row is not kept.
    """
    x, index = jnp.asarray(x), jnp.asarray(index).astype(jnp.int32)
    if keep is None:
        keep = jnp.ones(index.shape, bool)
    if isinstance(index.shape[0], int):  # it may be a symbol, in `jax.export`
        block = min(block, index.shape[0])
    weights, x, index, keep = alike((weights, x, index, keep))
    return _expert_map(function, block, weights, x, index, keep)


class Groups(NamedTuple):
    """Which rows each expert has: `order` lists them expert by expert.

    Attributes:
      active: int [E], experts that have rows, in order, then the others.
      num_active: int [], how many have.
      order: int [N], kept rows sorted by expert, then the others.
      first: int [E], where each expert's rows start in `order`.
      rows_of: int [E], how many it has.
    """

    active: jax.Array
    num_active: jax.Array
    order: jax.Array
    first: jax.Array
    rows_of: jax.Array


def group_rows(index: jax.Array, keep: jax.Array, num_experts: int) -> Groups:
    """Groups rows of the experts int `index` [N], those that `keep` bool [N] says."""
    key = jnp.where(keep, index, num_experts).astype(jnp.int32)
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    count = jnp.sum(key[None] == expert[:, None], axis=1, dtype=jnp.int32)
    before = jnp.where(expert[None] < expert[:, None], count[None], 0)
    return Groups(
        jnp.argsort(count == 0, stable=True).astype(jnp.int32),
        jnp.sum(count > 0, dtype=jnp.int32),
        jnp.argsort(key, stable=True).astype(jnp.int32),
        # Of few experts: a bincount and a cumsum are a scatter and a dozen small programs in XLA.
        jnp.sum(before, axis=1, dtype=jnp.int32),
        count,
    )


def _loop(groups: Groups, block, weights, visit, carry):
    """Visits every block of every active expert: ``visit(one, expert, start, valid, carry)``.

    `one` is the expert's weights, `start` the block's first place in `order`, `valid` which of its
    rows are the expert's. Rows after those are visited again as their own experts', which come
    later, or belong to none.
    """

    def one_expert(i, carry):
        expert = _at(groups.active, i)
        first, rows_of = _at(groups.first, expert), _at(groups.rows_of, expert)

        def blocks(one):
            def one_block(b, carry):
                valid = b * block + jnp.arange(block, dtype=jnp.int32) < rows_of
                return visit(one, expert, first + b * block, valid, carry)

            return lax.fori_loop(jnp.int32(0), -(-rows_of // block), one_block, carry)

        return blocks(_at(weights, expert))

    carry = alike((carry, groups, weights))[0]
    return lax.fori_loop(jnp.int32(0), groups.num_active, one_expert, carry)


def _sorted(rows, groups: Groups, block):
    """Rows [N, ...] as `order` lists them, with room for a block to begin at any of them."""
    return jnp.pad(rows[groups.order], ((0, block), (0, 0)))


def _unsorted(rows, groups: Groups, keep):
    """The inverse of `_sorted`, 0 where a row is not kept."""
    numbers = jnp.arange(keep.shape[0], dtype=jnp.int32)
    place = jnp.zeros_like(groups.order).at[groups.order].set(numbers)
    return jnp.where(keep[:, None], rows[place], 0)


def _at(tree: Any, i: jax.Array) -> Any:
    """Entry i >= 0 of the first axis of every array; of `MixedPlanes` the weight i."""
    index = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(
        lambda leaf: leaf.at(i) if isinstance(leaf, MixedPlanes) else index(leaf, i),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, MixedPlanes),
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _expert_map(function, block, weights, x, index, keep):
    groups = group_rows(index, keep, weights[0].shape[0])
    rows = _sorted(x, groups, block)

    def visit(one, expert, start, valid, out):
        y = function(one, lax.dynamic_slice_in_dim(rows, start, block))
        return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, axis=0)

    out = alike((jnp.zeros((rows.shape[0], weights[-1].shape[-1]), x.dtype), rows))[0]
    return _unsorted(_loop(groups, block, weights, visit, out), groups, keep)


@partial(_expert_map.defjvp, symbolic_zeros=True)
def _jvp(function, block, primals, tangents):
    leaves = jax.tree.leaves(primals[0])
    changes = jax.tree.leaves(tangents[0], is_leaf=lambda t: isinstance(t, SymbolicZero))
    # Of planes and their places there are no derivatives, and of weights that stay none are wanted.
    moving = tuple(
        i
        for i, (leaf, change) in enumerate(zip(leaves, changes, strict=True))
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not isinstance(change, SymbolicZero)
    )
    of_rows = tangents[1]
    if isinstance(of_rows, SymbolicZero):
        of_rows = jnp.zeros_like(primals[1])
    operand = [changes[i] for i in moving], of_rows
    forward = partial(_change, function, block, moving)
    backward = partial(_transpose, function, block, moving)
    return _expert_map(function, block, *primals), linear(forward, backward, primals, operand)


def _of_moving(function, moving, one):
    """The function of one expert's floating-point weights and rows, and those weights."""
    leaves, structure = jax.tree.flatten(one)

    def apply(values, rows):
        every = list(leaves)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return function(jax.tree.unflatten(structure, every), rows)

    return apply, [leaves[i] for i in moving]


def _change(function, block, moving, primals, operand):
    """How the result changes to first order."""
    weights, x, index, keep = primals
    groups = group_rows(index, keep, weights[0].shape[0])
    rows, changes = _sorted(x, groups, block), _sorted(operand[1], groups, block)

    def visit(one, expert, start, valid, out):
        apply, values = _of_moving(function, moving, one)
        own, change = (lax.dynamic_slice_in_dim(a, start, block) for a in (rows, changes))
        _, y = jax.jvp(apply, (values, own), (_at(operand[0], expert), change))
        return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, axis=0)

    out = jnp.zeros((rows.shape[0], weights[-1].shape[-1]), x.dtype)
    out = alike((out, rows, changes, operand))[0]
    return _unsorted(_loop(groups, block, weights, visit, out), groups, keep)


def _transpose(function, block, moving, primals, cotangent):
    weights, x, index, keep = primals
    groups = group_rows(index, keep, weights[0].shape[0])
    rows, changes = _sorted(x, groups, block), _sorted(cotangent, groups, block)

    def visit(one, expert, start, valid, carry):
        of_weights, of_rows = carry
        apply, values = _of_moving(function, moving, one)
        own, change = (lax.dynamic_slice_in_dim(a, start, block) for a in (rows, changes))
        change = jnp.where(valid[:, None], change, 0)
        of_values, of_own = jax.vjp(apply, values, own)[1](change)
        of_weights = [a.at[expert].add(d) for a, d in zip(of_weights, of_values, strict=True)]
        return of_weights, lax.dynamic_update_slice_in_dim(of_rows, of_own, start, axis=0)

    leaves = jax.tree.leaves(weights)
    zeros = [jnp.zeros_like(leaves[i]) for i in moving], jnp.zeros_like(rows)
    zeros = alike((zeros, rows, changes))[0]
    of_weights, of_rows = _loop(groups, block, weights, visit, zeros)
    return of_weights, _unsorted(of_rows, groups, keep)
