"""Attention to the tokens before: grouped queries, or queries to a latent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.models import rope
from mcjax.models.decoder import Heads, Latent
from mcjax.models.norms import rms_norm
from mcjax.ops import dense, dot
from mcjax.ops.linear import alike


class Context(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
      positions: int [B or 1, T].
      length: int [B], how many of them are not padding at the end; None for all.
      repeat: int [], which of the caches stacked over the repeats of a segment is the layer's.
      decoding: whether these are no prompt's tokens, so that pruning protects none of them.
      mapped: whether the probabilities of attention are wanted, which blocks never write out.
    """

    positions: jax.Array
    length: jax.Array | None
    repeat: jax.Array | int = 0
    decoding: bool = False
    mapped: bool = False


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
      [B, T, D], the cache, and taps: `mixer_input`, `mixer_output` and, if the context wants it,
      `attention`, probabilities [B, H, T, T or S].
    """
    batch, length, _ = x.shape
    taps: dict[str, Any] = {"mixer_input": x}
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

    held: Any = cache

    def keys(start, size):
        return k[:, :, start : start + size], v[:, :, start : start + size]

    def cached(start, size):
        at = tuple(map(jnp.int32, (context.repeat, 0, 0, start, 0)))
        return tuple(
            jax.lax.dynamic_slice(stack, at, (1, batch, kv, size, d))[0].astype(x.dtype)
            for stack in held
        )

    q = q.reshape(batch, length, kv, h // kv, d)
    sinks = None
    if spec.sinks:
        sinks = weights["sinks"].astype(jnp.float32).reshape(1, kv, h // kv, 1)
    rule = Rule(spec.scale, spec.window, sinks)
    out, map_ = attend(rule, q, keys if cache is None else cached, whole, context, cache is None)
    out = out.reshape(batch, length, -1)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate.reshape(batch, length, -1))
    y = _biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    return y, cache, taps | {"mixer_output": out, "attention": map_}


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
    taps: dict[str, Any] = {"mixer_input": x}
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
    if cache is not None:
        place = context.repeat, jnp.arange(batch)[:, None], context.positions
        cache = Latents(
            cache.latent.at[place].set(kv.astype(cache.latent.dtype)),
            cache.key.at[place].set(k_rope.astype(cache.key.dtype)),
        )

    held: Any = cache

    def keys(start, size):
        some = slice(start, start + size)
        return jnp.concatenate([kv[:, None, some], k_rope[:, None, some]], -1), kv[:, None, some]

    def cached(start, size):
        at = tuple(map(jnp.int32, (context.repeat, 0, start, 0)))
        own, rotated = (
            jax.lax.dynamic_slice(a, at, (1, batch, size, a.shape[-1])).astype(x.dtype)
            for a in held
        )
        own, rotated = (jnp.swapaxes(a, 0, 1) for a in (own, rotated))
        return jnp.concatenate([own, rotated], axis=-1), own

    up = dense(weights["kv_b"], x.dtype).reshape(spec.rank, h, nope + spec.value_dim)
    q_latent = jnp.einsum("bthn,rhn->bthr", q[..., :nope], up[..., :nope])
    q = jnp.concatenate([q_latent, q_rope], axis=-1)[:, :, None]
    rule = Rule(spec.scale, None, None)
    read, map_ = attend(rule, q, keys if cache is None else cached, whole, context, cache is None)
    out = jnp.einsum("bthr,rhv->bthv", read[:, :, 0], up[..., nope:]).reshape(batch, length, -1)
    y = _biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    return y, cache, taps | {"mixer_output": out, "attention": map_}


KEYS = 256
"""Keys that cached attention reads at once."""

QUERIES = 512
"""Queries that attention without a cache computes at once."""


class Rule(NamedTuple):
    """``softmax(scale q k' [+ sink]) v`` over the keys before, at most `window` of them.

    Attributes:
      scale: multiplies the scores.
      window: see `Heads`.
      sinks: float32 [1, KV, G, 1], None for none.
    """

    scale: float
    window: int | None
    sinks: jax.Array | None


def attend(
    rule: Rule, q: jax.Array, read: Any, whole: int, context: Context, fresh: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Attention by blocks, so that no more than a block's scores are there at once.

    Args:
      rule: of the scores.
      q: [B, T, KV, G, d].
      read: (start, size) to keys [B, KV, size, d] and values [B, KV, size, dv] in slots from
        `start` on.
      whole: number of slots.
      context: of the call.
      fresh: whether slots hold the tokens of this call, rather than each the token at its position.

    Returns:
      [B, T, KV, G, dv]; and if the context wants it probabilities [B, KV * G, T, whole], else None.
    """
    positions = context.positions
    if not fresh and not context.mapped:
        return _online(rule, q, read, whole, positions), None
    k, v = read(0, whole)
    key_positions = positions if fresh else jnp.arange(whole)[None]

    def rows(q, positions):
        weights = _probabilities(rule, q, k, positions, key_positions)
        return jnp.einsum("bkgts,bksd->btkgd", weights, v), weights

    batch, length = q.shape[:2]
    if context.mapped or length <= QUERIES:
        out, weights = rows(q, positions)
        if not context.mapped:
            return out, None
        return out, weights.reshape(batch, -1, length, whole)
    # Derivatives compute a block's scores again rather than keep those of all.
    count = -(-length // QUERIES)
    more = count * QUERIES - length
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)))
    at = jnp.pad(positions, ((0, 0), (0, more)), mode="edge")
    blocks = (
        jnp.moveaxis(q.reshape(batch, count, QUERIES, *q.shape[2:]), 1, 0),
        jnp.moveaxis(at.reshape(len(at), count, QUERIES), 1, 0),
    )
    out = jax.lax.map(jax.checkpoint(lambda block: rows(*block)[0]), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length], None


