"""What mixers that do not attend keep of past tokens, and the short convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.models.attention import Context, biased
from mcjax.models.decoder import Convolution
from mcjax.ops import dot


class Recurrent(NamedTuple):
    """What past tokens left, stacked over layers.

    Attributes:
      inputs: [R, B, kernel - 1, channels], the last ones, before their convolution.
      state: float32 [R, B, value_heads, key_dim, value_dim], of `Delta` alone.
    """

    inputs: jax.Array
    state: jax.Array | None = None


class Convolved(NamedTuple):
    """A causal convolution over each feature, and what it leaves.

    Attributes:
      output: [B, T, channels].
      inputs: [B, kernel - 1, channels], the last ones that are not padding.
      every: [B, T, kernel - 1, channels], the last ones after each token.
    """

    output: jax.Array
    inputs: jax.Array
    every: jax.Array


def convolve(x: jax.Array, taps: jax.Array, context: Context, cache: Recurrent | None) -> Convolved:
    """Convolves tokens x [B, T, channels] by taps [channels, kernel], going on from a cache."""
    batch, length, channels = x.shape
    kernel = taps.shape[-1]
    if cache is None:
        before = jnp.zeros((batch, kernel - 1, channels), x.dtype)
    else:
        before = cache.inputs[context.repeat].astype(x.dtype)
    x = jnp.concatenate([before, x], axis=1)
    taps = taps.astype(x.dtype)
    output = sum(x[:, i : i + length] * taps[:, i].reshape(1, 1, -1) for i in range(kernel))
    real = jnp.full(batch, length) if context.length is None else context.length
    last = real[:, None] + jnp.arange(kernel - 1)[None]
    last = jnp.take_along_axis(x, last[..., None], axis=1)
    every = x[:, jnp.arange(1, length + 1)[:, None] + jnp.arange(kernel - 1)]
    return Convolved(jnp.asarray(output), last, every)


def convolution(
    spec: Convolution,
    weights: Any,
    x: jax.Array,
    context: Context,
    cache: Recurrent | None,
    eps: float,
    act_bits: int | None,
) -> tuple[jax.Array, Recurrent | None, dict[str, Any]]:
    """Mixes tokens x [B, T, D] by `Convolution`, going on from a cache.

    Returns:
      [B, T, D], the cache, and taps: `mixer_input`, `mixer_output` and, where tokens are decoded,
      `recurrent`: what each of them leaves, [B, T, ...].
    """
    mixed = biased(dot(x, weights["bcx"], act_bits), weights.get("bcx_bias"))
    b, c, inputs = jnp.split(mixed, 3, axis=-1)
    convolved = convolve(b * inputs, weights["conv"], context, cache)
    out = c * biased(convolved.output, weights.get("conv_bias"))
    if cache is not None:
        kept = convolved.inputs.astype(cache.inputs.dtype)
        cache = Recurrent(cache.inputs.at[context.repeat].set(kept))
    seen: dict[str, Any] = {"mixer_input": x, "mixer_output": out}
    if context.decoding:
        seen["recurrent"] = Recurrent(convolved.every)
    return biased(dot(out, weights["o"], act_bits), weights.get("o_bias")), cache, seen
