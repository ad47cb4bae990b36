"""Attention to the tokens before, by blocks; grouped queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.models import rope
from mcjax.models.decoder import Heads, QKNorm, Temperature
from mcjax.models.norms import rms_norm
from mcjax.ops import Adapted, Columns, dot
from mcjax.ops.columns import within
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
    """Keys and values of past tokens, stacked over layers.

    Slot s holds position s or, where a window is much shorter than the text, the last position p
    with ``p % S = s``: S is then `DRAFTED` more than the window.

    Attributes:
      keys: [R, B, KV, S, head_dim]. Heads come first, as attention multiplies them.
      values: likewise.
    """

    keys: jax.Array
    values: jax.Array


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
    kv, d = spec.kv_heads, spec.head_dim
    whole = length if cache is None else cache.keys.shape[3]
    q, k, v, gate = _projected(spec, weights, x, context.positions, whole, eps, act_bits)
    axis = heads_axis(spec, weights["qkv"])
    if axis is not None:
        kv //= jax.lax.axis_size(axis)
        first = kv * jax.lax.axis_index(axis)
    sinks = None
    if spec.sinks:
        sinks = weights["sinks"].astype(jnp.float32).reshape(1, spec.kv_heads, -1, 1)
    if axis is not None:  # this device's

        def own(a, at):
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, first, kv, at)

        q, k, v, sinks = own(q, 2), own(k, 1), own(v, 1), own(sinks, 1)
    rule = Rule(spec.scale, spec.window, spec.chunked, sinks)
    if cache is None:
        out, map_ = attend(rule, q, k, v, context)
    else:

        def read(start, size):
            at = tuple(map(jnp.int32, (context.repeat, 0, 0, start, 0)))
            own = (jax.lax.dynamic_slice(a, at, (1, batch, kv, size, d))[0] for a in held)
            return tuple(a.astype(x.dtype) for a in own)

        held, slots = cache, cache.keys.shape[3]
        ring = spec.window is not None and slots == spec.window + DRAFTED
        if ring:
            out, map_ = attend_ring(rule, q, k, v, context, read, slots)
            # What is read must not be written before.
            k, v, out = jax.lax.optimization_barrier((k, v, out))
        place = (
            context.repeat,
            jnp.arange(batch)[:, None, None],
            jnp.arange(kv)[None, :, None],
            slots_of(context, length, slots, ring)[:, None],
        )
        held = cache = KeyValues(kept_in(cache.keys, place, k), kept_in(cache.values, place, v))
        if not ring:
            out, map_ = attend_cached(rule, q, context, read, slots)
    if axis is not None:
        gather = partial(jax.lax.all_gather, axis_name=axis, tiled=True, to="invarying")
        out, map_ = gather(out, axis=2), None if map_ is None else gather(map_, axis=1)
    out = out.reshape(batch, length, -1)
    if gate is not None:
        out = out * jax.nn.sigmoid(gate.reshape(batch, length, -1))
    y = biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    return y, cache, taps | {"mixer_output": out, "attention": map_}


def heads_axis(spec: Heads, qkv: Any) -> str | None:
    """The axis of a mesh along which heads are shared out, if they are.

    They are where the columns of `qkv` are and keys' heads divide evenly.
    """
    qkv = qkv.weight if isinstance(qkv, Adapted) else qkv
    if not isinstance(qkv, Columns) or not within(qkv.axis):
        return None
    return None if spec.kv_heads % jax.lax.axis_size(qkv.axis) else qkv.axis


def _projected(spec: Heads, weights: Any, x, positions, whole: int, eps: float, act_bits):
    """Queries [B, T, KV, G, d], keys and values [B, KV, T, d], and gates [B, T, H, d] or None."""
    batch, length, _ = x.shape
    h, kv, d = spec.heads, spec.kv_heads, spec.head_dim
    qkv = biased(dot(x, weights["qkv"], act_bits), weights.get("qkv_bias"))
    wide = h * d * (2 if spec.gated else 1)
    q, k = qkv[..., :wide], qkv[..., wide : wide + kv * d]
    v = k if spec.shared_values else qkv[..., wide + kv * d :]
    q, gate = q.reshape(batch, length, h, -1), None
    if spec.gated:
        q, gate = q[..., :d], q[..., d:]
    k, v = k.reshape(batch, length, kv, d), v.reshape(batch, length, kv, d)

    def both_normed(norm: QKNorm, q, k):
        def one(x, name):
            scale = weights[f"{name}_norm"] if norm.scale else None
            rows = x if norm.over == "head" else x.reshape(batch, length, -1)
            return rms_norm(rows, scale, eps).reshape(x.shape)

        return one(q, "q"), one(k, "k")

    if spec.qk_norm and not spec.qk_norm.rotated:
        q, k = both_normed(spec.qk_norm, q, k)
    if spec.clip is not None:
        q, k, v = (jnp.clip(a, -spec.clip, spec.clip) for a in (q, k, v))
    if spec.value_norm:
        v = rms_norm(v, None, eps)
    if spec.rope is not None:
        cos, sin = rope.angles(spec.rope, positions, whole)
        q = rope.rotate(q, cos, sin, spec.rope.interleaved)
        k = rope.rotate(k, cos, sin, spec.rope.interleaved)
    if spec.qk_norm and spec.qk_norm.rotated:
        q, k = both_normed(spec.qk_norm, q, k)
    q = tempered(spec.temperature, q, positions).reshape(batch, length, kv, h // kv, d)
    return q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), gate


def tempered(spec: Temperature | None, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Queries [B, T, H, d] times their temperatures."""
    if spec is None:
        return q
    far = jnp.floor((positions + spec.shift).astype(jnp.float32) / spec.length)
    return q * (1 + spec.scale * jnp.log1p(far))[..., None, None].astype(q.dtype)


