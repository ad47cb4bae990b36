"""Mixtral (arXiv 2401.04088) in Flax Linen, its weights dense arrays or bit planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax import bitplane
from mcjax.models import rope
from mcjax.models.config import MixtralConfig
from mcjax.ops import dot
from mcjax.ops.dot import expert_product
from mcjax.ops.grouped import expert_map


@dataclass(frozen=True, kw_only=True)
class PlaneSpec:
    """Which widths a Mixtral's weights have; static, since array shapes follow from it.

    Attributes:
      allocation: each expert's width, [layers][experts].
      attention: width of the attention projections.
      group_size: input features that share a table entry, None for the default of each weight.
    """

    allocation: tuple[tuple[int, ...], ...]
    attention: int
    group_size: int | None = None


class RMSNorm(nn.Module):
    """Root mean square normalisation; statistics in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of x."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal, optionally in a sliding window."""

    config: MixtralConfig
    bits: int | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """X [B, T, D] and positions int [B or 1, T] to [B, T, D]."""
        c = self.config
        batch, length, _ = x.shape
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.sow("calibration", "attention_input", x)

        def project(name, x, d_out):
            return dot(x, weight(self, name, (x.shape[-1], d_out), self.bits, self.group_size))

        q = project("q", x, heads * head_dim).reshape(batch, length, heads, head_dim)
        k = project("k", x, kv_heads * head_dim).reshape(batch, length, kv_heads, head_dim)
        v = project("v", x, kv_heads * head_dim).reshape(batch, length, kv_heads, head_dim)
        cos, sin = rope.angles(c, positions, length)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)

        q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k).astype(jnp.float32) * head_dim**-0.5
        distance = positions[:, :, None] - positions[:, None, :]
        visible = distance >= 0
        if c.sliding_window is not None:
            visible &= distance < c.sliding_window
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, -1)
        self.sow("calibration", "attention_output", out)
        return project("o", out, x.shape[-1])


class Experts(nn.Module):
    """SwiGLU experts: ``down(silu(gate(x)) * up(x))``, each row by its own expert."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Rows x [N, D], their experts int [N], which to compute bool [N] or None: [N, D]."""
        c = self.config
        e, d, f = c.num_local_experts, c.hidden_size, c.intermediate_size
        gate = weight(self, "gate", (e, d, f), self.widths, self.group_size)
        up = weight(self, "up", (e, d, f), self.widths, self.group_size)
        down = weight(self, "down", (e, f, d), self.widths, self.group_size)
        return swiglu_experts(gate, up, down, x, index, keep)


def swiglu_experts(gate, up, down, x, index, keep=None):
    """``down(silu(gate(x)) * up(x))`` of each row's expert.

    Args:
      gate: weight [E, D, F]; likewise `up`; `down` is [E, F, D].
      up: see `gate`.
      down: see `gate`.
      x: [N, D].
      index: int [N].
      keep: bool [N] or None.

    Returns:
      [N, D].
    """
    num_experts = gate.shape[0]
    gate, up, down = (expert_product(w, None, x.dtype) for w in (gate, up, down))

    def one_expert(expert, rows):
        return down(expert, jax.nn.silu(gate(expert, rows)) * up(expert, rows))

    return expert_map(one_expert, x, index, keep, num_experts, x.shape[-1])


class MoE(nn.Module):
    """A block of routed experts."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, D] to the weighted sum of each token's experts, [B, T, D]."""
        c = self.config
        self.sow("calibration", "moe_input", x)
        router = self.param(
            "router", nn.initializers.lecun_normal(), (c.hidden_size, c.num_local_experts)
        )
        tokens = x.reshape(-1, c.hidden_size)
        weights, index = route(tokens, router, c.num_experts_per_tok)
        rows = jnp.repeat(tokens, c.num_experts_per_tok, axis=0)
        y = Experts(c, self.widths, self.group_size, name="experts")(rows, index.reshape(-1))
        y = y.reshape(*index.shape, -1) * weights[..., None].astype(x.dtype)
        return jnp.sum(y, axis=1).reshape(x.shape)


def route(x: jax.Array, router: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable experts of each token.

    Args:
      x: [N, D].
      router: [D, E].
      k: experts per token.

    Returns:
      Weights float32 [N, k], descending and summing to 1, and experts int32 [N, k].
    """
    logits = jnp.dot(x, router.astype(x.dtype)).astype(jnp.float32)
    weights, index = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), k)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), index


class Layer(nn.Module):
    """One transformer layer: attention and experts, each normalised before and added back."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    attention_bits: int | None = None
    group_size: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """X [B, T, D] and positions int [B or 1, T] to [B, T, D]."""
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        x = x + Attention(c, self.attention_bits, self.group_size, name="attention")(h, positions)
        h = RMSNorm(c.rms_norm_eps, name="moe_norm")(x)
        return x + MoE(c, self.widths, self.group_size, name="moe")(h)


class Mixtral(nn.Module):
    """The language model.

    Attributes:
      config: its sizes.
      planes: widths of its weights, or None for dense arrays.
      dtype: of activations and products.
    """

    config: MixtralConfig
    planes: PlaneSpec | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int [B, T] to next-token logits float [B, T, vocab]."""
        c = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size)
        )
        x = embedding[tokens].astype(self.dtype)
        positions = jnp.arange(tokens.shape[1])[None]
        for i in range(c.num_hidden_layers):
            x = layer(c, self.planes, i)(x, positions)
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        if c.tie_word_embeddings:
            return x @ embedding.T.astype(x.dtype)
        head = self.param("head", nn.initializers.lecun_normal(), (c.hidden_size, c.vocab_size))
        return x @ head.astype(x.dtype)


def layer(config: MixtralConfig, planes: PlaneSpec | None, i: int) -> Layer:
    """The i-th layer's module, named as `Mixtral` names it."""
    if planes is None:
        return Layer(config, name=f"layer_{i}")
    return Layer(
        config, planes.allocation[i], planes.attention, planes.group_size, name=f"layer_{i}"
    )


def weight(module: nn.Module, name: str, shape, widths, group_size):
    """A module's weight parameter: a dense array, or planes of the given width or widths."""
    if widths is None:
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(shape) - 2)))
        return module.param(name, init, shape)
    if isinstance(widths, int):
        return module.param(name, lambda key: bitplane.empty(shape, widths, group_size))
    every = tuple(sorted(set(widths)))
    return module.param(name, lambda key: bitplane.empty(shape, every, group_size).slice(widths))
