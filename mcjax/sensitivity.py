"""What quantising each part of a model costs in the end, in nats a token.

Let the divergence of predictions from the dense model's be L, w(k) all weights at width k, and g(k)
the gradient of L there. Between a width k and the next one above it, k', L rises by about

    L(w(k)) - L(w(k')) = sum over parts i of  <(g_i(k) + g_i(k')) / 2, w_i(k) - w_i(k')>

the trapezoidal rule along the line from the one to the other, where it is exact if L is quadratic.
Each term is what part i costs at k more than at k'; above the widest is the dense model, where L
and g are 0. So costs of all parts add up to what the model loses at a width, and each part is
judged in the company it will have, other parts being at about its width: early layers, whose errors
all later ones meet, cost several times what they do alone (ours; path-integrated gradients, as of
Aumann and Shapley). Left out is what no derivative sees, that a token changes experts, and what
the factors of norms and routers do that tuning stores for each width.

One pass through the model and back for each width measures all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import passes, text
from mcjax.leaves import added
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Layer
from mcjax.schedule import times_of
from mcjax.tune_artifact import outputs

DENSE = 8
"""A weight of so many bits is taken to cost nothing."""

WINDOWS = 16
"""How many windows costs are measured on, at most; more of a small model, see
`mcjax.schedule.times_of`: how a budget is shared out varies less then."""

TOKENS = 128
"""How many tokens of each, at most, the first."""

At = Callable[[int, int], Any]
"""From a width and a layer's number to the layer's dense weights at that width, each as
`mcjax.allocate.stored_at` says."""

MEASURE = "divergence along widths"
"""What an artifact's manifest calls it."""


class Text(NamedTuple):
    """What costs are measured on.

    Attributes:
      windows: tokens int [N, T].
      target: float32 [N, T, D], what the dense model's last layer gives for them.
    """

    windows: np.ndarray
    target: np.ndarray


def shape_of(decoder: Decoder, windows: np.ndarray) -> tuple[int, int]:
    """How many of windows int [N, T], and of their tokens, costs are measured on."""
    count, length = windows.shape
    return min(count, round(WINDOWS * times_of(decoder))), min(length, TOKENS)


def some_of(decoder: Decoder, windows: np.ndarray, target: np.ndarray) -> Text:
    """What costs are measured on: some windows of many, spread evenly, and their first tokens."""
    count, length = shape_of(decoder, windows)
    return Text(*(text.spread(each, count)[:, :length].copy() for each in (windows, target)))


def costs(
    decoder: Decoder,
    stored: Sequence[dict[str, tuple[int, ...]]],
    outside: Any,
    read: Callable[[int], Any],
    at: At,
    sample: Text,
    batch: int,
    directory: Path,
    progress: Callable[..., Any],
) -> list[dict[str, np.ndarray]]:
    """What each part costs at each width.

    Args:
      decoder: the model.
      stored: widths of each layer's parts, by what they multiply.
      outside: parameters outside of the layers.
      read: gives the dense weights of layer i.
      at: gives them at a width.
      sample: of text, on which it is measured.
      batch: windows computed at once.
      directory: where what is found at each width is kept, and found again by a later call.
      progress: wraps the iterations over layers, there and back, called with (items,
        description=...).

    Returns:
      By layers and parts float64 [E, widths], E 1 unless routed. A sample may have it negative.
    """
    several = {k for of_layer in stored for own in of_layer.values() for k in own if k < DENSE}
    every = sorted(several, reverse=True)
    loss = passes.divergence_from(decoder, outside, sample.target)
    found = []
    for wider, k, narrower in zip([None, *every[:-1]], every, [*every[1:], None], strict=True):
        visit = partial(_visit, decoder, read, at, wider, narrower)
        named = partial(progress, description=f"what {k} bits cost")
        given = decoder, outside, sample.windows, partial(at, k), loss, visit, batch
        found.append(passes.there_and_back(*given, directory / str(k), named))

    def of_part(i, tap, widths):
        rises = np.stack([of_width[i][f"{tap}/rise"] for of_width in values])
        rises[1:] += [of_width[i][f"{tap}/fall"] for of_width in values[:-1]]
        total = dict(zip(every, np.cumsum(rises / 2, axis=0), strict=True))
        return np.stack([total.get(k, np.zeros_like(rises[0])) for k in widths], axis=-1)

    values = [list(map(passes.read_found, of_width)) for of_width in found]
    return [
        {tap: of_part(i, tap, widths) for tap, widths in of_layer.items()}
        for i, of_layer in enumerate(stored)
    ]


def _visit(
    decoder: Decoder,
    read: Callable[[int], Any],
    at: At,
    wider: int | None,
    narrower: int | None,
    i: int,
    own: Any,
) -> passes.Visit:
    """Finds ``<g, own - wider>`` and ``<g, narrower - own>`` of each part, float64 [E].

    By the part's name and "/rise" and "/fall".
    """
    layer = decoder.layers[i]
    taps = tuple(
        (tap, tuple(role.path for role in roles))
        for tap, roles in weights.by_tap(layer, decoder.width).items()
    )

    def collect(batches):
        gradient = reduce(added, batches)
        dense = read(i) if wider is None else at(wider, i)
        rise = _inner(taps, gradient, own, dense)
        del dense
        values = {f"{tap}/rise": -change for tap, change in rise.items()}
        if narrower is not None:
            fall = _inner(taps, gradient, own, at(narrower, i))
            values |= {f"{tap}/fall": change for tap, change in fall.items()}
        return values

    paths = tuple(path for _, several in taps for path in several)
    return passes.Visit(partial(_backward, layer, decoder.norm_eps, paths, own), collect)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(layer: Layer, eps: float, paths: tuple, own: Any, x: jax.Array, change: jax.Array):
    """The gradients by x and by the weights at paths."""

    def run(some, x):
        every = jax.tree.map(lambda leaf: leaf, own)
        for path, value in some.items():
            weights.put(every, path, value)
        return outputs(layer, eps, every, x)

    of_weights, of_x = jax.vjp(run, {path: weights.get(own, path) for path in paths}, x)[1](change)
    return of_x, of_weights


def _inner(taps: tuple, gradient: Any, own: Any, other: Any) -> dict[str, np.ndarray]:
    """Parts' ``<gradient, other - own>``, float64 [E], E 1 unless routed."""

    def of_weight(path):
        made = _product(gradient[path], weights.get(own, path), weights.get(other, path))
        return np.atleast_1d(np.asarray(made, np.float64))

    return {tap: sum(map(of_weight, paths)) for tap, paths in taps}


@jax.jit
def _product(gradient, own, other):
    # As a product: what a fusion sums up itself it may sum up badly.
    return jnp.einsum("...io,...io->...", gradient, other - own, precision="highest")