def kept_in(cache: jax.Array, place: Any, value: jax.Array) -> jax.Array:
    """A cache with values put where `place` says; beyond it none are."""
    return cache.at[place].set(value.astype(cache.dtype), mode="drop")


KEYS = 256
"""Keys that cached attention reads at once."""

DRAFTED = 16
"""Most tokens that a draft may have: so many slots a ring has beyond its window, see
`attend_ring`."""

QUERIES = 512
"""Queries that attention without a cache computes at once."""

_NEVER = 1 << 30
"""A position that no query sees."""


class Rule(NamedTuple):
    """``softmax(scale q k' [+ sink]) v`` over the keys before, at most `window` of them.

    Attributes:
      scale: multiplies the scores.
      window: see `Heads`.
      chunked: see `Heads`.
      sinks: float32 [1, KV, G, 1], None for none.
      chosen: bool [B, T, S], keys of each query, None for all.
    """

    scale: float
    window: int | None = None
    chunked: bool = False
    sinks: jax.Array | None = None
    chosen: jax.Array | None = None


def attend(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array | None]:
    """Attention among the tokens of a call, so that few queries' scores are there at once.

    Args:
      rule: of the scores.
      q: [B, T, KV, G, d].
      k: [B, KV, T, d].
      v: [B, KV, T, dv].
      context: of the call.

    Returns:
      [B, T, KV, G, dv]; and if the context wants it probabilities [B, KV * G, T, T], else None.
    """
    positions, (batch, length) = context.positions, q.shape[:2]

    def rows(q, at, chosen):
        return _dense(rule._replace(chosen=chosen), q, k, v, at, positions)

    if context.mapped or length <= QUERIES:
        out, weights = rows(q, positions, rule.chosen)
        return out, _map(weights, length) if context.mapped else None
    # Derivatives compute a block's scores again rather than keep those of all.
    count = -(-length // QUERIES)
    more = count * QUERIES - length

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, more), *[(0, 0)] * (a.ndim - 2)), mode="edge")
        return jnp.moveaxis(a.reshape(a.shape[0], count, QUERIES, *a.shape[2:]), 1, 0)

    blocks = jax.tree.map(cut, (q, positions, rule.chosen))
    out = jax.lax.map(jax.checkpoint(lambda block: rows(*block)[0]), blocks)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length], None


Read = Callable[[Any, int], tuple[jax.Array, jax.Array]]
"""From a first slot and a number of them to keys [B, KV, size, d] and values [B, KV, size, dv]."""


def attend_cached(
    rule: Rule, q: jax.Array, context: Context, read: Read, slots: int
) -> tuple[jax.Array, jax.Array | None]:
    """As `attend`, to a cache where slot s holds position s, with the tokens of the call in it."""
    positions, length = context.positions, q.shape[1]
    if context.mapped:
        out, weights = _dense(rule, q, *read(0, slots), positions, jnp.arange(slots)[None])
        first = jnp.int32(positions[0, 0])
        return out, jax.lax.dynamic_slice_in_dim(_map(weights, slots), first, length, axis=-1)
    blocks = _blocks(positions, slots, read, lambda at: at[None])
    return _online(rule, q, positions, blocks, _begin(rule, q, blocks)), None


def attend_ring(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: Context,
    read: Read,
    slots: int,
) -> tuple[jax.Array, jax.Array | None]:
    """As `attend`, to the tokens of the call and a ring of those before, position p in slot p % S.

    Of a position that two drafts wrote, the slot holds the later; a ring that is longer than the
    window by as many tokens as a draft has never misses one that is still seen.
    """
    positions = context.positions
    last = positions[:, :1] - 1  # before the call

    def held(at):
        position = last - (last - at[None]) % slots
        return jnp.where(position >= 0, position, _NEVER)

    if context.mapped:
        before = read(0, slots)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in zip(before, (k, v), strict=True))
        at = held(jnp.arange(slots, dtype=positions.dtype))
        own = jnp.broadcast_to(positions, (at.shape[0], positions.shape[1]))
        out, weights = _dense(rule, q, keys, values, positions, jnp.concatenate([at, own], 1))
        return out, _map(weights, slots + q.shape[1])[..., slots:]
    blocks = _blocks(jnp.minimum(last, slots - 1), slots, read, held)
    begun = _fold(rule, q, k, v, positions, positions, _begin(rule, q, blocks))
    return _online(rule, q, positions, blocks, begun), None


