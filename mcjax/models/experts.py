"""Gated networks: one for all tokens, or routed experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mcjax.models.decoder import Activation, Dense, Routed, Routing
from mcjax.ops import choice, dot, expert_map

_NAMES = ("gate", "up", "gate_bias", "up_bias", "down_bias", "down")


def activate(spec: Activation, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Joins gate and up as `Activation` says."""
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    if spec.kind == "gelu_tanh":
        act = jax.nn.gelu(gate, approximate=True)
    else:
        act = gate * jax.nn.sigmoid(spec.alpha * gate)
    return (up + spec.shift) * act


def route(spec: Routing, logits: jax.Array, correction: jax.Array | None = None):
    """Each token's experts.

    Args:
      spec: of the routing.
      logits: float32 [N, E].
      correction: float32 [E], added to scores for choosing.

    Returns:
      Weights float32 [N, K], descending, and experts int32 [N, K].
    """
    score = jax.nn.softmax(logits, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    chosen_by = score if correction is None else score + correction.reshape(1, -1)
    if spec.groups > 1:
        grouped = chosen_by.reshape(len(logits), spec.groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        kept = jax.lax.top_k(best, spec.groups_kept)[1]
        kept = jnp.any(kept[..., None] == jnp.arange(spec.groups), axis=1)
        chosen_by = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(logits.shape)
    _, index = jax.lax.top_k(chosen_by, spec.top_k)
    weights = jnp.take_along_axis(score, index, axis=-1)
    if correction is not None:
        order = jnp.argsort(-weights, axis=-1, stable=True)
        weights = jnp.take_along_axis(weights, order, axis=-1)
        index = jnp.take_along_axis(index, order, axis=-1)
    if spec.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * spec.scale, index


def dense(spec: Dense, weights: Any, x: jax.Array, act_bits: int | None):
    """The network of every token, x [B, T, D] to [B, T, D] and taps."""
    y, hidden = _network(spec.activation, act_bits, weights, x)
    return y, {"block_input": x, "block_hidden": hidden}


def routed(spec: Routed, weights: Any, x: jax.Array, act_bits: int | None):
    """The weighted sum of each token's experts and what all share, x [B, T, D] to [B, T, D].

    Returns:
      [B, T, D] and taps: `block_input`, and of each token `experts` [N, K] and `weights` [N, K].
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.dot(tokens, weights["router"].astype(x.dtype)).astype(jnp.float32)
    if spec.routing.bias:
        logits = logits + weights["router_bias"].astype(jnp.float32).reshape(1, -1)
    correction = weights.get("correction")
    shares, index = route(spec.routing, logits, correction)
    k = spec.routing.top_k
    names = tuple(name for name in _NAMES if name in weights["experts"])
    function = partial(_one_expert, spec.activation, act_bits, names)
    rows = jnp.repeat(tokens, k, axis=0)
    block = choice.expert_rows(jax.default_backend(), len(rows), spec.experts, act_bits)
    own = tuple(weights["experts"][name] for name in names)
    y = expert_map(function, own, rows, index.reshape(-1), None, block)
    y = y.reshape(-1, k, x.shape[-1]) * shares[..., None].astype(x.dtype)
    y = jnp.sum(y, axis=1)
    taps = {"block_input": x, "experts": index, "weights": shares, "logits": logits}
    if spec.shared:
        shared, taps["shared_hidden"] = _network(
            spec.activation, act_bits, weights["shared"], tokens
        )
        if spec.shared_gate:
            gate = jnp.dot(tokens, weights["shared_gate"].astype(x.dtype))
            shared = shared * jax.nn.sigmoid(gate)
        y = y + shared
    return y.reshape(x.shape), taps


def _network(activation, act_bits, weights, x):
    multiply = partial(dot, x, act_bits=act_bits)
    hidden = activate(activation, multiply(weights["gate"]), multiply(weights["up"]))
    return dot(hidden, weights["down"], act_bits), hidden


def _one_expert(activation, act_bits, names, weights, rows):
    own = dict(zip(names, weights, strict=True))

    def product(name, x):
        y = dot(x, own[name], act_bits)
        bias = own.get(f"{name}_bias")
        return y if bias is None else y + bias.astype(y.dtype).reshape(1, -1)

    return product("down", activate(activation, product("gate", rows), product("up", rows)))
