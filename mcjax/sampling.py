"""Drawing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among the k likeliest only.
      top_p: draw among the likeliest that together hold this probability only.
      barred: ranges [start, stop) of tokens that are never drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    barred: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and not (self.top_k is self.top_p is None):
            raise ValueError("top_k and top_p need a temperature above 0; at 0 nothing is drawn")


def allowed(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., V], -inf for barred tokens."""
    token = jnp.arange(logits.shape[-1])
    for start, stop in sampling.barred:
        logits = jnp.where((token >= start) & (token < stop), -jnp.inf, logits)
    return logits


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., V] over the temperature, -inf for tokens that are not to be drawn."""
    logits = allowed(logits, sampling).astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits >= jax.lax.top_k(logits, k)[0][..., -1:], logits, -jnp.inf)
    if sampling.top_p is not None:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        bound = jnp.min(
            jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits >= bound, logits, -jnp.inf)
    return logits


def sample(key: jax.Array | None, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws tokens int32 [...] from logits [..., V]; at temperature 0 it needs no key."""
    if sampling.temperature == 0:
        return jnp.argmax(allowed(logits, sampling), axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"drawing at temperature {sampling.temperature} needs a key")
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)
