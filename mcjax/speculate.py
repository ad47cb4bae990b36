"""Self-speculative decoding: the first planes of the weights draft, all of them verify.

A cheap reading of the model writes a few tokens one by one; the full reading then scores them all
in one forward pass and keeps as many as it would have written itself (arXiv 2211.17192, arXiv
2302.01318). The draft is no second model: it reads fewer planes of the very same arrays, and needs
only its width's tables beside them. On CPU it also rounds activations to int8, so that it counts
bits where the model dequantises; that alone may be draft enough, with all planes.

Both passes share one cache. Drafting puts its keys and values into the slots after the verified
tokens, and verification overwrites every one of them. Slots of rejected tokens stay until the
tokens that take their positions overwrite them: a query sees only positions up to its own, so
nothing has to be rolled back but the position. A recurrent state has no slots: verification starts
from the one before the draft, and goes back to the one after the last accepted token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mcjax import allocate, checkpoint, parameters
from mcjax.models.attention import DRAFTED
from mcjax.models.language_model import LanguageModel
from mcjax.models.recurrent import Recurrent
from mcjax.ops import choice, device
from mcjax.sampling import Sampling, allowed, filter_logits, sample
from mcjax.serving import Model, refuse_adapters


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What writes the tokens that the model then verifies.

    Attributes:
      module: a model of the same vocabulary and cache.
      params: its parameters.
      length: tokens that are drafted before each verification.
    """

    module: LanguageModel
    params: Any
    length: int = 4

    def __post_init__(self):
        if not 1 <= self.length <= DRAFTED:
            raise ValueError(f"draft_length must be 1 to {DRAFTED}, got {self.length}")


@dataclass
class Tally:
    """How many tokens were drafted, and how many of them accepted."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that was accepted, None if none were drafted."""
        return self.accepted / self.drafted if self.drafted else None


def self_draft(model: Model, bits: int, length: int = 4) -> Draft:
    """A model's own first planes as its draft, at ``min(bits, width)`` of each expert.

    Reads the tables of that width from the artifact and nothing else. On CPU the draft rounds its
    activations to int8, whether the model does or not.

    Args:
      model: as served; it stays as it is.
      bits: width of the draft.
      length: tokens that are drafted before each verification.

    Returns:
      A draft whose parameters are the model's arrays and those tables.

    Raises:
      ValueError: if `bits` is not a width of the artifact, or not below the widest expert's where
        the draft would differ in nothing else, or the length is below 1.
    """
    refuse_adapters(model.params)
    reader = checkpoint.ArtifactReader(model.path, "model")
    stored = tuple(reader.manifest["statistics"]["bits"])
    if bits not in stored:
        raise ValueError(f"draft bits {bits} is not one of this artifact's widths {stored}")
    act_bits = choice.draft_act_bits(device.platform(), model.module.act_bits)
    widths = model.widths
    widest = int(allocate.to_experts(model.module.decoder, widths).max())
    if bits >= widest and act_bits == model.module.act_bits:
        raise ValueError(
            f"draft bits {bits} must be below the widest expert's {widest} bits: "
            "the draft would be the model itself"
        )
    shared = model.module.shared
    params = parameters.read_draft_tables(reader, model.params, widths, bits, shared)
    return Draft(module=model.module.clone(act_bits=act_bits), params=params, length=length)


