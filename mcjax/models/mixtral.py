"""Mixtral (arXiv 2401.04088) in Flax Linen, its weights dense arrays or bit planes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax import bitplane, odp
from mcjax.models import rope
from mcjax.models.config import MixtralConfig
from mcjax.ops import choice, dot, expert_rows_dot, narrow_dot
from mcjax.ops.dot import expert_product
from mcjax.ops.grouped import expert_map
from mcjax.ops.route import route


@dataclass(frozen=True, kw_only=True)
class PlaneSpec:
    """Which widths a Mixtral's weights have; static, since array shapes follow from it.

    Attributes:
      allocation: each expert's width, [layers][experts].
      attention: width of the attention projections.
      group_size: input features that share a table entry, None for the default of each weight.
      draft: most planes of an expert that are read, None for all that it holds; experts that are
        wider hold the table of this width too, see `mcjax.speculate`.
    """

    allocation: tuple[tuple[int, ...], ...]
    attention: int
    group_size: int | None = None
    draft: int | None = None


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


class Cache(NamedTuple):
    """Keys and values of one layer's past tokens; slot s holds position s.

    Attributes:
      keys: [B, KV, S, head_dim], S the longest sequence. Heads come first, as attention multiplies
        them, so that no step transposes the values of the whole cache.
      values: likewise.
    """

    keys: jax.Array
    values: jax.Array


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, causal, optionally in a sliding window."""

    config: MixtralConfig
    bits: int | None = None
    group_size: int | None = None
    act_bits: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, jax.Array, Cache | None]:
        """Attends to the tokens given, or with a cache to those in it and those given.

        Args:
          x: [B, T, D].
          positions: int [B or 1, T].
          cache: of the tokens before; keys and values are put in at `positions`.

        Returns:
          [B, T, D], attention probabilities [B, H, T, T or S], and the new cache.
        """
        c = self.config
        batch, length, _ = x.shape
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.sow("calibration", "attention_input", x)

        def project(name, x, d_out):
            planes = weight(self, name, (x.shape[-1], d_out), self.bits, self.group_size)
            return dot(x, planes, self.act_bits)

        qkv = project("qkv", x, (heads + 2 * kv_heads) * head_dim)
        qkv = qkv.reshape(batch, length, -1, head_dim)
        whole = length if cache is None else cache.keys.shape[2]
        own = rope.Rope(config=c.rope, dim=head_dim, longest=c.max_position_embeddings)
        cos, sin = rope.angles(own, positions, whole)
        qk = rope.rotate(qkv[:, :, : heads + kv_heads], cos, sin)
        q, k = qk[:, :, :heads], jnp.swapaxes(qk[:, :, heads:], 1, 2)
        v = jnp.swapaxes(qkv[:, :, heads + kv_heads :], 1, 2)
        key_positions = positions
        if cache is not None:
            place = (
                jnp.arange(batch)[:, None, None],
                jnp.arange(kv_heads)[:, None],
                positions[:, None],
            )
            cache = Cache(
                cache.keys.at[place].set(k.astype(cache.keys.dtype)),
                cache.values.at[place].set(v.astype(cache.values.dtype)),
            )
            k, v = cache.keys.astype(x.dtype), cache.values.astype(x.dtype)
            key_positions = jnp.arange(whole)[None]

        q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.einsum("btkgd,bksd->bkgts", q, k).astype(jnp.float32) * head_dim**-0.5
        distance = positions[:, :, None] - key_positions[:, None, :]
        visible = distance >= 0
        if c.sliding_window is not None:
            visible &= distance < c.sliding_window
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bkgts,bksd->btkgd", weights, v).reshape(batch, length, -1)
        self.sow("calibration", "attention_output", out)
        return (
            project("o", out, x.shape[-1]),
            weights.reshape(batch, heads, length, -1),
            cache,
        )


class Experts(nn.Module):
    """SwiGLU experts: ``down(silu(gate(x)) * up(x))``, each row by its own expert."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    group_size: int | None = None
    act_bits: int | None = None
    draft: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, index: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Rows x [N, D] or as in `swiglu_experts`, experts int [N], which to compute: [N, D]."""
        c = self.config
        e, d, f = c.num_local_experts, c.hidden_size, c.intermediate_size
        gate = weight(self, "gate", (e, d, f), self.widths, self.group_size, self.draft)
        up = weight(self, "up", (e, d, f), self.widths, self.group_size, self.draft)
        down = weight(self, "down", (e, f, d), self.widths, self.group_size, self.draft)
        return swiglu_experts(gate, up, down, x, index, keep, self.act_bits, self.draft)


