"""What calibration text says of a layer: Gram matrices of its inputs, use of its experts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mcjax import odp
from mcjax.bitplane import BitPlanes
from mcjax.models.config import MixtralConfig
from mcjax.models.mixtral import Layer, route, router_logits, swiglu_experts

STAND_IN_FLOOR = 1e-3
"""How much of its layer's moments each expert's stand-in is fitted on as well."""

STAND_IN_TRUST = 0.75
"""How far from the published rule (slope 1, intercept 0) towards its fit a stand-in goes: the whole
way is no better where calibration text is like the text served, and worse where a model knows its
calibration text by heart, see benchmarks/README.md."""


class LayerGrams(NamedTuple):
    """Sums over the calibration tokens that have passed through one layer.

    With w[t, e] the routing weight of expert e for token t, zero where it is not routed to, the
    experts' matrices sum (w^2 + floor) x x': the squared error of the block's output weighs each
    token by w^2, and `floor` lets every token speak a little, so that an expert that calibration
    hardly reaches has its layer's inputs to go by (ours).

    Attributes:
      attention_input: float32 [D, D], inputs of qkv.
      attention_output: float32 [Q, Q], inputs of o.
      expert_input: float32 [E, D, D], inputs of gate and up.
      expert_hidden: float32 [E, F, F], inputs of down.
      frequency: float32 [E], tokens routed to each expert.
      routing_weight: float32 [E], sum of w.
      tokens: float32 [], all tokens.
    """

    attention_input: jax.Array
    attention_output: jax.Array
    expert_input: jax.Array
    expert_hidden: jax.Array
    frequency: jax.Array
    routing_weight: jax.Array
    tokens: jax.Array


def empty_grams(config: MixtralConfig) -> LayerGrams:
    """Sums over no tokens."""
    d, f, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    q = config.num_attention_heads * config.head_dim
    shapes = ((d, d), (q, q), (e, d, d), (e, f, f), (e,), (e,), ())
    return LayerGrams(*(jnp.zeros(shape, jnp.float32) for shape in shapes))


def capture(layer: Layer, params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs a layer and keeps what calibration needs.

    Args:
      layer: the module.
      params: its parameters.
      x: hidden states [B, T, D].

    Returns:
      The layer's output [B, T, D]; `attention_input` [B, T, D], `attention_output` [B, T, Q] and
      `moe_input` [B, T, D].
    """
    positions = jnp.arange(x.shape[1])[None]
    (y, _), seen = layer.apply({"params": params}, x, positions, mutable=["calibration"])
    seen = seen["calibration"]
    return y, {
        "attention_input": seen["attention"]["attention_input"][0],
        "attention_output": seen["attention"]["attention_output"][0],
        "moe_input": seen["moe"]["moe_input"][0],
    }


@partial(jax.jit, static_argnames=("layer", "floor"), donate_argnames="grams")
def accumulate(
    layer: Layer, params: Any, x: jax.Array, grams: LayerGrams, floor: float
) -> tuple[LayerGrams, jax.Array]:
    """Adds one batch of hidden states x [B, T, D] to the sums; also returns the MoE's input."""
    c = layer.config
    _, seen = capture(layer, params, x)
    tokens = seen["moe_input"].reshape(-1, c.hidden_size)
    weight = combine_weights(tokens, params["moe"]["router"], c)
    experts = params["moe"]["experts"]

    def one_expert(expert):
        gate, up, weight = expert
        share = weight**2 + floor
        hidden = jax.nn.silu(tokens @ gate) * (tokens @ up)
        return (tokens.T * share) @ tokens, (hidden.T * share) @ hidden

    expert_input, expert_hidden = lax.map(one_expert, (experts["gate"], experts["up"], weight.T))

    def gram(a):
        a = a.reshape(-1, a.shape[-1])
        return a.T @ a

    batch = LayerGrams(
        gram(seen["attention_input"]),
        gram(seen["attention_output"]),
        expert_input,
        expert_hidden,
        jnp.sum(weight > 0, axis=0, dtype=jnp.float32),
        jnp.sum(weight, axis=0),
        jnp.float32(tokens.shape[0]),
    )
    return jax.tree.map(jnp.add, grams, batch), seen["moe_input"]


def combine_weights(tokens: jax.Array, router: jax.Array, config: MixtralConfig) -> jax.Array:
    """Routing weights [N, E] of tokens [N, D], zero where an expert is not routed to."""
    weights, index = route(router_logits(tokens, router), config.num_experts_per_tok)
    one_hot = jax.nn.one_hot(index, config.num_local_experts, dtype=jnp.float32)
    return jnp.sum(one_hot * weights[..., None], axis=1)


