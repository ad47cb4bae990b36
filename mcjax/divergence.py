"""How far one model's predictions are from another's."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def divergence(before: jax.Array, after: jax.Array) -> jax.Array:
    """Mean Kullback-Leibler divergence KL(before, after), in nats.

    Args:
      before: logits [..., classes] of what is right.
      after: logits of what is compared with it, of the same shape.

    Returns:
      float32 [], the mean over all predictions.
    """
    expected, got = (jax.nn.log_softmax(a.astype(jnp.float32)) for a in (before, after))
    possible = expected > -jnp.inf  # what cannot be adds nothing, however unlikely it becomes
    change = jnp.where(possible, expected, 0) - jnp.where(possible, got, 0)
    return jnp.mean(jnp.sum(jnp.exp(expected) * change, axis=-1))