def _scores(rule: Rule, q, k, positions, key_positions):
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k).astype(jnp.float32) * rule.scale
    seen = visible(positions, key_positions, rule.window)
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _probabilities(rule: Rule, q, k, positions, key_positions):
    scores = _scores(rule, q, k, positions, key_positions)
    if rule.sinks is not None:
        sinks = jnp.broadcast_to(rule.sinks[..., None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    return jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(q.dtype)


def _online(rule: Rule, q, read, whole: int, positions):
    """Over blocks of the slots that some query can see, with a softmax that is kept up to date."""
    size = min(KEYS, whole)
    first = jnp.int32(0)
    if rule.window is not None:
        first = jnp.maximum(jnp.min(positions) - rule.window + 1, 0).astype(jnp.int32) // size
    last = jnp.minimum(jnp.max(positions), whole - 1).astype(jnp.int32) // size + 1

    def block(i, carry):
        most, total, out = carry
        # The last block overlaps the one before it where blocks do not divide the slots.
        start = jnp.minimum(i * size, whole - size)
        slots = start + jnp.arange(size, dtype=jnp.int32)
        k, v = read(start, size)
        scores = _scores(rule, q, k, positions, slots[None])
        scores = jnp.where(slots >= i * size, scores, -jnp.inf)
        new = jnp.maximum(most, jnp.max(scores, axis=-1))
        finite = jnp.where(jnp.isfinite(new), new, 0)
        part = jnp.exp(scores - finite[..., None])
        fade = jnp.exp(most - finite)
        total = total * fade + jnp.sum(part, axis=-1)
        read_now = jnp.einsum("bkgts,bksd->bkgtd", part.astype(v.dtype), v)
        return new, total, out * fade[..., None] + read_now.astype(jnp.float32)

    batch, length, kv, group, _ = q.shape
    shape = (batch, kv, group, length)
    values = jax.eval_shape(lambda: read(0, size))[1].shape[-1]
    if rule.sinks is None:
        most, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    else:
        most, total = jnp.broadcast_to(rule.sinks, shape), jnp.ones(shape)
    carry = alike(((most, total, jnp.zeros((*shape, values))), q, positions))[0]
    _, total, out = jax.lax.fori_loop(first, last, block, carry)
    # A query beyond the last slot sees none that is its own; what it gives means nothing.
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 3, 1).astype(q.dtype)


def visible(positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees: bool [B or 1, T, S] of positions [B or 1, T] and [B or 1, S]."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
