"""Attention to latents, and the keys that an index chooses."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax import rotation
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models import rope
from mcjax.models.attention import (
    Context,
    Rule,
    attend,
    attend_cached,
    biased,
    kept_in,
    slots_of,
    tempered,
    visible,
)
from mcjax.models.decoder import Index, Latent
from mcjax.models.norms import layer_norm, rms_norm
from mcjax.ops import dense, dot
from mcjax.ops.linear import alike


class Latents(NamedTuple):
    """Of past tokens, stacked over layers.

    Attributes:
      latent: [R, B, S, rank].
      key: [R, B, S, rope.dim], rotated.
      index_key: [R, B, S, index.dim], None without an index.
    """

    latent: jax.Array
    key: jax.Array
    index_key: jax.Array | None = None


def latent(
    spec: Latent,
    weights: Any,
    x: jax.Array,
    context: Context,
    cache: Latents | None,
    eps: float,
    act_bits: int | None,
) -> tuple[jax.Array, Latents | None, dict[str, jax.Array]]:
    """As `mcjax.models.attention.heads`, to latents: keys and values are never written out.

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
        q = biased(dot(x, weights["q_a"], act_bits), weights.get("q_a_bias"))
        taps["query_latent"] = rms_norm(q, weights["q_norm"], inner)
        q = dot(taps["query_latent"], weights["q_b"], act_bits)
    q = q.reshape(batch, length, h, -1)
    kv = biased(dot(x, weights["kv_a"], act_bits), weights.get("kv_a_bias"))
    kv, k_rope = kv[..., : spec.rank], kv[..., spec.rank :]
    kv = rms_norm(kv, weights["kv_norm"], inner)
    taps["latent"] = kv
    whole = length if cache is None else cache.latent.shape[2]
    place: Any = None
    if cache is not None:
        place = context.repeat, jnp.arange(batch)[:, None], slots_of(context, length, whole, False)
    cos, sin = rope.angles(spec.rope, context.positions, whole)
    q_rope = rope.rotate(q[..., nope:], cos, sin, spec.rope.interleaved)
    k_rope = rope.rotate(k_rope[:, :, None], cos, sin, spec.rope.interleaved)[:, :, 0]
    up, turned = weights["kv_b"], False
    if isinstance(up, BitPlanes | MixedPlanes) and up.rotated:
        up, turned = up.unrotated(), True  # latents are turned instead of it, and back
    up = dense(up, x.dtype).reshape(spec.rank, h, nope + spec.value_dim)
    q_latent = jnp.einsum("bthn,rhn->bthr", q[..., :nope], up[..., :nope])
    q_latent = rotation.unrotate(q_latent) if turned else q_latent
    q = tempered(spec.temperature, jnp.concatenate([q_latent, q_rope], axis=-1), context.positions)
    q = q[:, :, None]
    chosen, index_key = None, None
    if spec.index is not None:
        old = None if cache is None else cache.index_key
        of_index = weights, x, taps["query_latent"], (cos, sin), context, old, place
        chosen, index_key = _chosen(spec.index, *of_index, act_bits)
    rule = Rule(spec.scale, chosen=chosen)
    if cache is None:
        own = kv[:, None]
        out, map_ = attend(rule, q, jnp.concatenate([own, k_rope[:, None]], -1), own, context)
    else:
        held = kept_in(cache.latent, place, kv), kept_in(cache.key, place, k_rope)
        cache = Latents(*held, index_key)

        def read(start, size):
            at = tuple(map(jnp.int32, (context.repeat, 0, start, 0)))
            own, rotated = (
                jnp.swapaxes(jax.lax.dynamic_slice(a, at, (1, batch, size, a.shape[-1])), 0, 1)
                for a in held
            )
            return jnp.concatenate([own, rotated], -1).astype(x.dtype), own.astype(x.dtype)

        out, map_ = attend_cached(rule, q, context, read, whole)
    out = rotation.rotate(out[:, :, 0]) if turned else out[:, :, 0]
    out = jnp.einsum("bthr,rhv->bthv", out, up[..., nope:]).reshape(batch, length, -1)
    y = biased(dot(out, weights["o"], act_bits), weights.get("o_bias"))
    return y, cache, taps | {"mixer_output": out, "attention": map_}


def _chosen(
    spec: Index,
    weights: Any,
    x: jax.Array,
    query_latent: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    context: Context,
    held: jax.Array | None,
    place: Any,
    act_bits: int | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of each query, bool [B, T, S] or None for all; and the cache of index keys."""
    batch, length, _ = x.shape

    def turn(y):
        return rope.rotate(y, *angles, spec.interleaved)

    q = turn(dot(query_latent, weights["index_q"], act_bits).reshape(batch, length, spec.heads, -1))
    scale, bias = weights["index_norm"], weights["index_norm_bias"]
    keys = layer_norm(dot(x, weights["index_k"], act_bits), scale, bias, 1e-6)
    keys, positions = turn(keys[:, :, None])[:, :, 0], context.positions
    if held is not None:
        held = kept_in(held, place, keys)
        keys, positions = held[context.repeat].astype(x.dtype), jnp.arange(held.shape[2])[None]
    if keys.shape[1] <= spec.top_k:
        return None, held
    share = jnp.dot(x, weights["index_weight"].astype(x.dtype)).astype(jnp.float32)
    share = share * (spec.heads * spec.dim) ** -0.5

    def add(total, head):  # head by head: the scores of all at once are many
        q, share = head
        score = jnp.einsum("btd,bsd->bts", q, keys).astype(jnp.float32)
        return total + share[..., None] * jax.nn.relu(score), None

    total = jnp.zeros((batch, length, keys.shape[1]))
    every = jnp.moveaxis(q, 2, 0), jnp.moveaxis(share, 2, 0)
    total, _ = jax.lax.scan(add, alike((total, x))[0], every)
    total = jnp.where(visible(context.positions, positions, None), total, -jnp.inf)
    best = jax.lax.top_k(total, spec.top_k)[1]
    at = jnp.arange(batch)[:, None, None], jnp.arange(length)[None, :, None], best
    return jnp.zeros(total.shape, bool).at[at].set(True), held