class _Blocks(NamedTuple):
    """Slots in blocks: how many, and from an index the first slot, keys, values and positions."""

    number: jax.Array
    read: Callable


def _blocks(positions, slots: int, read: Read, held: Callable) -> _Blocks:
    """Those up to the last of the slots `positions`."""
    size = min(KEYS, slots)
    last = jnp.clip(jnp.max(positions), -1, slots - 1).astype(jnp.int32)

    def one(i):
        # The last block overlaps the one before it where blocks do not divide the slots.
        start = jnp.minimum(i * size, slots - size)
        at = start + jnp.arange(size, dtype=jnp.int32)
        return start, *read(start, size), jnp.where((at >= i * size)[None], held(at), _NEVER)

    return _Blocks(last // size + 1, one)


def _begin(rule: Rule, q, blocks: _Blocks):
    """Greatest score, sum of exponentials and sum of values of no keys yet, but for the sinks."""
    batch, length, kv, group, _ = q.shape
    values = jax.eval_shape(blocks.read, jnp.int32(0))[2].shape[-1]
    shape = (batch, kv, group, length)
    if rule.sinks is None:
        most, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    else:
        most, total = jnp.broadcast_to(rule.sinks, shape), jnp.ones(shape)
    return most, total, jnp.zeros((*shape, values))


def _fold(rule: Rule, q, k, v, positions, key_positions, carry):
    """Adds keys to a softmax that is kept up to date."""
    most, total, out = carry
    scores = _scores(rule, q, k, positions, key_positions)
    new = jnp.maximum(most, jnp.max(scores, axis=-1))
    finite = jnp.where(jnp.isfinite(new), new, 0)
    part = jnp.exp(scores - finite[..., None])
    fade = jnp.exp(most - finite)
    total = total * fade + jnp.sum(part, axis=-1)
    more = jnp.einsum("bkgts,bksd->bkgtd", part.astype(v.dtype), v).astype(jnp.float32)
    return new, total, out * fade[..., None] + more


def _online(rule: Rule, q, positions, blocks: _Blocks, carry) -> jax.Array:
    def block(i, carry):
        start, k, v, key_positions = blocks.read(i)
        own = rule
        if rule.chosen is not None:
            some = jax.lax.dynamic_slice_in_dim(rule.chosen, start, k.shape[2], axis=2)
            own = rule._replace(chosen=some)
        return _fold(own, q, k, v, positions, key_positions, carry)

    carry = alike((carry, q, positions))[0]
    _, total, out = jax.lax.fori_loop(jnp.int32(0), blocks.number, block, carry)
    # A query beyond the last slot sees none that is its own; what it gives means nothing.
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return jnp.moveaxis(out, 3, 1).astype(q.dtype)


def _scores(rule: Rule, q, k, positions, key_positions):
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k).astype(jnp.float32) * rule.scale
    seen = visible(positions, key_positions, rule.window, rule.chunked)
    if rule.chosen is not None:
        seen &= rule.chosen
    return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _dense(rule: Rule, q, k, v, positions, key_positions):
    """The result [B, T, KV, G, dv] and all probabilities [B, KV, G, T, S]."""
    scores = _scores(rule, q, k, positions, key_positions)
    if rule.sinks is not None:
        sinks = jnp.broadcast_to(rule.sinks[..., None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]].astype(q.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", weights, v), weights


def _map(weights: jax.Array, keys: int) -> jax.Array:
    batch, kv, group, length, _ = weights.shape
    return weights.reshape(batch, kv * group, length, keys)


def slots_of(context: Context, length: int, slots: int, ring: bool) -> jax.Array:
    """Where each token's keys go, int [B or 1, T]; beyond the cache those that are not kept.

    They are padding, and in a ring tokens whose slot a later one of the same call takes.
    """
    number = jnp.arange(length, dtype=context.positions.dtype)[None]
    real = length if context.length is None else context.length[:, None]
    kept = number < real
    if not ring:
        return jnp.where(kept, context.positions, slots)
    return jnp.where(kept & (number >= real - slots), context.positions % slots, slots)


def visible(
    positions: jax.Array, key_positions: jax.Array, window: int | None, chunked: bool = False
) -> jax.Array:
    """Which keys a query sees: bool [B or 1, T, S] of positions [B or 1, T] and [B or 1, S]."""
    query, key = positions[:, :, None], key_positions[:, None, :]
    seen = query >= key
    if window is None:
        return seen
    return seen & (query // window == key // window if chunked else query - key < window)


def biased(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Y with a bias on its last axis, if there is one."""
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