def swiglu_experts(gate, up, down, x, index, keep=None, act_bits=None, draft=None, product=None):
    """``down(silu(gate(x)) * up(x))`` of each row's expert.

    Args:
      gate: weight [E, D, F]; likewise `up`; `down` is [E, F, D].
      up: see `gate`.
      down: see `gate`.
      x: [N, D], or [N / K, D] where each row meets K experts in a row.
      index: int [N].
      keep: bool [N] or None.
      act_bits: as in `mcjax.dot`.
      draft: most planes of an expert to read, None for all.
      product: as in `mcjax.dot`.

    Returns:
      [N, D].
    """
    platform = jax.default_backend()
    how = expert_product(len(index), gate, act_bits, product)
    if how == "popcount" and platform == "gpu":
        from mcjax.ops import dp4a  # what it needs of Pallas is slow to import

        return dp4a.swiglu(x, (gate, up, down), index, keep, act_bits, draft)
    x = jnp.repeat(x, len(index) // len(x), axis=0)
    if how == "pallas" and draft is None:
        # The kernels take all experts at once, of any widths.
        each = partial(expert_rows_dot, index=index, keep=keep, act_bits=act_bits, product=how)
        return each(jax.nn.silu(each(x, gate)) * each(x, up), down)
    rows = partial(_swiglu, act_bits, draft, how)
    block = choice.expert_rows(platform, x.shape[0], gate.shape[0], act_bits)
    return expert_map(rows, (gate, up, down), x, index, keep, block)


def _swiglu(act_bits, draft, product, weights, rows):
    if draft is not None:  # of one expert, inside the loop: slicing all of them would copy them
        weights = [planes.slice(min(draft, planes.bits)) for planes in weights]
    gate, up, down = weights
    multiply = partial(dot, act_bits=act_bits, product=product)
    return multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)


class MoE(nn.Module):
    """A block of routed experts, pruned by `mcjax.odp` if `prune` names a policy."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    group_size: int | None = None
    act_bits: int | None = None
    prune: str | None = None
    draft: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, protected: jax.Array | None = None) -> jax.Array:
        """X [B, T, D] to the weighted sum of each token's experts, [B, T, D].

        `protected` bool [B, T] marks tokens whose experts are all computed.
        """
        c = self.config
        self.sow("calibration", "moe_input", x)
        router = self.param(
            "router", nn.initializers.lecun_normal(), (c.hidden_size, c.num_local_experts)
        )
        tokens = x.reshape(-1, c.hidden_size)
        logits = router_logits(tokens, router)
        self.sow("router", "logits", logits)
        weights, index = route(logits, c.num_experts_per_tok)
        keep, rest = None, jnp.zeros((), x.dtype)
        if self.prune is not None:
            ranks = c.num_experts_per_tok - 1
            threshold = self.param("threshold", nn.initializers.zeros, (ranks,))
            flat = None if protected is None else protected.reshape(-1)
            keep = odp.keep_mask(weights, threshold, flat)
            self.sow("odp", "keep", keep)
            if self.prune == "paper":
                weights = odp.renormalize(weights, keep)
            else:
                shape = (c.num_local_experts, c.hidden_size)
                intercept = self.param("intercept", nn.initializers.zeros, shape).astype(x.dtype)
                slope = self.param("slope", nn.initializers.zeros, shape[:1])
                skipped = jnp.where(keep, 0, weights)
                rest = jnp.sum(intercept[index] * skipped[..., None].astype(x.dtype), axis=1)
                weights = jnp.where(keep, weights, 0)
                weights = weights.at[:, 0].add(jnp.sum(slope[index] * skipped, axis=1))
        experts = Experts(
            c, self.widths, self.group_size, self.act_bits, self.draft, name="experts"
        )
        y = experts(tokens, index.reshape(-1), None if keep is None else keep.reshape(-1))
        y = y.reshape(*index.shape, -1) * weights[..., None].astype(x.dtype)
        return (jnp.sum(y, axis=1) + rest).reshape(x.shape)


def router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """Each expert's logit for tokens x [N, D] by router [D, E]: float32 [N, E]."""
    return jnp.dot(x, router.astype(x.dtype)).astype(jnp.float32)


