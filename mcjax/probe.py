"""What quantising each part of a model does to what the model says in the end.

For each part of each layer, see `mcjax.allocate`, a few calibration tokens go on through the model
as it was from what the layer gives with that part alone at `WIDTH` bits. At the end their
predictions are compared with the model's own: the mean divergence KL(model, probe), in nats a
token. Nothing is assumed about how errors grow on their way, and layers still come one by one: what
is held between them is one hidden state a token for each probe (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.weights import Role
from mcjax.vocabulary import divergence, head_of

WIDTH = 3
"""Planes of a probed part, or the most that it has."""

TOKENS = 512
"""How many tokens a probe follows, at most, unless a window is shorter: the first of whole windows
or of one."""


class Probed(NamedTuple):
    """Hidden states on their way.

    Attributes:
      windows: how many are followed, the first.
      length: how many tokens of each, the first.
      place: the layer and tap of each probe.
      states: float32, a probe's [windows, T, D] each.
    """

    windows: int
    length: int
    place: list[tuple[int, str]]
    states: list[np.ndarray]


def begin(length: int) -> Probed:
    """No probes yet, for windows of so many tokens."""
    return Probed(max(1, TOKENS // length), min(length, TOKENS), [], [])


def probed_width(widths: tuple[int, ...]) -> int:
    """The width at which a part of the widths is probed."""
    return WIDTH if WIDTH in widths else widths[-1]


def start(
    taps: Mapping[str, tuple[Role, ...]],
    own: Any,
    planes: Mapping[tuple[str, ...], BitPlanes],
    x: np.ndarray,
    run: Callable[[Any, np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """What a layer gives with one part at a time at few bits.

    Args:
      taps: the layer's parts.
      own: its weights, dense.
      planes: of those weights, by path.
      x: float32 [windows, T, D], what goes into it.
      run: (weights, x) -> what it gives.

    Returns:
      By tap float32 [windows, T, D].
    """
    found = {}
    for tap, roles in taps.items():
        changed = jax.tree.map(lambda leaf: leaf, own)
        for role in roles:
            of_role = planes[role.path]
            width = probed_width(of_role.widths)
            weights.put(changed, role.path, jnp.asarray(of_role.slice(width).dequantize()))
        found[tap] = run(changed, x)
    return found


def save(file: Path, states: Mapping[str, np.ndarray]) -> None:
    """Writes what a layer's probes start from, whole or not at all."""
    with whole(file) as aside, open(aside, "wb") as stream:
        np.savez(stream, *states.values(), taps=np.array(list(states)))


def restore(file: Path) -> dict[str, np.ndarray]:
    """Reads what `save` wrote."""
    with np.load(file) as held:
        return {tap: held[f"arr_{n}"] for n, tap in enumerate(held["taps"].tolist())}


def divergences(
    decoder: Decoder, outside: Any, exact: np.ndarray, probed: Probed
) -> dict[tuple[int, str], float]:
    """How far each probe's predictions are from the model's, nats a token.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      exact: float32 [windows, T, D], what the last layer gives for the tokens of the probes.
      probed: what it gives for the probes.
    """
    measure = partial(divergence, decoder, *head_of(decoder, outside, exact))
    return {
        place: float(measure(jnp.asarray(state), jnp.asarray(exact)))
        for place, state in zip(probed.place, probed.states, strict=True)
    }


@partial(jax.jit, static_argnames="widths")
def squared_changes(w: jax.Array, planes: BitPlanes, gram: jax.Array, widths: tuple[int, ...]):
    """``trace((W - W_k)' G (W - W_k))`` of a weight [d_in, d_out] at each width k.

    Groups of output features have Gram matrices of their own, [groups, d_in, d_in].
    """
    groups, d_in, _ = gram.shape
    changes = jnp.stack([w - planes.slice(k).dequantize() for k in widths])
    changes = changes.reshape(len(widths), d_in, groups, -1)
    products = jnp.einsum("gij,kjgo->kigo", gram, changes, precision="highest")
    return jnp.maximum(jnp.sum(changes * products, axis=(1, 2, 3)), 0)
