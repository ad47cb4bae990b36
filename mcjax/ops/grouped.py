"""Rows grouped by expert: every routed row is computed once, by its own expert alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mcjax.bitplane import BitPlanes, MixedPlanes

Weight = jax.Array | BitPlanes | MixedPlanes


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
    x, index = jnp.asarray(x), jnp.asarray(index)
    if keep is None:
        keep = jnp.ones(index.shape, bool)
    return _expert_map(function, min(block, index.shape[0]), weights, x, index, keep)


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
    key = jnp.where(keep, index, num_experts)
    expert = jnp.arange(num_experts)
    count = jnp.sum(key == expert[:, None], axis=1)
    return Groups(
        jnp.argsort(count == 0, stable=True),
        jnp.sum(count > 0),
        jnp.argsort(key, stable=True),
        # Of few experts: a bincount and a cumsum are a scatter and a dozen small programs in XLA.
        jnp.sum(jnp.where(expert < expert[:, None], count, 0), axis=1),
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
                valid = b * block + jnp.arange(block) < rows_of
                return visit(one, expert, first + b * block, valid, carry)

            return lax.fori_loop(0, -(-rows_of // block), one_block, carry)

        return blocks(_at(weights, expert))

    return lax.fori_loop(0, groups.num_active, one_expert, carry)


def _sorted(rows, groups: Groups, block):
    """Rows [N, ...] as `order` lists them, with room for a block to begin at any of them."""
    return jnp.pad(rows[groups.order], ((0, block), (0, 0)))


def _unsorted(rows, groups: Groups, keep):
    """The inverse of `_sorted`, 0 where a row is not kept."""
    place = jnp.zeros_like(groups.order).at[groups.order].set(jnp.arange(len(keep)))
    return jnp.where(keep[:, None], rows[place], 0)


def _at(tree: Any, i: jax.Array) -> Any:
    """Entry i >= 0 of the first axis of every array; of `MixedPlanes` the weight i."""
    index = partial(lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(
        lambda leaf: leaf.at(i) if isinstance(leaf, MixedPlanes) else index(leaf, i),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, MixedPlanes),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_map(function, block, weights, x, index, keep):
    groups = group_rows(index, keep, weights[0].shape[0])
    rows = _sorted(x, groups, block)

    def visit(one, expert, start, valid, out):
        y = function(one, lax.dynamic_slice_in_dim(rows, start, block))
        return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), start, axis=0)

    out = jnp.zeros((len(rows), weights[-1].shape[-1]), x.dtype)
    return _unsorted(_loop(groups, block, weights, visit, out), groups, keep)


def _forward(function, block, weights, x, index, keep):
    return _expert_map(function, block, weights, x, index, keep), (weights, x, index, keep)


def _backward(function, block, residuals, cotangent):
    weights, x, index, keep = residuals
    trained = not any(isinstance(w, BitPlanes | MixedPlanes) for w in weights)
    groups = group_rows(index, keep, weights[0].shape[0])
    rows, changes = _sorted(x, groups, block), _sorted(cotangent, groups, block)

    def visit(one, expert, start, valid, carry):
        of_weights, of_rows = carry
        own = lax.dynamic_slice_in_dim(rows, start, block)
        change = lax.dynamic_slice_in_dim(changes, start, block)
        change = jnp.where(valid[:, None], change, 0)
        if trained:
            of_one, of_own = jax.vjp(function, one, own)[1](change)
            of_weights = jax.tree.map(lambda a, d: a.at[expert].add(d), of_weights, of_one)
        else:
            (of_own,) = jax.vjp(lambda r: function(one, r), own)[1](change)
        return of_weights, lax.dynamic_update_slice_in_dim(of_rows, of_own, start, axis=0)

    zeros = jax.tree.map(jnp.zeros_like, weights) if trained else None
    of_weights, of_rows = _loop(groups, block, weights, visit, (zeros, jnp.zeros_like(rows)))
    return of_weights, _unsorted(of_rows, groups, keep), None, None


_expert_map.defvjp(_forward, _backward)
