"""How much an error at each token matters to what the model says, for every product.

If a product's result changes by e_t at token t, and the loss has the gradient g_t there, then
predictions change by about ``(g_t . e_t)^2 / 2`` nats, on average over labels that are drawn from
the model's own predictions (the Fisher information). So the quadratic error of a weight is weighed
token by token, by its *importance*

    |g_t|    over the product's output features, a group of these at a time, its mean made 1

In a language model a few tokens matter far more than others: the first of a window, to which all
attend, does in `k`, `v` and `down`. GuidedQuant (arXiv 2505.07004) weighs by the
square of this; its square root rests on more tokens, and measures better (ours).

A pass through the model and back measures it, see `mcjax.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.models import weights
from mcjax.models.attention import Context
from mcjax.models.decoder import Decoder, Layer, Routed
from mcjax.models.language_model import run_layer
from mcjax.models.weights import Role
from mcjax.ops import Shifted
from mcjax.passes import Found, Visit, own_predictions, there_and_back

GROUPS = 4
"""Groups of a product's output features that have an importance of their own, at most."""

MEASURE = "gradient size"
"""What an artifact's manifest calls it."""

ABSORBED = "latent"
"""The tap of weights that no product has on its own; its tokens count as the mixer's inputs do."""

Importance = Found
"""By the names of weights, and `weights.EXPERTS` for what routed experts give together, float16
[N, T, groups]."""


def groups(role: Role) -> int:
    """How many groups a weight's output features are in.

    A group's Gram matrix should cost less than a product with its features does.
    """
    d_in, d_out = role.shape[-2:]
    fit = (n for n in range(GROUPS, 1, -1) if d_out % n == 0 and 2 * (d_out // n) >= d_in)
    return next(fit, 1)


def measure(
    decoder: Decoder,
    outside: Any,
    read: Callable[[int], Any],
    windows: np.ndarray,
    batch: int,
    directory: Path,
    progress: Callable[..., Any],
) -> list[Path]:
    """The importance of every token of calibration windows, layer by layer.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      read: gives the dense weights of layer i.
      windows: tokens int [N, T].
      batch: windows computed at once.
      directory: where what is found is kept, and found again by a later call.
      progress: wraps the iteration over both passes' layers, called with (items, description=...).

    Returns:
      For each layer the file of its `Importance`, see `mcjax.passes.read_found`.
    """

    def collect(batches):
        each = [jax.tree.map(np.asarray, of_batch) for of_batch in batches]
        return jax.tree.map(lambda *parts: _scaled(np.concatenate(parts)), *each)

    def visit(i, own):
        return Visit(partial(_backward, decoder.layers[i], decoder.norm_eps, own), collect)

    loss = own_predictions(decoder, outside)
    named = partial(progress, description="importance of tokens")
    return there_and_back(decoder, outside, windows, read, loss, visit, batch, directory, named)


def _scaled(importance: np.ndarray) -> np.ndarray:
    mean = np.mean(importance, axis=(0, 1), dtype=np.float64)
    # Of what nothing comes, no token is more important than another.
    scaled = np.where(mean > 0, importance / np.where(mean > 0, mean, 1), 1)
    return np.clip(scaled, 1e-4, 6e4).astype(np.float16)


def products(layer: Layer, width: int) -> Iterator[Role]:
    """The weights of a layer that `mcjax.dot` multiplies, but for routed experts."""
    for role in weights.roles(layer, width):
        if role.tap not in (None, ABSORBED) and not role.routed:
            yield role


@partial(jax.jit, static_argnums=(0, 1))
def _backward(layer: Layer, eps: float, own: Any, x: jax.Array, change: jax.Array):
    """The gradient by x, and importances before scaling, float32 [B, T, groups]."""
    batch, length, width = x.shape
    roles = {role.path: role for role in products(layer, width)}
    shifts = {path: jnp.zeros((*x.shape[:2], r.shape[-1])) for path, r in roles.items()}
    experts = (*weights.BLOCK, "shift")
    if isinstance(layer.block, Routed):
        shifts[experts] = jnp.zeros((batch * length, width))

    def moved(x, shifts):
        shifted = jax.tree.map(lambda leaf: leaf, own)
        for path, shift in shifts.items():
            at = shift if path == experts else Shifted(weights.get(own, path), shift)
            weights.put(shifted, path, at)
        context = Context(jnp.arange(length, dtype=jnp.int32)[None], None)
        return run_layer(layer, shifted, x, context, None, eps)[0]

    of_x, of_shifts = jax.vjp(moved, x, shifts)[1](change)

    def sizes(gradient, count):
        return jnp.linalg.norm(gradient.reshape(batch, length, count, -1), axis=-1)

    found = {r.name: sizes(of_shifts[path], groups(r)) for path, r in roles.items()}
    if experts in of_shifts:
        found[".".join(weights.EXPERTS)] = sizes(of_shifts[experts], 1)
    for role in weights.roles(layer, width):
        if role.tap == ABSORBED:
            every = [of_shifts[r.path] for r in roles.values() if r.tap == "mixer_input"]
            total = jnp.concatenate(every, axis=-1)
            found[role.name] = jnp.broadcast_to(sizes(total, 1), (batch, length, groups(role)))
    return of_x, found
