"""What calibration text says of a layer: Gram matrices of its inputs, use of its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mcjax import odp
from mcjax.models import weights as weights_lib
from mcjax.models.attention import Context
from mcjax.models.decoder import Activation, Layer, Routed
from mcjax.models.experts import apply_experts, one_expert
from mcjax.models.language_model import run_layer
from mcjax.ops.grouped import group_rows

GRAM_FLOOR = 1e-3
"""Weight of every calibration token in every expert's Gram matrix, see `expert_grams`."""

FLOOR_TOKENS = 512
"""Tokens that stand for all of them in the hidden features of every expert."""

BLOCK_ROWS = 256
"""Rows of one expert that are computed at once."""

STAND_IN_FLOOR = 1e-3
"""How much of its layer's moments each expert's stand-in is fitted on as well."""

STAND_IN_TRUST = 0.75
"""How far from the published rule (slope 1, intercept 0) towards its fit a stand-in goes: the whole
way is no better where calibration text is like the text served, and worse where a model knows its
calibration text by heart, see benchmarks/README.md."""


EXPERTS = ".".join(weights_lib.EXPERTS)
DOWN = ".".join((*weights_lib.BLOCK, "down"))


class Seen(NamedTuple):
    """A batch of N tokens as the experts of a layer see them, kept on the host.

    Attributes:
      x: float32 [N, D], inputs of the block.
      experts: int32 [N, K].
      weights: float32 [N, K].
      importance: float32 [N], what the squared error of their weighted sum counts.
    """

    x: Any
    experts: Any
    weights: Any
    importance: Any


@partial(jax.jit, static_argnames=("spec", "width", "eps"))
def observe(
    spec: Layer,
    width: int,
    eps: float,
    own: Any,
    x: jax.Array,
    importance: Mapping[str, jax.Array] | None = None,
):
    """Runs a layer once, for its output and for what calibration needs.

    Args:
      spec: of the layer.
      width: features of a token.
      eps: of the norms.
      own: its weights, dense.
      x: hidden states [B, T, D].
      importance: of the tokens, see `mcjax.importance`; None for the same of all.

    Returns:
      The layer's output [B, T, D]; sums of x x' over the tokens, each by its importance, for the
      weights of all products but routed experts by name, and for what routed experts see by the
      name `EXPERTS`: [groups, d_in, d_in]; and `Seen`. The network of a layer without routed
      experts is its one expert. Where weights multiply what goes into experts, each pair of a token
      and an expert is a token of its own.
    """
    y, _, taps = run_layer(spec, own, x, Context(jnp.arange(x.shape[1])[None], None), None, eps)

    def share(name):
        given = jnp.ones(x.shape[:2]) if importance is None else importance[name]
        return given.astype(jnp.float32).reshape(y.shape[0] * y.shape[1], -1)

    def gram(tap, name):
        rows = taps[tap].reshape(-1, taps[tap].shape[-1])
        return lax.map(lambda one: (rows * one[:, None]).T @ rows, share(name).T)

    grams = {
        role.name: gram(role.tap, role.name)
        for role in weights_lib.roles(spec, width)
        if role.tap is not None and not role.routed
    }
    if not isinstance(spec.block, Routed):
        rows = taps["block_input"].reshape(-1, width)
        every = jnp.zeros((len(rows), 1), jnp.int32)
        return y, grams, Seen(rows, every, jnp.ones((len(rows), 1)), share(DOWN).mean(axis=1))
    grams[EXPERTS] = gram("expert_input", EXPERTS)
    rows, experts, weights = taps["expert_input"], taps["experts"], taps["weights"]
    matter = share(EXPERTS)[:, 0]
    if spec.block.routing.inputs:
        rows = (rows[:, None] * weights[..., None]).reshape(-1, width)
        matter = jnp.repeat(matter, experts.shape[1])
        experts, weights = experts.reshape(-1, 1), jnp.ones((len(rows), 1))
    return y, grams, Seen(rows, experts, weights, matter)


