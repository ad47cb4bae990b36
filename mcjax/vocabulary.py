"""The part of a large vocabulary that predictions are about, and predictions within it.

A softmax over 262144 tokens costs more than a small model's layers. Nearly all that a model says of
some text is about a few thousand of them; what trains or measures compares predictions given that
the next token is one of those.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.divergence import divergence as logits_divergence
from mcjax.models.decoder import Decoder
from mcjax.models.language_model import predict

MOST = 8192
"""Tokens of the vocabulary that predictions are compared over, at most."""

ASKED = 256
"""Tokens of text whose predictions choose these, at most."""


def head_of(decoder: Decoder, outside: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    """The last norm, and the head's rows float32 [K, D] of the likeliest tokens.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      x: what the last layer gives, float [..., D], in the model as it was.
    """
    norm, head = (outside[name] for name in ("norm", "embedding" if decoder.tied else "head"))
    if decoder.vocab_size > MOST:
        head = head[np.asarray(likeliest(decoder, norm, head, x))]
    return norm, jnp.asarray(head, jnp.float32)


def likeliest(decoder: Decoder, norm: Any, head: Any, x: Any) -> jax.Array:
    """The `MOST` tokens of most probability on average over the predictions of some of x."""
    rows = x.reshape(-1, x.shape[-1])
    some = rows[:: max(1, len(rows) // ASKED)][:ASKED]
    return _likeliest(decoder, jnp.asarray(norm), jnp.asarray(head), jnp.asarray(some))


@partial(jax.jit, static_argnums=0)
def _likeliest(decoder: Decoder, norm, head, x):
    logits = predict(decoder, norm, head, x[None])[0].astype(jnp.float32)
    return jax.lax.top_k(jnp.mean(jax.nn.softmax(logits), axis=0), MOST)[1]


def log_probabilities(decoder: Decoder, norm, head, x: jax.Array) -> jax.Array:
    """Of the tokens that a head's rows are of, [B, T, K] from x [B, T, D]."""
    return jax.nn.log_softmax(predict(decoder, norm, head, x).astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def divergence(decoder: Decoder, norm, head, x, target) -> jax.Array:
    """Mean divergence of the predictions of x [B, T, D] from the target's, nats a token.

    Args:
      decoder: the model.
      norm: its last norm.
      head: float32 [K, D], from `head_of`.
      x: what the last layer gives.
      target: what it should.
    """
    expected, got = (predict(decoder, norm, head, y) for y in (target, x))
    return logits_divergence(expected, got)