@partial(jax.jit, static_argnames=("config",))
def expert_errors(
    config: MixtralConfig,
    moe: Any,
    planes: dict[str, BitPlanes],
    tokens: jax.Array,
) -> jax.Array:
    """Squared change of the MoE block's output when one expert alone is served at one width.

    Args:
      config: for the routing.
      moe: the block's dense parameters, `router` and `experts`.
      planes: `gate`, `up` and `down` with a table for each width.
      tokens: the block's inputs [N, D].

    Returns:
      float32 [E, widths]: ``sum_t (w_te ||f_e(x_t) - f_e,k(x_t)||)^2``, to be added over batches;
      the Frobenius norm of PMQ is its square root.
    """
    weight = combine_weights(tokens, moe["router"], config)
    widths = planes["gate"].widths

    def output(gate, up, down):
        return (jax.nn.silu(tokens @ gate) * (tokens @ up)) @ down

    def one_expert(expert):
        dense, planes, weight = expert
        exact = output(dense["gate"], dense["up"], dense["down"])

        def error(k):
            at = {name: p.slice(k).dequantize() for name, p in planes.items()}
            change = output(at["gate"], at["up"], at["down"]) - exact
            return jnp.sum(weight**2 * jnp.sum(change**2, axis=-1))

        return jnp.stack([error(k) for k in widths])

    return lax.map(one_expert, (moe["experts"], planes, weight.T))


class _Moments(NamedTuple):
    """Sums with weight w^2 over tokens that have e at rank 1 or lower; f0 is their first's output.

    Attributes:
      share: [E], of 1.
      output: [E, D], of f_e.
      first: [E, D], of f0.
      cross: [E], of f_e . f0.
      square: [E], of f0 . f0.
    """

    share: Any
    output: Any
    first: Any
    cross: Any
    square: Any


@partial(jax.jit, static_argnames=("config",))
def _lower_ranked(config: MixtralConfig, moe: Any, tokens: jax.Array):
    """Ratios w_j / w_0 [N, K - 1] and `_Moments` of tokens [N, D]."""
    k = config.num_experts_per_tok
    weights, index = route(router_logits(tokens, moe["router"]), k)
    e = moe["experts"]
    rows = jnp.repeat(tokens, k, axis=0)
    f = swiglu_experts(e["gate"], e["up"], e["down"], rows, index.reshape(-1))
    f = f.reshape(*index.shape, -1)
    first, rest = f[:, :1], f[:, 1:]
    one_hot = jax.nn.one_hot(index[:, 1:], config.num_local_experts, dtype=jnp.float32)
    share = one_hot * weights[:, 1:, None] ** 2  # [N, K - 1, E]

    def total(value):
        value = jnp.broadcast_to(value, (*share.shape[:2], value.shape[-1]))
        return jnp.einsum("tje,tjd->ed", share, value)

    moments = _Moments(
        jnp.sum(share, axis=(0, 1)),
        total(rest),
        total(first),
        total(jnp.sum(rest * first, axis=-1, keepdims=True))[:, 0],
        total(jnp.sum(first**2, axis=-1, keepdims=True))[:, 0],
    )
    return weights[:, 1:] / weights[:, :1], moments


def pruning_statistics(config: MixtralConfig, moe: Any, batches: Iterable) -> odp.PruningStatistics:
    """`mcjax.odp`'s statistics of one layer.

    Args:
      config: for the routing.
      moe: the block's dense parameters, `router` and `experts`.
      batches: the block's inputs [N, D].

    Returns:
      Thresholds and the fits that stand in for skipped experts.
    """
    ratios, moments = zip(*(_lower_ranked(config, moe, b) for b in batches), strict=True)
    ratio = np.quantile(np.concatenate(ratios), odp.LEVELS, axis=0).T
    m = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *moments)
    m = jax.tree.map(lambda a: a + STAND_IN_FLOOR * np.sum(a, axis=0, keepdims=True), m)
    share = np.maximum(m.share, 1e-12)
    output, first = m.output / share[:, None], m.first / share[:, None]
    cross = m.cross / share - np.sum(output * first, axis=1)
    square = m.square / share - np.sum(first**2, axis=1)
    slope = cross / np.maximum(square, 1e-12)
    intercept = output - slope[:, None] * first
    trust = STAND_IN_TRUST
    return odp.PruningStatistics(ratio, trust * slope + (1 - trust), trust * intercept)