def sampled(seen: Seen, count: int) -> Seen:
    """Some of the tokens of a batch, at least one.

    They are drawn: every so many would be the first of every window, which are like no others.
    """
    drawn = np.random.default_rng(0).permutation(len(seen.x))[: max(1, count)]
    return Seen(*(np.asarray(a)[np.sort(drawn)] for a in seen))


def use(experts: int, batches: Sequence[Seen]) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens each expert gets, and the sum of their weights: float64 [E] both."""
    frequency, weight = np.zeros(experts), np.zeros(experts)
    for seen in batches:
        index = np.asarray(seen.experts).reshape(-1)
        frequency += np.bincount(index, minlength=experts)
        weight += np.bincount(index, np.asarray(seen.weights).reshape(-1), minlength=experts)
    return frequency, weight


class _Rows(NamedTuple):
    """Rows of some experts, expert by expert, see `_rows`."""

    token: jax.Array
    share: jax.Array
    first: jax.Array
    rows_of: jax.Array


def _rows(seen: Seen, first: int, experts: int) -> _Rows:
    """Which tokens the `experts` experts from `first` on have, and what their errors count."""
    index = seen.experts.reshape(-1) - first
    groups = group_rows(index, (index >= 0) & (index < experts), experts)
    token = groups.order // seen.experts.shape[1]
    share = seen.weights.reshape(-1)[groups.order] ** 2 * seen.importance[token]
    room = (0, BLOCK_ROWS)
    return _Rows(jnp.pad(token, room), jnp.pad(share, room), groups.first, groups.rows_of)


def _over_rows(x: jax.Array, rows: _Rows, e: jax.Array, visit: Callable, carry: Any) -> Any:
    """Folds ``visit(rows of x, their shares, carry)`` over the rows of expert e, in blocks.

    Rows that only fill the last block up have a share of 0.
    """

    def block(b, carry):
        cut = partial(lax.dynamic_slice_in_dim, slice_size=BLOCK_ROWS)
        start = rows.first[e] + b * BLOCK_ROWS
        inside = b * BLOCK_ROWS + jnp.arange(BLOCK_ROWS) < rows.rows_of[e]
        share = jnp.where(inside, cut(rows.share, start), 0)
        return visit(x[cut(rows.token, start)], share, carry)

    return lax.fori_loop(0, -(-rows.rows_of[e] // BLOCK_ROWS), block, carry)


@partial(jax.jit, static_argnames=("activation",), donate_argnames="grams")
def _add_expert_grams(activation: Activation, weights: Any, seen: Seen, first, grams):
    experts = weights["gate"].shape[0]
    rows = _rows(seen, first, experts)

    def of_expert(given):
        e, own, (of_input, of_hidden) = given

        def visit(x, share, carry):
            _, hidden = one_expert(activation, own, x)
            share = share[:, None]
            return carry[0] + (x * share).T @ x, carry[1] + (hidden * share).T @ hidden

        return _over_rows(seen.x, rows, e, visit, (of_input, of_hidden))

    return lax.map(of_expert, (jnp.arange(experts), weights, grams))


@partial(jax.jit, static_argnames=("activation",))
def _floor_grams(
    activation: Activation, weights: Any, x: jax.Array, layer: jax.Array, share: jax.Array
):
    def of_expert(own):
        _, hidden = one_expert(activation, own, x)
        return layer, (hidden * share[:, None]).T @ hidden

    return lax.map(of_expert, weights)


def expert_grams(
    activation: Activation,
    weights: Any,
    batches: Sequence[Seen],
    first: int,
    layer: jax.Array | None,
    floor: float = GRAM_FLOOR,
) -> tuple[jax.Array, jax.Array]:
    """Gram matrices of some experts' inputs and hidden features, from the tokens routed to them.

    With w[t, e] the routing weight and i[t] the importance, they sum ``i w^2 x x'`` over those
    tokens, since the error of the block's output weighs each by i w^2; and a little of all tokens,
    so that an expert that calibration hardly reaches has its layer's inputs to go by (ours).

    Args:
      activation: of the experts.
      weights: dense, of B experts, by name.
      batches: of the layer.
      first: the index of the first of those experts.
      layer: float32 [D, D], the sum of i x x' over all tokens.
      floor: the weight w^2 of all tokens; 0 for none, without `layer`. The hidden features of
        `FLOOR_TOKENS` tokens stand for those of all, since all tokens through all experts would be
        many times the work.

    Returns:
      float32 [B, D, D] and [B, F, F].
    """
    experts, width, hidden = weights["gate"].shape
    if floor and layer is not None:
        tokens = sum(len(seen.x) for seen in batches)
        some = [sampled(seen, FLOOR_TOKENS // len(batches)) for seen in batches]
        x = jnp.concatenate([s.x for s in some])
        matter = jnp.concatenate([s.importance for s in some])
        share = floor * tokens / len(x) * matter
        grams = _floor_grams(activation, weights, x, floor * layer, share)
    else:
        grams = jnp.zeros((experts, width, width)), jnp.zeros((experts, hidden, hidden))
    for seen in batches:
        grams = _add_expert_grams(activation, weights, seen, first, grams)
    return grams


@partial(jax.jit, static_argnames=("activation",))
def expert_errors(
    activation: Activation, weights: Any, planes: Any, seen: Seen, first
) -> jax.Array:
    """Squared change of the block's output when a part of one expert alone is at one width.

    Args:
      activation: of the experts.
      weights: dense, of B experts, by name.
      planes: their `gate`, `up` and `down` with a table for each width.
      seen: tokens.
      first: the index of the first of those experts.

    Returns:
      float32 [B, 2, widths]: ``sum_t i_t (w_te ||f_e(x_t) - f_e,k(x_t)||)^2``, of importances i,
      with `gate` and `up` at width k, and with `down`; to be added over batches. The Frobenius norm
      of PMQ is about the square root of both together.
    """
    experts, widths = weights["gate"].shape[0], planes["gate"].widths
    rows = _rows(seen, first, experts)

    def of_expert(given):
        e, own, planes = given
        narrow = [{n: p.slice(k).dequantize() for n, p in planes.items()} for k in widths]
        at = [own | {name: one[name] for name in ("gate", "up")} for one in narrow]
        at += [own | {"down": one["down"]} for one in narrow]

        def visit(x, share, total):
            exact, *others = (one_expert(activation, one, x)[0] for one in (own, *at))
            change = [jnp.sum((other - exact) ** 2, axis=-1) for other in others]
            return total + jnp.stack(change) @ share

        return _over_rows(seen.x, rows, e, visit, jnp.zeros(2 * len(widths))).reshape(2, -1)

    return lax.map(of_expert, (jnp.arange(experts), weights, planes))


class _Moments(NamedTuple):
    """Sums with weight i w^2 over tokens with e at rank 1 or lower; f0 is their first's output.

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


@partial(jax.jit, static_argnames=("spec",))
def _lower_ranked(spec: Routed, experts: Any, seen: Seen):
    """Ratios w_j / w_0 [N, K - 1] and `_Moments` of tokens."""
    weights, index = seen.weights, seen.experts
    f = apply_experts(spec, experts, seen.x, index.reshape(-1))
    f = f.reshape(*index.shape, -1)
    first, rest = f[:, :1], f[:, 1:]
    one_hot = jax.nn.one_hot(index[:, 1:], spec.experts, dtype=jnp.float32)
    share = weights[:, 1:] ** 2 * seen.importance[:, None]
    share = one_hot * share[..., None]  # [N, K - 1, E]

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


def pruning_statistics(
    spec: Routed, experts: Any, batches: Iterable[Seen]
) -> odp.PruningStatistics:
    """`mcjax.odp`'s statistics of one layer.

    Args:
      spec: of the block.
      experts: its experts' dense weights.
      batches: of the layer.

    Returns:
      Thresholds and the fits that stand in for skipped experts.
    """
    ratios, moments = zip(*(_lower_ranked(spec, experts, b) for b in batches), strict=True)
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
