"""Dedicated GPTQ (arXiv 2210.17323): one width at a time, the baseline that nested codes face."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mcjax.quantize.nested import inverse_factor


@partial(jax.jit, static_argnames="group_size")
def gptq(
    w: jax.Array, gram: jax.Array, *, bits: jax.typing.ArrayLike, group_size: int
) -> jax.Array:
    """Quantises one matrix at one width with full error compensation.

    A group's grid is found when the pass reaches it, on the weights as compensated so far:
    asymmetric min-max with a clip search, at 1 bit the mean plus or minus the mean magnitude about
    it. Scales stay in float32, so the comparison favours this baseline.

    Args:
      w: float32 [d_in, d_out], d_in a multiple of `group_size`.
      gram: float32 [d_in, d_in], positive definite.
      bits: 1 to 8, an integer that may be traced.
      group_size: input features that share a grid.

    Returns:
      The dequantised weight, float32 [d_in, d_out].
    """
    d_in, d_out = w.shape
    factor = inverse_factor(gram)

    def one_group(w, g):
        start = g * group_size
        block = lax.dynamic_slice_in_dim(w, start, group_size, axis=0)
        rows = lax.dynamic_slice_in_dim(factor, start, group_size, axis=0)
        corner = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        low, step = grid(block, bits)

        def one_feature(block, i):
            value = round_to_grid(block[i], low, step, bits)
            error = (block[i] - value) / corner[i, i]
            return block - corner[i][:, None] * error, (value, error)

        _, (values, errors) = lax.scan(one_feature, block, jnp.arange(group_size))
        return w - rows.T @ errors, values

    _, values = lax.scan(one_group, w, jnp.arange(d_in // group_size))
    return values.reshape(d_in, d_out)


def grid(w: jax.Array, bits: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The lowest level and the step, each [d_out], of a uniform grid for w [group_size, d_out]."""
    mean = jnp.mean(w, axis=0)
    magnitude = jnp.mean(jnp.abs(w - mean), axis=0)
    low, high = jnp.minimum(w.min(axis=0), 0), jnp.maximum(w.max(axis=0), 0)

    def clipped(fraction):
        step = fraction * (high - low) / _span(bits)
        zero = jnp.round(-fraction * low / jnp.where(step > 0, step, 1))
        start = -zero * step
        error = jnp.sum((w - round_to_grid(w, start, step, bits)) ** 2, axis=0)
        return error, start, step

    errors, starts, steps = jax.vmap(clipped)(jnp.linspace(0.3, 1.0, 15))
    best = jnp.argmin(errors, axis=0)[None]
    start, step = (jnp.take_along_axis(a, best, axis=0)[0] for a in (starts, steps))
    one = jnp.asarray(bits) == 1
    return jnp.where(one, mean - magnitude, start), jnp.where(one, 2 * magnitude, step)


def _span(bits):
    return (1 << jnp.asarray(bits, jnp.int32)) - 1


def round_to_grid(w, low, step, bits):
    """The nearest of the 2**bits levels ``low + i step``."""
    level = jnp.round((w - low) / jnp.where(step > 0, step, 1))
    return low + step * jnp.clip(level, 0, _span(bits))
