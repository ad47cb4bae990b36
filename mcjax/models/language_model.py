"""A described model as a function of tokens, and as a Flax Linen module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mcjax import odp
from mcjax.models import experts, weights
from mcjax.models.attention import DRAFTED, Context, KeyValues, heads
from mcjax.models.decoder import Convolution, Decoder, Delta, Dense, Heads, Latent, Layer
from mcjax.models.delta import delta
from mcjax.models.latent import Latents, latent
from mcjax.models.norms import rms_norm
from mcjax.models.recurrent import Recurrent, convolution
from mcjax.models.rope import STRETCHED
from mcjax.ops import Columns, narrow_dot
from mcjax.ops.columns import held, within
from mcjax.ops.fragments import is_made, put_together
from mcjax.ops.linear import automatic, axes_of
from mcjax.sharding import Sharding, cache_partition, divided, partition

SOWN = ("router", "experts", "keep", "recurrent")
"""Taps that come back as collections of their names: logits of routers, the
experts that they chose, what pruning kept, and recurrent states after every token."""

_MIXERS: dict[type, Any] = {
    Heads: heads,
    Latent: latent,
    Convolution: convolution,
    Delta: delta,
}


def run_layer(
    spec: Layer,
    own: Any,
    x: jax.Array,
    context: Context,
    cache: Any = None,
    eps: float = 1e-6,
    act_bits: int | None = None,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """One layer.

    Args:
      spec: of the layer.
      own: its weights, nested dicts as `mcjax.models.weights.roles` names them.
      x: [B, T, D].
      context: where the tokens stand.
      cache: of the segment's layers of this structure, None for none.
      eps: of norms.
      act_bits: as in `mcjax.dot`.

    Returns:
      [B, T, D], the cache with these tokens in it, and taps: what each product saw, by name.
    """

    def normed(name, x):
        return rms_norm(x, own[name], eps) if name in own else x

    h = normed("mixer_norm", x)
    mixer = _MIXERS[type(spec.mixer)]
    y, cache, taps = mixer(spec.mixer, own["mixer"], h, context, cache, eps, act_bits)
    x = x + spec.residual * normed("mixer_after", y)
    h = normed("block_norm", x)
    if isinstance(spec.block, Dense):
        y, more = experts.dense(spec.block, own["block"], h, act_bits)
    else:
        protected = None if context.decoding else partial(_protected, x, context, taps)
        y, more = experts.routed(spec.block, own["block"], h, act_bits, protected, x, eps)
    x = x + spec.residual * normed("block_after", y)
    if spec.scaled:
        x = x * own["scale"].astype(x.dtype).reshape(1, 1, 1)
    return x, cache, {**taps, **more}


def embed(decoder: Decoder, params: Any, tokens: Any, dtype: Any) -> jax.Array:
    """What enters the first layer: tokens int [B, T] to [B, T, D] of `dtype`."""
    table = params["embedding"]
    if isinstance(table, Columns) and within(table.axis):  # each device has some tokens' rows
        rows = table.weight
        at = tokens - len(rows) * jax.lax.axis_index(table.axis)
        own = rows[jnp.clip(at, 0, len(rows) - 1)]
        x = jnp.where(((at >= 0) & (at < len(rows)))[..., None], own, 0).astype(dtype)
        x = jax.lax.psum(x, table.axis)
    else:
        x = held(table)[tokens].astype(dtype)
    if decoder.embedding_scale != 1:
        x = x * jnp.asarray(decoder.embedding_scale, dtype)
    return x


def predict(decoder: Decoder, norm: jax.Array, head: jax.Array, x: jax.Array) -> jax.Array:
    """Logits [B, T, rows of the head] of what leaves the last layer, x [B, T, D].

    On a mesh they are those of the rows that this device has.
    """
    x = rms_norm(x, norm, decoder.norm_eps)
    logits = narrow_dot(x.reshape(-1, decoder.width), head).reshape(*x.shape[:-1], -1)
    if decoder.logit_scale != 1:
        logits = logits * decoder.logit_scale
    if decoder.logit_cap is not None:
        logits = decoder.logit_cap * jnp.tanh(logits / decoder.logit_cap)
    return logits


def _protected(x, context: Context, taps) -> jax.Array:
    """The tokens [B, T] of a prompt whose experts are all computed, see `mcjax.odp`."""
    attention = taps.get("attention")
    return odp.protect(odp.token_importance(x, attention, context.length))


def forward(
    decoder: Decoder,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: Any = None,
    length: jax.Array | None = None,
    only: jax.Array | None = None,
    *,
    dtype: Any = jnp.float32,
    act_bits: int | None = None,
    taps: Sequence[str] = (),
    shared: Sharding | None = None,
    remat: bool = False,
) -> tuple[jax.Array, Any, dict[str, Any]]:
    """Next-token logits; see `LanguageModel.__call__`.

    Returns:
      Logits, the cache, and the `taps` asked for: of each name nested dicts like the parameters',
      with arrays [R, ...] for the layers that have it.
    """
    run = partial(_forward, decoder, dtype=dtype, act_bits=act_bits, taps=tuple(taps), remat=remat)
    if shared is not None:
        params = divided(decoder, params, shared)
        batch = shared.batch_spec(tokens.shape[0])
        rows = PartitionSpec(batch)
        of_cache = None if cache is None else cache_partition(decoder, cache, shared, batch)
        head = params["embedding" if decoder.tied else "head"]
        columns = head.axis if isinstance(head, Columns) else None
        of_logits = PartitionSpec(batch, None, columns)
        of_positions = PartitionSpec() if positions is None or len(positions) == 1 else rows
        return jax.shard_map(
            run,
            mesh=shared.mesh,
            in_specs=(partition(decoder, params, shared), rows, of_positions, of_cache, rows, rows),
            out_specs=(of_logits, of_cache, PartitionSpec(None, batch)),
        )(params, tokens, positions, cache, length, only)

    def specs():
        of_logits = PartitionSpec(*jax.typeof(tokens).sharding.spec, None)
        return of_logits, jax.tree.map(lambda a: jax.typeof(a).sharding.spec, cache), {}

    return automatic(run, params, tokens, positions, cache, length, only, result=specs)


def _forward(
    decoder, params, tokens, positions, cache, length, only, *, dtype, act_bits, taps, remat
):
    decoding = positions is not None and length is None
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    positions = jnp.asarray(positions).astype(jnp.int32)
    outside = {role.path[0]: params[role.path[0]] for role in weights.rest(decoder)}
    shared = axes_of(tokens)
    outside = put_together(outside, dtype, shared)
    x = embed(decoder, outside, tokens, dtype)
    cache = dict(cache) if cache is not None else None
    tapped: dict[str, Any] = {}
    for s, segment in enumerate(decoder.segments):
        name = weights.segment_name(s)
        apart, together = weights.split_stacks(params[name])

        def period(carry, own, segment=segment, together=together):
            x, kept = carry
            own, repeat = own
            own = put_together(together(own), dtype, shared)
            pruned = any("threshold" in own[key]["block"] for key in own)
            context = Context(positions, length, repeat, decoding, pruned and not decoding)
            wanted: dict[str, Any] = {}
            for member, spec in enumerate(segment.period):
                key = weights.layer_name(member)
                before = None if kept is None else kept[key]
                x, new, seen = run_layer(
                    spec, own[key], x, context, before, decoder.norm_eps, act_bits
                )
                kept = None if kept is None else {**kept, key: new}
                for tap in taps:
                    if tap in seen:
                        weights.put(wanted, (tap, key), seen[tap])
            return (x, kept), wanted

        # What is put together for a layer is so again on the way back, and the layer with it: no
        # policy of `jax.checkpoint` keeps what arrays are used for, but not the arrays.
        if remat or any(map(is_made, jax.tree.leaves(params[name], is_leaf=is_made))):
            period = jax.checkpoint(period)
        carry = (x, None if cache is None else cache[name])
        every = apart, jnp.arange(segment.repeats, dtype=jnp.int32)
        (x, kept), wanted = jax.lax.scan(period, carry, every)
        for tap, values in wanted.items():
            weights.put(tapped, (tap, name), values)
        if cache is not None:
            cache[name] = kept
    if only is not None:
        x = jnp.take_along_axis(x, only[:, None, None], axis=1)
    head = outside["embedding" if decoder.tied else "head"]
    return predict(decoder, outside["norm"], held(head), x), cache, tapped


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(decoder: Decoder, batch: int, length: int, dtype: Any = jnp.float32) -> Any:
    """Room for `length` tokens of `batch` sequences in every layer."""

    def of_layer(mixer, repeats):
        if isinstance(mixer, Heads):
            slots = length
            fixed = mixer.rope is None or mixer.rope.config.rope_type not in STRETCHED
            if mixer.window is not None and fixed:
                slots = min(length, mixer.window + DRAFTED)
            shape = (repeats, batch, mixer.kv_heads, slots, mixer.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        if isinstance(mixer, Latent):
            room = (repeats, batch, length)
            return Latents(
                jnp.zeros((*room, mixer.rank), dtype),
                jnp.zeros((*room, mixer.rope.dim), dtype),
                None if mixer.index is None else jnp.zeros((*room, mixer.index.dim), dtype),
            )
        if isinstance(mixer, Convolution):
            return Recurrent(jnp.zeros((repeats, batch, mixer.kernel - 1, decoder.width), dtype))
        inputs = (repeats, batch, mixer.kernel - 1, mixer.channels)
        state = (repeats, batch, mixer.value_heads, mixer.key_dim, mixer.value_dim)
        return Recurrent(jnp.zeros(inputs, dtype), jnp.zeros(state, jnp.float32))

    return {
        weights.segment_name(s): {
            weights.layer_name(member): of_layer(layer.mixer, segment.repeats)
            for member, layer in enumerate(segment.period)
        }
        for s, segment in enumerate(decoder.segments)
    }


class LanguageModel(nn.Module):
    """A described language model.

    Attributes:
      decoder: its description.
      dtype: of activations and products.
      act_bits: None, or 8 or 16 bits to round activations to, see `mcjax.dot`.
      cache_dtype: of keys, values and latents of past tokens, None for `dtype`. A recurrent state
        is float32 in any case.
      shared: a mesh that parameters and sequences are shared out on, see `mcjax.sharding`.
      remat: whether derivatives compute each layer again rather than keep what it computed. They
        do in any case where a layer's weights are put together for it.
    """

    decoder: Decoder
    dtype: Any = jnp.float32
    act_bits: int | None = None
    cache_dtype: Any = None
    shared: Sharding | None = None
    remat: bool = False

    @property
    def config(self) -> Decoder:
        """The description, by the name that every model has for it."""
        return self.decoder

    def empty_cache(self, batch: int, length: int) -> Any:
        """Room for `length` tokens of `batch` sequences."""
        make = self._room(batch, length)
        if self.shared is None:
            return make()
        like, along = jax.eval_shape(make), self.shared.batch_spec(batch)
        specs = cache_partition(self.decoder, like, self.shared, along)
        mesh = self.shared.mesh
        return jax.jit(make, out_shardings=jax.tree.map(partial(NamedSharding, mesh), specs))()

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes of `empty_cache` over all devices, without making it."""
        like = jax.eval_shape(self._room(batch, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))

    def _room(self, batch: int, length: int) -> Callable[[], Any]:
        dtype = self.dtype if self.cache_dtype is None else self.cache_dtype
        return partial(empty_cache, self.decoder, batch, length, dtype)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Any = None,
        length: jax.Array | None = None,
        only: jax.Array | None = None,
    ) -> Any:
        """Next-token logits.

        Args:
          tokens: int [B, T].
          positions: int [B or 1, T]; None counts from 0. Given without `length`, the tokens are
            decoded, and pruning protects none of them, however many they are.
          cache: from `empty_cache`.
          length: int [B], how many of these tokens of a prompt are not padding at the end; None for
            all. With positions int [1, T] that count on from a chunk of the prompt read before,
            pruning protects the most important of each chunk.
          only: int [B], the one token of each sequence whose logits are wanted; None for all.

        Returns:
          Logits [B, T, vocab], T being 1 with `only`; with a cache also the cache with these tokens
          in it.
        """
        params: Any
        if self.is_initializing():
            drawn = weights.init(self.decoder, self.make_rng("params"))
            params = {name: self.param(name, lambda _, v=v: v) for name, v in drawn.items()}
        else:
            params = self.variables["params"]
        taps = [tap for tap in SOWN if self.is_mutable_collection(tap)]
        logits, cache, seen = forward(
            self.decoder,
            params,
            tokens,
            positions,
            cache,
            length,
            only,
            dtype=self.dtype,
            act_bits=self.act_bits,
            taps=taps,
            shared=self.shared,
            remat=self.remat,
        )
        for tap, values in seen.items():
            self.sow(tap, "layers", values, reduce_fn=lambda _, new: new, init_fn=dict)
        return logits if cache is None else (logits, cache)
