"""Rows grouped by expert: every routed row is computed once, by its own expert alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def expert_map(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    index: jax.Array,
    keep: jax.Array | None,
    num_experts: int,
    d_out: int,
    block: int = 128,
) -> jax.Array:
    """Applies each row's expert to it, a block of rows of one expert at a time.

    Rows are sorted by expert and cut into blocks; a block that holds no row is skipped, and rows
    that are not kept sort last and belong to no block, so they cost nothing.

    Args:
      function: (expert scalar int, rows [block, d_in]) -> [block, d_out].
      x: [N, d_in].
      index: int [N], each row's expert.
      keep: bool [N] or None for all.
      num_experts: E.
      d_out: output features.
      block: rows a block.

    Returns:
      [N, d_out]; zeros where a row is not kept.
    """
    rows = index.shape[0]
    key = index if keep is None else jnp.where(keep, index, num_experts)
    order = jnp.argsort(key, stable=True)
    count = jnp.bincount(key, length=num_experts + 1)[:num_experts]
    first_row = jnp.cumsum(count) - count
    blocks = -(-count // block)
    last_block = jnp.cumsum(blocks)

    def one_block(out, b):
        expert = jnp.minimum(jnp.searchsorted(last_block, b, side="right"), num_experts - 1)
        within = (b - (last_block[expert] - blocks[expert])) * block + jnp.arange(block)
        valid = (within < count[expert]) & (b < last_block[-1])
        row = order[jnp.minimum(first_row[expert] + within, rows - 1)]

        def compute(out):
            y = function(expert, x[row])
            return out.at[jnp.where(valid, row, rows)].set(y.astype(out.dtype), mode="drop")

        return lax.cond(b < last_block[-1], compute, lambda out: out, out), None

    most_blocks = min(-(-rows // block) + num_experts, rows)
    out = jnp.zeros((rows, d_out), x.dtype)
    return lax.scan(one_block, out, jnp.arange(most_blocks))[0]
