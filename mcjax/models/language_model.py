"""A described model as a function of tokens, and as a Flax Linen module."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax.models import experts, weights
from mcjax.models.attention import Context, KeyValues, Latents, heads, latent
from mcjax.models.decoder import Decoder, Delta, Dense, Heads, Latent, Layer
from mcjax.models.delta import Recurrent, delta
from mcjax.models.norms import rms_norm
from mcjax.ops import narrow_dot

_MIXERS: dict[type, Any] = {Heads: heads, Latent: latent, Delta: delta}


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
    h = rms_norm(x, own["mixer_norm"], eps)
    mixer = _MIXERS[type(spec.mixer)]
    y, cache, taps = mixer(spec.mixer, own["mixer"], h, context, cache, eps, act_bits)
    x = x + (rms_norm(y, own["mixer_after"], eps) if spec.sandwich else y)
    h = rms_norm(x, own["block_norm"], eps)
    block: Any = experts.dense if isinstance(spec.block, Dense) else experts.routed
    y, more = block(spec.block, own["block"], h, act_bits)
    x = x + (rms_norm(y, own["block_after"], eps) if spec.sandwich else y)
    return x, cache, {**taps, **more}


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
) -> Any:
    """Next-token logits; see `LanguageModel.__call__`."""
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    x = params["embedding"][tokens].astype(dtype)
    if decoder.embedding_scale != 1:
        x = x * jnp.asarray(decoder.embedding_scale, dtype)
    cache = dict(cache) if cache is not None else None
    for s, segment in enumerate(decoder.segments):
        name = weights.segment_name(s)

        def period(carry, own, segment=segment):
            x, held = carry
            own, repeat = own
            context = Context(positions, length, repeat)
            for member, spec in enumerate(segment.period):
                key = weights.layer_name(member)
                before = None if held is None else held[key]
                x, new, _ = run_layer(
                    spec, own[key], x, context, before, decoder.norm_eps, act_bits
                )
                held = None if held is None else {**held, key: new}
            return (x, held), None

        carry = (x, None if cache is None else cache[name])
        every = params[name], jnp.arange(segment.repeats)
        (x, held), _ = jax.lax.scan(period, carry, every)
        if cache is not None:
            cache[name] = held
    if only is not None:
        x = jnp.take_along_axis(x, only[:, None, None], axis=1)
    x = rms_norm(x, params["norm"], decoder.norm_eps)
    head = params["embedding" if decoder.tied else "head"]
    logits = narrow_dot(x.reshape(-1, decoder.width), head).reshape(*x.shape[:-1], -1)
    if decoder.logit_cap is not None:
        logits = decoder.logit_cap * jnp.tanh(logits / decoder.logit_cap)
    return logits if cache is None else (logits, cache)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(decoder: Decoder, batch: int, length: int, dtype: Any = jnp.float32) -> Any:
    """Room for `length` tokens of `batch` sequences in every layer."""

    def of_layer(mixer, repeats):
        if isinstance(mixer, Heads):
            shape = (repeats, batch, mixer.kv_heads, length, mixer.head_dim)
            return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        if isinstance(mixer, Latent):
            room = (repeats, batch, length)
            return Latents(
                jnp.zeros((*room, mixer.rank), dtype), jnp.zeros((*room, mixer.rope.dim), dtype)
            )
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
    """

    decoder: Decoder
    dtype: Any = jnp.float32
    act_bits: int | None = None

    @property
    def config(self) -> Decoder:
        """The description, by the name that every model has for it."""
        return self.decoder

    def empty_cache(self, batch: int, length: int) -> Any:
        """Room for `length` tokens of `batch` sequences."""
        return empty_cache(self.decoder, batch, length, self.dtype)

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
          positions: int [B or 1, T]; None counts from 0.
          cache: from `empty_cache`.
          length: int [B], how many of these tokens are not padding at the end; None for all.
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
        return forward(
            self.decoder,
            params,
            tokens,
            positions,
            cache,
            length,
            only,
            dtype=self.dtype,
            act_bits=self.act_bits,
        )
