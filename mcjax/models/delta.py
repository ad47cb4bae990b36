"""The gated delta rule, a recurrent mixer of tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mcjax.models.attention import Context
from mcjax.models.decoder import Delta
from mcjax.models.norms import rms_norm
from mcjax.models.recurrent import Recurrent, convolve
from mcjax.ops import dot
from mcjax.ops.linear import alike


def delta(
    spec: Delta,
    weights: Any,
    x: jax.Array,
    context: Context,
    cache: Any,
    eps: float,
    act_bits: int | None,
) -> tuple[jax.Array, Recurrent | None, dict[str, jax.Array]]:
    """Mixes tokens x [B, T, D] by `Delta`'s recurrence, going on from a cache.

    Padding changes nothing: its decay is 1 and its rate 0, and the convolution's inputs that are
    kept are the last before it.

    Returns:
      [B, T, D], the cache, and taps: `mixer_input`, `mixer_output` and, where
      tokens are decoded, `recurrent`: what each of them leaves, [B, T, ...].
    """
    batch, length, _ = x.shape
    kh, vh, dk, dv = spec.key_heads, spec.value_heads, spec.key_dim, spec.value_dim
    each = vh // kh  # heads of values that one of keys serves
    mixed = dot(x, weights["qkvz"], act_bits).reshape(batch, length, kh, -1)
    q, k, v, z = jnp.split(mixed, [dk, 2 * dk, 2 * dk + each * dv], axis=-1)
    rates = dot(x, weights["ba"], act_bits).reshape(batch, length, kh, 2, each)
    rates = rates.astype(jnp.float32)
    beta, a = (rates[:, :, :, i].reshape(batch, length, vh) for i in range(2))
    inputs = jnp.concatenate([y.reshape(batch, length, -1) for y in (q, k, v)], axis=-1)

    if cache is None:
        state = jnp.zeros((batch, vh, dk, dv), jnp.float32)
    else:
        state = cache.state[context.repeat]
    convolved = convolve(inputs, weights["conv"], context, cache)
    qkv = jax.nn.silu(convolved.output).astype(jnp.float32)
    q, k, v = jnp.split(qkv, [kh * dk, 2 * kh * dk], axis=-1)
    q, k = (_unit(y.reshape(batch, length, kh, dk)) for y in (q, k))
    q, k = (jnp.repeat(y, each, axis=2) for y in (q * dk**-0.5, k))
    v = v.reshape(batch, length, vh, dv)

    beta = jax.nn.sigmoid(beta)
    bias = weights["dt_bias"].astype(jnp.float32).reshape(1, 1, -1)
    speed = jnp.exp(weights["decay"].astype(jnp.float32)).reshape(1, 1, -1)
    log_decay = -speed * jax.nn.softplus(a + bias)
    if context.length is not None:
        real = (jnp.arange(length)[None] < context.length[:, None])[..., None]
        beta, log_decay = jnp.where(real, beta, 0), jnp.where(real, log_decay, 0)

    def step(state, token):
        q, k, v, decay, beta = token
        state = state * decay[..., None, None]
        change = (v - jnp.einsum("bhkv,bhk->bhv", state, k)) * beta[..., None]
        state = state + k[..., :, None] * change[..., None, :]
        kept = state if context.decoding else None  # of a prompt, far too many
        return state, (jnp.einsum("bhkv,bhk->bhv", state, q), kept)

    by_token = tuple(jnp.moveaxis(y, 1, 0) for y in (q, k, v, jnp.exp(log_decay), beta))
    state = alike((state, by_token))[0]
    state, (out, states) = jax.lax.scan(step, state, by_token)
    out = jnp.moveaxis(out, 0, 1).astype(x.dtype)
    out = rms_norm(out, weights["norm"], eps)
    out = out * jax.nn.silu(z.reshape(batch, length, vh, dv).astype(jnp.float32)).astype(x.dtype)
    out = out.reshape(batch, length, -1)
    if cache is not None:
        kept = convolved.inputs.astype(cache.inputs.dtype)
        cache = Recurrent(
            cache.inputs.at[context.repeat].set(kept),
            cache.state.at[context.repeat].set(state),
        )
    y = dot(out, weights["o"], act_bits)
    seen: dict[str, Any] = {"mixer_input": x, "mixer_output": out}
    if states is not None:
        seen["recurrent"] = Recurrent(convolved.every, jnp.moveaxis(states, 0, 1))
    return y, cache, seen


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