def hold_in_loop(tokens: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """Both as they are, but tied to this turn of a loop.

    Else XLA dequantises the attention's weights of all layers before the loop and keeps them.
    """
    return jax.lax.optimization_barrier((tokens, params))


def on_every_device(module: Any, tokens: jax.Array) -> jax.Array:
    """Tokens on every device of a model's mesh, so that every process can read all of them."""
    shared = getattr(module, "shared", None)
    if shared is None:
        return tokens
    return jax.lax.with_sharding_constraint(tokens, NamedSharding(shared.mesh, P()))


def draft_tokens(
    draft: LanguageModel,
    params: Any,
    token: jax.Array,
    position: jax.Array,
    cache: Any,
    key: jax.Array,
    sampling: Sampling,
    length: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Writes `length` tokens one by one.

    Args:
      draft: the drafting model.
      params: its parameters.
      token: int32 [B], the last tokens of the sequences, not in the cache yet.
      position: int [B], their positions.
      cache: of the tokens before.
      key: of the sampling.
      sampling: how tokens are drawn.
      length: how many to write.

    Returns:
      Tokens int32 [B, length], the logits that they were drawn from [B, length, V], and the cache.
    """

    def write(carry, key):
        token, position, cache = carry
        token, held = hold_in_loop(token, params)
        logits, cache = draft.apply({"params": held}, token[:, None], position[:, None], cache)
        drawn = sample(key, logits[:, 0], sampling)
        return (drawn, position + 1, cache), (drawn, logits[:, 0])

    carry, (tokens, logits) = jax.lax.scan(
        write, (token, position, cache), jax.random.split(key, length)
    )
    return jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(logits, 0, 1), carry[2]


def accept(
    key: jax.Array,
    drafted: jax.Array,
    draft_logits: jax.Array,
    logits: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Keeps drafted tokens so that what is kept is distributed as the model's own writing.

    With the draft's probabilities q and the model's p, both as `sampling` shapes them, a token x is
    accepted with probability ``min(1, p(x) / q(x))``; after the first that is not, another is
    drawn from ``max(0, p - q)``, normalised. All having been accepted, one more is drawn from p.
    At temperature 0 a token is accepted if it is the model's likeliest.

    Args:
      key: of the sampling.
      drafted: int32 [..., N].
      draft_logits: [..., N, V], from which they were drawn.
      logits: [..., N + 1, V], the model's at the same places and after the last.
      sampling: how tokens are drawn.

    Returns:
      Tokens int32 [..., N + 1] and how many of them were drafted, int32 [...]: with n of those, the
      first n + 1 tokens are the sequence's next ones and the others mean nothing.
    """
    if sampling.temperature == 0:
        likeliest = jnp.argmax(allowed(logits, sampling), axis=-1).astype(jnp.int32)
        return likeliest, _leading(drafted == likeliest[..., :-1])
    accept_key, rest_key = jax.random.split(key)
    p = jax.nn.softmax(filter_logits(logits, sampling), axis=-1)
    q = jax.nn.softmax(filter_logits(draft_logits, sampling), axis=-1)
    p_drafted = jnp.take_along_axis(p[..., :-1, :], drafted[..., None], axis=-1)[..., 0]
    q_drafted = jnp.take_along_axis(q, drafted[..., None], axis=-1)[..., 0]
    accepted = _leading(jax.random.uniform(accept_key, drafted.shape) * q_drafted < p_drafted)

    # Nothing is drafted after the last token: with q = 0 there, the rest to draw from is p.
    q = jnp.concatenate([q, jnp.zeros_like(q[..., :1, :])], axis=-2)
    place = accepted[..., None, None]
    p_next = jnp.take_along_axis(p, place, axis=-2)[..., 0, :]
    q_next = jnp.take_along_axis(q, place, axis=-2)[..., 0, :]
    rest = jnp.maximum(p_next - q_next, 0)
    # p and q alike up to rounding may leave nothing.
    rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p_next)
    following = jax.random.categorical(rest_key, jnp.log(rest)).astype(jnp.int32)
    tokens = jnp.concatenate([drafted, drafted[..., :1]], axis=-1)
    last = jnp.arange(tokens.shape[-1]) == accepted[..., None]
    return jnp.where(last, following[..., None], tokens), accepted


@partial(
    jax.jit, static_argnames=("module", "draft", "sampling", "length"), donate_argnames="cache"
)
def step(
    module: LanguageModel,
    params: Any,
    draft: LanguageModel,
    draft_params: Any,
    token: jax.Array,
    position: jax.Array,
    cache: Any,
    key: jax.Array,
    sampling: Sampling,
    length: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """Drafts, verifies and accepts once.

    Args:
      module: the model.
      params: its parameters.
      draft: the drafting model.
      draft_params: its parameters; arrays that are also in `params` are not copied.
      token: int32 [B], the last tokens of the sequences, not in the cache yet.
      position: int [B], their positions.
      cache: of the tokens before. What would lie beyond its end is not kept, so the tokens written
        from there on mean nothing.
      key: of the sampling.
      sampling: how tokens are drawn.
      length: tokens to draft.

    Returns:
      As `accept` does, tokens int32 [B, length + 1] and int32 [B]; and the cache.
    """
    draft_key, accept_key = jax.random.split(key)
    before = cache
    drafted, draft_logits, cache = draft_tokens(
        draft, draft_params, token, position, cache, draft_key, sampling, length
    )
    cache = _recurrent(lambda _, old: old, cache, before)
    read = jnp.concatenate([token[:, None], drafted], axis=1)
    positions = position[:, None] + jnp.arange(length + 1)
    output: Any = module.apply({"params": params}, read, positions, cache, mutable=["recurrent"])
    (logits, cache), seen = output
    tokens, accepted = accept(accept_key, drafted, draft_logits, logits, sampling)
    states = iter(jax.tree.leaves(seen, is_leaf=_is_recurrent))
    cache = _recurrent(lambda _, __: _after(next(states), accepted), cache, cache)
    return *(on_every_device(module, made) for made in (tokens, accepted)), cache


def _is_recurrent(node: Any) -> bool:
    return isinstance(node, Recurrent)


def _recurrent(function, cache: Any, other: Any) -> Any:
    """The cache with `function` of the two instead of every recurrent state."""

    def choose(node, more):
        return function(node, more) if _is_recurrent(node) else node

    return jax.tree.map(choose, cache, other, is_leaf=_is_recurrent)


def _after(states: Recurrent, accepted: jax.Array) -> Recurrent:
    """States [R, B, T, ...] after T tokens: those after the first and `accepted` [B] more."""

    def pick(array):
        index = accepted.reshape(1, -1, *(1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=2)[:, :, 0]

    return jax.tree.map(pick, states)


def _leading(accepted: jax.Array) -> jax.Array:
    """How many come before the first that is False: bool [..., N] to int32 [...]."""
    return jnp.sum(jnp.cumprod(accepted.astype(jnp.int32), axis=-1), axis=-1)