class Layer(nn.Module):
    """One transformer layer: attention and experts, each normalised before and added back."""

    config: MixtralConfig
    widths: tuple[int, ...] | None = None
    attention_bits: int | None = None
    group_size: int | None = None
    act_bits: int | None = None
    prune: str | None = None
    draft: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        length: jax.Array | None = None,
        decoding: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """X [B, T, D] at positions int [B or 1, T] to [B, T, D] and the cache with them in it.

        `length` int [B] is the number of tokens that are not padding, None for all. `decoding`
        tells that these are no prompt's, so that pruning protects none.
        """
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        attention = Attention(
            c, self.attention_bits, self.group_size, self.act_bits, name="attention"
        )
        y, weights, cache = attention(h, positions, cache)
        x = x + y
        protected = None
        if self.prune is not None and not decoding:
            first = 0 if cache is None else positions[0, 0]
            among = jax.lax.dynamic_slice_in_dim(weights, first, x.shape[1], axis=-1)
            protected = odp.protect(odp.token_importance(x, among, length))
        h = RMSNorm(c.rms_norm_eps, name="moe_norm")(x)
        moe = MoE(
            c, self.widths, self.group_size, self.act_bits, self.prune, self.draft, name="moe"
        )
        return x + moe(h, protected), cache


class Mixtral(nn.Module):
    """The language model.

    Attributes:
      config: its sizes.
      planes: widths of its weights, or None for dense arrays.
      dtype: of activations and products.
      act_bits: None, or 8 or 16 bits to round activations to, see `mcjax.dot`.
      prune: None, or a policy of `mcjax.odp`, for which each layer's `moe` holds a `threshold`
        and, with "affine", a `slope` and an `intercept`.
    """

    config: MixtralConfig
    planes: PlaneSpec | None = None
    dtype: Any = jnp.float32
    act_bits: int | None = None
    prune: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: tuple[Cache, ...] | None = None,
        length: jax.Array | None = None,
        only: jax.Array | None = None,
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: int [B, T].
          positions: int [B or 1, T]; None counts from 0. Given without `length`, the tokens are
            decoded, and pruning protects none of them, however many they are.
          cache: one `Cache` a layer, see `empty_cache`.
          length: int [B], how many of these tokens of a prompt are not padding at the end; None for
            all. With positions int [1, T] that count on from a chunk of the prompt read before,
            pruning protects the most important of each chunk.
          only: int [B], the one token of each sequence whose logits are wanted; None for all.

        Returns:
          Logits [B, T, vocab], T being 1 with `only`; with a cache also the cache with these tokens
          in it.
        """
        c = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size)
        )
        x = embedding[tokens].astype(self.dtype)
        decoding = positions is not None and length is None
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        caches = []
        for i in range(c.num_hidden_layers):
            own = layer(c, self.planes, i, self.act_bits, self.prune)
            x, new = own(x, positions, None if cache is None else cache[i], length, decoding)
            caches.append(new)
        if only is not None:
            x = jnp.take_along_axis(x, only[:, None, None], axis=1)
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        table = embedding
        if not c.tie_word_embeddings:
            init = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
            table = self.param("head", init, (c.vocab_size, c.hidden_size))
        logits = narrow_dot(x.reshape(-1, c.hidden_size), table).reshape(*x.shape[:-1], -1)
        return logits if cache is None else (logits, tuple(caches))

    def empty_cache(self, batch: int, length: int) -> tuple[Cache, ...]:
        """Room for `length` tokens of `batch` sequences."""
        return empty_cache(self.config, batch, length, self.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(
    config: MixtralConfig, batch: int, length: int, dtype: Any = jnp.float32
) -> tuple[Cache, ...]:
    """Room for `length` tokens of `batch` sequences in every layer."""
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    return tuple(
        Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for _ in range(config.num_hidden_layers)
    )


def layer(
    config: MixtralConfig,
    planes: PlaneSpec | None,
    i: int,
    act_bits: int | None = None,
    prune: str | None = None,
) -> Layer:
    """The i-th layer's module, named as `Mixtral` names it."""
    name = f"layer_{i}"
    if planes is None:
        return Layer(config, prune=prune, name=name)
    widths, attention, group_size = planes.allocation[i], planes.attention, planes.group_size
    return Layer(config, widths, attention, group_size, act_bits, prune, planes.draft, name=name)


def weight(module: nn.Module, name: str, shape, widths, group_size, draft=None):
    """A module's weight parameter: a dense array, or planes of the given width or widths."""
    if widths is None:
        init = nn.initializers.lecun_normal(batch_axis=tuple(range(len(shape) - 2)))
        return module.param(name, init, shape)
    if isinstance(widths, int):
        return module.param(name, lambda key: bitplane.empty(shape, widths, group_size))
    return module.param(name, lambda key: bitplane.empty_experts(shape, widths, group_size, draft))
