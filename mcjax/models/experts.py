"""Gated networks: one for all tokens, or routed experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mcjax import odp
from mcjax.bitplane import Planes
from mcjax.models.decoder import Activation, Dense, Routed, Routing
from mcjax.models.norms import rms_norm
from mcjax.ops import Columns, aligned, choice, device, dot, exchange, expert_map, expert_rows_dot
from mcjax.ops.adapted import plain
from mcjax.ops.columns import gathered, held
from mcjax.ops.dot import expert_product
from mcjax.ops.route import route as most_probable

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


def route(
    spec: Routing,
    logits: jax.Array,
    correction: jax.Array | None = None,
    scale: jax.Array | None = None,
):
    """Each token's experts.

    Args:
      spec: of the routing.
      logits: float32 [N, E].
      correction: float32 [E], added to scores for choosing.
      scale: float32 [E], of each expert's weights.

    Returns:
      Weights float32 [N, K], descending, and experts int32 [N, K].
    """
    plain = correction is None and scale is None and spec.groups == 1
    if spec.score == "softmax" and spec.normalise and plain:
        weights, index = most_probable(logits, spec.top_k)
        return weights * spec.scale, index
    score = jax.nn.softmax(logits, axis=-1) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    chosen_by = score if correction is None else score + correction.reshape(1, -1)
    if spec.groups > 1:
        grouped = chosen_by.reshape(*logits.shape[:1], spec.groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, spec.group_best)[0], axis=-1)
        kept = jax.lax.top_k(best, spec.groups_kept)[1]
        kept = jnp.any(kept[..., None] == jnp.arange(spec.groups), axis=1)
        chosen_by = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(logits.shape)
    _, index = jax.lax.top_k(chosen_by, spec.top_k)
    weights = jnp.take_along_axis(score, index, axis=-1)
    if spec.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + spec.floor)
    if scale is not None:
        weights = weights * scale.astype(jnp.float32)[index]
    if correction is not None or scale is not None:
        order = jnp.argsort(-weights, axis=-1, stable=True)
        weights = jnp.take_along_axis(weights, order, axis=-1)
        index = jnp.take_along_axis(index, order, axis=-1)
    return weights * spec.scale, index


def dense(spec: Dense, weights: Any, x: jax.Array, act_bits: int | None):
    """The network of every token, x [B, T, D] to [B, T, D] and taps."""
    y, hidden = one_expert(spec.activation, weights, x, act_bits)
    return y, {"block_input": x, "block_hidden": hidden}


def routed(
    spec: Routed,
    weights: Any,
    x: jax.Array,
    act_bits: int | None,
    protected: Callable[[], jax.Array] | None = None,
    before: jax.Array | None = None,
    eps: float = 1e-6,
):
    """The weighted sum of each token's experts and what all share, x [B, T, D] to [B, T, D].

    Experts of small routing weight are skipped if the weights have a `threshold`, see `mcjax.odp`.
    A `shift` [N, D] among them is added to the experts' sum, see `mcjax.importance`. With `places`
    experts are shared out among devices, see `mcjax.ops.exchange`.

    Args:
      spec: of the experts.
      weights: of one layer, by role.
      x: [B, T, D].
      act_bits: as in `mcjax.dot`.
      protected: gives bool [B, T], tokens that keep all their experts; None for none.
      before: [B, T, D], what x is normalised from, for norms of the router's and the experts' own.
      eps: of those norms.

    Returns:
      [B, T, D] and taps: `expert_input` [N, D]; of each token `experts` [N, K], `weights` [N, K],
      `router` logits [N, E] and, if experts are skipped, `keep` [N, K]; `experts_output` [N, D].
    """
    tokens = x.reshape(-1, x.shape[-1])

    def own_norm(name):
        return rms_norm(jnp.asarray(before).reshape(tokens.shape), weights[name], eps)

    unit = x.shape[-1] ** -0.5
    of_router = own_norm("router_norm") * unit if spec.routing.norm else tokens
    logits, shares, index = chosen(spec, weights, of_router)
    inputs = own_norm("experts_norm") if spec.apart else tokens
    taps = {"expert_input": inputs, "experts": index, "weights": shares, "router": logits}
    keep, rest = None, None
    if "threshold" in weights:
        marked = None if protected is None else protected().reshape(-1)
        keep = odp.keep_mask(shares, weights["threshold"], marked)
        taps["keep"] = keep
        if "slope" in weights:
            skipped = jnp.where(keep, 0, shares)
            intercept = weights["intercept"].astype(x.dtype)[index]
            rest = jnp.sum(intercept * skipped[..., None].astype(x.dtype), axis=1)
            shares = jnp.where(keep, shares, 0)
            shares = shares.at[:, 0].add(jnp.sum(weights["slope"][index] * skipped, axis=1))
        else:
            shares = odp.renormalize(shares, keep)
    flat = None if keep is None else keep.reshape(-1)
    factor = shares[..., None].astype(x.dtype)
    if spec.routing.inputs:
        inputs, factor = (inputs[:, None] * factor).reshape(-1, x.shape[-1]), 1
    experts, places = weights["experts"], weights.get("places")
    apply = partial(apply_experts, spec, experts, act_bits=act_bits)
    if places is not None:
        here = held(experts["gate"]).shape[0]
        apply = partial(exchange.by_experts, places, apply, here)
    y = apply(inputs, index.reshape(-1), flat)
    y = jnp.sum(y.reshape(*index.shape, -1) * factor, axis=1)
    y = y if places is None else exchange.total(places, inputs, y)
    y = y if rest is None else y + rest
    y = y + weights["shift"] if "shift" in weights else y
    taps["experts_output"] = y
    if spec.apart:
        y = rms_norm(y, weights["experts_after"], eps)
    if spec.shared:
        taps["shared_input"] = tokens
        shared, taps["shared_hidden"] = one_expert(
            spec.activation, weights["shared"], tokens, act_bits
        )
        if spec.shared_gate:
            gate = jnp.dot(tokens, weights["shared_gate"].astype(x.dtype))
            shared = shared * jax.nn.sigmoid(gate)
        if spec.apart:
            shared = rms_norm(shared, weights["shared_after"], eps)
        y = y + shared
    return y.reshape(x.shape), taps


def chosen(spec: Routed, weights: Any, tokens: jax.Array):
    """Logits float32 [N, E] of tokens [N, D], and their shares and experts as `route` has them."""
    logits = jnp.dot(tokens, weights["router"].astype(tokens.dtype)).astype(jnp.float32)
    if spec.routing.bias:
        logits = logits + weights["router_bias"].astype(jnp.float32).reshape(1, -1)
    correction, scale = weights.get("correction"), weights.get("expert_scale")
    return logits, *route(spec.routing, logits, correction, scale)


def apply_experts(
    spec: Routed,
    weights: Any,
    x: jax.Array,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
    product: str | None = None,
) -> jax.Array:
    """Each row by its expert.

    Args:
      spec: of the experts.
      weights: `gate`, `up`, `down` and their biases, arrays or planes [E, ...].
      x: [N / K, D], of which each row meets K experts in a row.
      index: int [N], the experts.
      keep: bool [N], which to compute; None for all.
      act_bits: as in `mcjax.dot`.
      product: as in `mcjax.dot`.

    Returns:
      [N, D]; zeros where a row is not kept.
    """
    platform = device.platform()
    x, (gate, up) = aligned(x, weights["gate"], weights["up"])  # before rows are repeated
    weights = {**weights, "gate": gate, "up": up}
    matrices: tuple[Any, ...] = gate, up, weights["down"]
    how = expert_product(index.shape[0], gate, act_bits, product)
    if (
        how == "popcount"
        and platform == "gpu"
        and spec.activation == Activation()
        and not spec.bias
        and all(isinstance(weight, Planes) for weight in matrices)
        and not weights["down"].rotated  # it rounds hidden features as they come
    ):
        from mcjax.ops import dp4a  # what it needs of Pallas is slow to import

        return dp4a.swiglu(x, matrices, index, keep, act_bits)
    rows = jnp.repeat(x, index.shape[0] // x.shape[0], axis=0)
    shared = any(isinstance(plain(weight), Columns) for weight in matrices)
    if how == "pallas" or (how == "popcount" and platform == "gpu") or shared:
        # The kernels take all experts at once, of any widths; and devices gather at once.
        def every(x, weight, bias):
            y = expert_rows_dot(x, weight, index, keep, act_bits, how)
            return y if bias is None else y + bias.astype(y.dtype)[index]

        y, _ = _gated(spec.activation, weights, rows, every)
        return y if keep is None or not spec.bias else jnp.where(keep[:, None], y, 0)
    names = tuple(name for name in _NAMES if name in weights)
    function = partial(_rows_of_one, spec.activation, act_bits, how, names)
    block = choice.expert_rows(platform, rows.shape[0], spec.experts, act_bits)
    return expert_map(function, tuple(weights[n] for n in names), rows, index, keep, block)


def one_expert(
    activation: Activation,
    weights: Mapping[str, Any],
    x: jax.Array,
    act_bits: int | None = None,
    product: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a gated network of its own weights makes of x [..., D]: that, and what down sees."""

    def multiply(x, weight, bias):
        y = dot(x, weight, act_bits, product)
        return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    return _gated(activation, weights, x, multiply)


def _gated(activation, weights, x, multiply: Callable[[Any, Any, Any], jax.Array]):
    """What a gated network makes of x, and what down sees, by ``multiply(x, weight, bias)``.

    Where each device has some columns of what is added up or multiplied, it is gathered after.
    """

    def product(name, x, local):
        weight, bias = weights[name], weights.get(f"{name}_bias")
        if local:
            return multiply(x, held(weight), held(bias))
        return multiply(x, weight, gathered(held(bias), bias))

    raising, own = (
        all(isinstance(weights[name], Columns) for name in names)
        for names in (("gate", "up"), ("down",))
    )
    hidden = activate(activation, product("gate", x, raising), product("up", x, raising))
    hidden = gathered(hidden, weights["gate"]) if raising else hidden
    y = product("down", hidden, own)
    return gathered(y, weights["down"]) if own else y, hidden


def _rows_of_one(activation, act_bits, product, names, weights, rows):
    own = dict(zip(names, weights, strict=True))
    return one_expert(activation, own, rows, act_bits, product)[0]
