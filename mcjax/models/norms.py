"""Normalisation of features."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """``scale x / sqrt(mean(x^2) + eps)`` over the last axis, computed in float32, of x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    if scale is None:
        return wide.astype(x.dtype)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """``scale (x - mean(x)) / sqrt(var(x) + eps) + bias`` over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    scale, bias = (
        a.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,)) for a in (scale, bias)
    )
    return (wide * scale + bias).astype(x.dtype)
