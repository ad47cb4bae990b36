"""Attention to the tokens before: grouped queries, or queries to a latent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.models import rope
from mcjax.models.decoder import Heads, Latent
from mcjax.models.norms import rms_norm
from mcjax.ops import dense, dot


class Context(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      positions: int [B or 1, T].
      length: int [B], how many of them are not padding at the end; None for all.
      repeat: int [], which of the caches stacked over the repeats of a segment is the layer's.
      decoding: whether these are no prompt's tokens, so that pruning protects none of them.
    """

    positions: jax.Array
    length: jax.Array | None
    repeat: jax.Array | int = 0
    decoding: bool = False


class KeyValues(NamedTuple):
    """Keys and values of past tokens, stacked over layers; slot s holds position s.

    Attributes:
      keys: [R, B, KV, S, head_dim]. Heads come first, as attention multiplies them.
      values: likewise.
    """

    keys: jax.Array
    values: jax.Array


class Latents(NamedTuple):
    """Latents [R, B, S, rank] of past tokens and their rotated keys [R, B, S, rope.dim]."""

    latent: jax.Array
    key: jax.Array


def heads(
    spec: Heads,
    weights: Any,
    x: jax.Array,
    context: Context,
    cache: KeyValues | None,
    eps: float,
    act_bits: int | None,
) -> tuple[jax.Array, KeyValues | None, dict[str, jax.Array]]:
    """Attends to the tokens given, or with a cache to those in it and those given.

    Args:
      spec: of the attention.
      weights: of one layer, by role.
      x: [B, T, D].
      context: of the call.
      cache: of the tokens before; keys and values are put in.
      eps: of the norms of queries and keys.
      act_bits: as in `mcjax.dot`.

    Returns:
      [B, T, D], the cache, and taps: `mixer_input`, `mixer_output` and `attention`, probabilities
      [B, H, T, T or S].
    """
    batch, length, _ = x.shape
    h, kv, d = spec.heads, spec.kv_heads, spec.head_dim
    qkv = _biased(dot(x, weights["qkv"], act_bits), weights.get("qkv_bias"))
    wide = h * d * (2 if spec.gated else 1)
    q, k, v = jnp.split(qkv, [wide, wide + kv * d], axis=-1)
    q, gate = q.reshape(batch, length, h, -1), None
    if spec.gated:
        q, gate = q[..., :d], q[..., d:]
    k, v = k.reshape(batch, length, kv, d), v.reshape(batch, length, kv, d)
    if spec.qk_norm:
        q, k = rms_norm(q, weights["q_norm"], eps), rms_norm(k, weights["k_norm"], eps)
    whole = length if cache is None else cache.keys.shape[3]
    if spec.rope is not None:
        cos, sin = rope.angles(spec.rope, context.positions, whole)
        q = rope.rotate(q, cos, sin, spec.rope.interleaved)
        k = rope.rotate(k, cos, sin, spec.rope.interleaved)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    key_positions = context.positions
    if cache is not None:
        place = (
            context.repeat,
            jnp.arange(batch)[:, None, None],
            jnp.arange(kv)[None, :, None],
            context.positions[:, None],
        )
        cache = KeyValues(
            cache.keys.at[place].set(k.astype(cache.keys.dtype)),
            cache.values.at[place].set(v.astype(cache.values.dtype)),
        )
        k, v = (_own(stack, context).astype(x.dtype) for stack in cache)
        key_positions = jnp.arange(whole)[None]
    q = q.reshape(batch, length, kv, h // kv, d)
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k).astype(jnp.float32) * spec.scale
    seen = visible(context.positions, key_positions, spec.window)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if spec.sinks:
        sink = weights["sinks"].astype(jnp.float32).reshape(1, kv, h // kv, 1, 1)
        sink = jnp.broadcast_to(sink, (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    map_ = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(x.dtype)
    out = jnp.einsum("bkgts,bksd->btkgd", map_, v).reshape(batch, length, -1)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate.reshape(batch, length, -1))
    y = _biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    map_ = map_.reshape(batch, h, length, -1)
    return y, cache, {"mixer_input": x, "mixer_output": out, "attention": map_}


def latent(
    spec: Latent,
    weights: Any,
    x: jax.Array,
    context: Context,
    cache: Latents | None,
    eps: float,
    act_bits: int | None,
) -> tuple[jax.Array, Latents | None, dict[str, jax.Array]]:
    """As `heads`, to latents: keys and values are never written out, for no token of the cache.

    A head's key is ``[latent K_h, rotated]`` and its value ``latent V_h``, so its query is taken to
    the latents by K_h', and what it reads from them by V_h.
    """
    batch, length, _ = x.shape
    inner = 1e-6  # of the norms of latents, whatever the model's
    h, nope = spec.heads, spec.nope_dim
    taps = {"mixer_input": x}
    if spec.query_rank is None:
        q = dot(x, weights["q"], act_bits)
    else:
        q = _biased(dot(x, weights["q_a"], act_bits), weights.get("q_a_bias"))
        q = rms_norm(q, weights["q_norm"], inner)
        taps["query_latent"] = q
        q = dot(q, weights["q_b"], act_bits)
    q = q.reshape(batch, length, h, -1)
    kv = _biased(dot(x, weights["kv_a"], act_bits), weights.get("kv_a_bias"))
    kv, k_rope = kv[..., : spec.rank], kv[..., spec.rank :]
    kv = rms_norm(kv, weights["kv_norm"], inner)
    taps["latent"] = kv
    whole = length if cache is None else cache.latent.shape[2]
    cos, sin = rope.angles(spec.rope, context.positions, whole)
    q_rope = rope.rotate(q[..., nope:], cos, sin, spec.rope.interleaved)
    k_rope = rope.rotate(k_rope[:, :, None], cos, sin, spec.rope.interleaved)[:, :, 0]
    key_positions = context.positions
    if cache is not None:
        place = context.repeat, jnp.arange(batch)[:, None], context.positions
        cache = Latents(
            cache.latent.at[place].set(kv.astype(cache.latent.dtype)),
            cache.key.at[place].set(k_rope.astype(cache.key.dtype)),
        )
        kv, k_rope = (_own(stack, context).astype(x.dtype) for stack in cache)
        key_positions = jnp.arange(whole)[None]
    up = dense(weights["kv_b"], x.dtype).reshape(spec.rank, h, nope + spec.value_dim)
    q_latent = jnp.einsum("bthn,rhn->bthr", q[..., :nope], up[..., :nope])
    scores = jnp.einsum("bthr,bsr->bhts", q_latent, kv)
    scores = scores + jnp.einsum("bthd,bsd->bhts", q_rope, k_rope)
    scores = scores.astype(jnp.float32) * spec.scale
    seen = visible(context.positions, key_positions, None)
    map_ = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1).astype(x.dtype)
    read = jnp.einsum("bhts,bsr->bthr", map_, kv)
    out = jnp.einsum("bthr,rhv->bthv", read, up[..., nope:]).reshape(batch, length, -1)
    y = _biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    return y, cache, {**taps, "mixer_output": out, "attention": map_}


def visible(positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: bool [B or 1, T, S] of positions [B or 1, T] and [B or 1, S]."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _own(stack: jax.Array, context: Context) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, context.repeat, keepdims=False)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
