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
from mcjax.models.mixtral import Layer, route, router_logits


class LayerGrams(NamedTuple):
    """Sums over the calibration tokens that have passed through one layer.

    With w[t, e] the routing weight of expert e for token t, zero where it is not routed to, the
    experts' matrices sum (w^2 + floor) x x': the squared error of the block's output weighs each
    token by w^2, and `floor` lets every token speak a little, so that an expert that calibration
    hardly reaches has its layer's inputs to go by (ours).

    Attributes:
      attention_input: float32 [D, D], inputs of q, k and v.
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


@partial(jax.jit, static_argnames=("config",))
def lower_ranked(config: MixtralConfig, moe: Any, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """What pruning needs to know of the experts after each token's first.

    Args:
      config: for the routing.
      moe: the block's dense parameters, `router` and `experts`.
      tokens: the block's inputs [N, D].

    Returns:
      Ratios w_j / w_0 float32 [N, K - 1], sums [E, D] of ``w^2 f_e(x)`` and [E] of ``w^2``, over
      the tokens that have e at rank 1 or lower; the sums are to be added over batches.
    """
    logits = router_logits(tokens, moe["router"])
    weights, index = route(logits, config.num_experts_per_tok)
    one_hot = jax.nn.one_hot(index[:, 1:], config.num_local_experts, dtype=jnp.float32)
    share = jnp.sum(one_hot * weights[:, 1:, None], axis=1) ** 2

    def one_expert(expert):
        weight, share = expert
        hidden = jax.nn.silu(tokens @ weight["gate"]) * (tokens @ weight["up"])
        return (share @ hidden) @ weight["down"]

    total = lax.map(one_expert, (moe["experts"], share.T))
    return weights[:, 1:] / weights[:, :1], total, jnp.sum(share, axis=0)


def pruning_statistics(config: MixtralConfig, moe: Any, batches: Iterable) -> odp.PruningStatistics:
    """`mcjax.odp`'s statistics of one layer, from its block's inputs [N, D], batch by batch."""
    ratios, totals, shares = zip(*(lower_ranked(config, moe, b) for b in batches), strict=True)
    ratio = np.quantile(np.concatenate(ratios), odp.LEVELS, axis=0).T
    total, share = sum(totals), sum(shares)
    layer_mean = jnp.sum(total, axis=0) / jnp.maximum(jnp.sum(share), 1e-9)
    mean = total / jnp.where(share > 0, share, 1)[:, None]
    stand_in = jnp.where((share > 0)[:, None], mean, layer_mean)
    return odp.PruningStatistics(jnp.asarray(ratio, jnp.float32), stand_in)
