"""Gram matrices of a layer's inputs, made fit to quantise with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def condition(gram: jax.Array, damping: float = 0.01) -> jax.Array:
    """Damps a Gram matrix and fills in what calibration never reached.

    The mean of the diagonal becomes 1 and `damping` is added to it; a matrix of zeros (an expert
    that no token was routed to, where nothing better is known) becomes the identity.

    Args:
      gram: float [..., d_in, d_in], positive semidefinite.
      damping: fraction of the mean diagonal added to the diagonal.

    Returns:
      float32 of the same shape, positive definite.
    """
    gram = gram.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    identity = jnp.eye(gram.shape[-1], dtype=jnp.float32)
    scaled = gram / jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, scaled + damping * identity, identity)


def pad(gram: jax.Array, d_in: int) -> jax.Array:
    """Extends a conditioned [..., n, n] to [..., d_in, d_in]: padded features nearly free."""
    extra = d_in - gram.shape[-1]
    if extra == 0:
        return gram
    widths = [(0, 0)] * (gram.ndim - 2) + [(0, extra), (0, extra)]
    tail = jnp.where(jnp.arange(d_in) < gram.shape[-1], 0.0, 1e-3)
    return jnp.pad(gram, widths) + jnp.diag(tail)
