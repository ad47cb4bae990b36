"""What quantising each part of a model costs in the end, in nats a token.

If all weights w of a part change by d, the log-likelihood of a window of T tokens, its labels drawn
from the model's own predictions, changes by about ``<g, d>`` with g its gradient, so predictions
diverge by

    ``KL = E <g, d>^2 / (2 T)``

in nats a token, on average over windows (the Fisher information). Errors of a part's weights count
together with their signs, and those of a token with what later tokens make of it. A pass through
the model and back measures every part, expert and width: one gradient a window (ours; that costs of
parts add up is the approximation of `mcjax.allocate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import text
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Layer
from mcjax.passes import there_and_back
from mcjax.tune_artifact import outputs

WINDOWS = 64
"""How many windows costs are measured on, at most: each is one sample of ``<g, d>``."""

TOKENS = 128
"""How many tokens of each, at most, the first: samples are worth more than tokens."""

At = Callable[[int, tuple[str, ...], int], jax.Array]
"""From a layer's number, a weight's path and a width to what the weight is at that width."""


def costs(
    decoder: Decoder,
    widths: Sequence[dict[str, tuple[int, ...]]],
    outside: Any,
    read: Callable[[int], Any],
    at: At,
    windows: np.ndarray,
    directory: Path,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> list[dict[str, np.ndarray]]:
    """What each part costs at each width.

    Args:
      decoder: the model.
      widths: of each layer's parts, by what they multiply.
      outside: parameters outside of the layers.
      read: gives the dense weights of layer i.
      at: gives them at a width.
      windows: tokens int [N, T], of which `WINDOWS` are used, spread evenly, and `TOKENS` of each.
      directory: where layers' inputs lie meanwhile.
      progress: wraps the iteration over layers, there and back.

    Returns:
      By layers and parts float64 [E, widths], E 1 unless routed.
    """
    some = text.spread(windows, WINDOWS)[:, :TOKENS]

    def visit(i, own):
        layer = decoder.layers[i]
        taps = tuple(
            (tap, tuple(role.path for role in roles))
            for tap, roles in weights.by_tap(layer, decoder.width).items()
        )

        def changes(path, tap):
            dense = weights.get(own, path)
            # Those of all widths are held at once: in halves.
            each = ((at(i, path, k) - dense).astype(jnp.bfloat16) for k in widths[i][tap])
            return jnp.stack(list(each))

        moved = {path: changes(path, tap) for tap, paths in taps for path in paths}
        return partial(_along, layer, decoder.norm_eps, taps, own, moved)

    found = there_and_back(decoder, outside, read, some, 1, directory, visit, progress)
    made = []
    for of_layer in found:
        squares = [
            {tap: np.square(np.asarray(value, np.float64)) for tap, value in each.items()}
            for each in of_layer
        ]
        mean = jax.tree.map(lambda *each: np.mean(each, axis=0) / (2 * some.shape[1]), *squares)
        made.append({tap: np.atleast_2d(value.T) for tap, value in mean.items()})
    return made


@partial(jax.jit, static_argnums=(0, 1, 2))
def _along(
    layer: Layer, eps: float, taps: tuple, own: Any, moved: Any, x: jax.Array, change: jax.Array
):
    """The gradient by x; and by parts ``<g, d>``, float32 [widths] or [widths, E]."""

    def run(some, x):
        every = jax.tree.map(lambda leaf: leaf, own)
        for path, value in some.items():
            weights.put(every, path, value)
        return outputs(layer, eps, every, x)

    of_weights, of_x = jax.vjp(run, {path: weights.get(own, path) for path in moved}, x)[1](change)

    def inner(path):
        def of_width(change):
            # As products: what a fusion sums up itself it may sum up badly.
            wide = change.astype(jnp.float32)
            return jnp.einsum("...io,...io->...", of_weights[path], wide, precision="highest")

        return jax.lax.map(of_width, moved[path])

    return of_x, {tap: sum(map(inner, paths)) for tap, paths in taps}
