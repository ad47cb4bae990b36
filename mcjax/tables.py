"""Eight-bit tables: how the few numbers that turn bits into weights are stored.

At width `k` a group of one output channel has step sizes ``alpha[0..k-1] >= 0`` and an `offset`.
A table stores them as bytes that need no scale of their own:

    alpha  = 2^(taper((c - 128) / 16) - 5)              for c = 1..255, and 0 for c = 0
    offset = (q - 128) / 64 * sum_p alpha_p             for q = 0..255

where `taper` is the identity on [-6, 6] and eight times as steep outside. So steps from 2^-11 to 2,
where trained weights have theirs, are stored to 2.2 % at worst, and every step from 2^-26 to 2^16
to 19 % (codes are chosen after rounding). Offsets are relative to the half span of the group's
values, so +-2 half spans are reached. No table costs more than 32 bits a group. Planes come in
*segments*, of which each stores the alpha of its first plane, and those after it halve it. Widths 1
to 3 have a segment a plane, widths 4 to 6 are one, the uniform quantiser, and widths 7 and 8 have
one of four planes and one of the others: a narrow width clips groups that a wide one must reach the
ends of, which a second step does without moving the first four planes. The encoding is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FREE_WIDTHS = 3
_UNIFORM_WIDTHS = 6
_HEAD = 4

GAUSSIAN_STEP = (0.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
"""Step of the best uniform quantiser of a unit Gaussian at each width (Max, 1960)."""

MAX_MAGNITUDE = 2.0**16
"""Weights beyond this cannot be represented; rescale them first."""

_STEPS_PER_OCTAVE = 16
_CENTER = -5.0
_FINE_OCTAVES = 6.0
_TAPER = 7.0  # what the slope gains beyond the fine octaves
_OFFSET_STEPS = 64.0


def num_rows(width: int) -> int:
    """Bytes that a table of `width` bits keeps for each group of an output channel."""
    return num_steps(width) + 1


def segments(width: int) -> tuple[int, ...]:
    """The planes of each segment of a width, from the first."""
    if width <= _FREE_WIDTHS:
        return (1,) * width
    return (width,) if width <= _UNIFORM_WIDTHS else (_HEAD, width - _HEAD)


def num_steps(width: int) -> int:
    """Step sizes that a table of `width` bits stores: one a segment."""
    return len(segments(width))


def basis(width: int) -> np.ndarray:
    """How stored steps make up the alphas of a width.

    Returns:
      float32 [steps, width]: ``alpha = steps @ basis(width)``; each row halves from 1 over the
      planes of its segment.
    """
    rows, first = np.zeros((num_steps(width), width), np.float32), 0
    for row, planes in zip(rows, segments(width), strict=True):
        row[first : first + planes] = 0.5 ** np.arange(planes)
        first += planes
    return rows


def alphas(steps: jax.Array, width: int) -> jax.Array:
    """Steps [..., steps, groups, d_out] as alphas [..., width, groups, d_out]."""
    if num_steps(width) == width:
        return steps
    halves = [0.5 ** np.arange(n, dtype=np.float32)[:, None, None] for n in segments(width)]
    each = [steps[..., s : s + 1, :, :] * half for s, half in enumerate(halves)]
    return jnp.concatenate(each, axis=-3)


def round_step(step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest storable step, by ratio.

    Args:
      step: float array of any shape; negative entries are stored as 0.

    Returns:
      The uint8 code and the float32 value that it stands for, each of `step`'s shape.
    """
    exponent = jnp.log2(jnp.maximum(step, 2.0**-40)) - _CENTER
    beyond = exponent - jnp.clip(exponent, -_FINE_OCTAVES, _FINE_OCTAVES)
    exponent = exponent - beyond * _TAPER / (_TAPER + 1)
    code = jnp.clip(jnp.round(exponent * _STEPS_PER_OCTAVE) + 128, 0, 255).astype(jnp.uint8)
    return code, step_value(code)


def round_offset(offset: jax.Array, half_span: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest storable offset given ``half_span = sum_p alpha_p`` (same shape): code and value."""
    unit = half_span / _OFFSET_STEPS
    ratio = jnp.where(unit > 0, offset / jnp.where(unit > 0, unit, 1), 0)
    code = jnp.clip(jnp.round(ratio), -128, 127) + 128
    return code.astype(jnp.uint8), (code - 128) * unit


def decode(table: Any, width: int) -> tuple[jax.Array, jax.Array]:
    """Reads a table.

    Args:
      table: uint8 [..., num_rows(width), groups, d_out]; or, as it trains, see `to_parameters`.
      width: the number of planes that the table goes with.

    Returns:
      alpha float32 [..., width, groups, d_out] and offset float32 [..., groups, d_out].
    """
    if isinstance(table, Mapping):
        return decode_parameters(table, width)
    alpha = alphas(step_value(table[..., :-1, :, :]), width)
    return alpha, offset_ratio(table[..., -1, :, :]) * jnp.sum(alpha, axis=-3)


@jax.jit
def to_parameters(table: jax.Array) -> dict[str, jax.Array]:
    """A table as what trains.

    Args:
      table: uint8 [..., num_rows(width), groups, d_out].

    Returns:
      `steps` float32 [..., num_steps(width), groups, d_out], log2 of the step sizes, and `offset`
      float32 [..., groups, d_out], in half spans. A step of 0 becomes one that is far too small to
      be stored as anything else.
    """
    steps = step_value(table[..., :-1, :, :])
    return {
        "steps": jnp.log2(jnp.maximum(steps, 2.0**-30)),
        "offset": offset_ratio(table[..., -1, :, :]),
    }


@partial(jax.jit, static_argnums=1)
def from_parameters(parameters: Mapping[str, jax.Array], width: int) -> jax.Array:
    """The inverse of `to_parameters`, rounded to what can be stored."""
    codes, steps = round_step(jnp.exp2(parameters["steps"]))
    half = jnp.sum(_mixed(steps, width), axis=-3)
    offset, _ = round_offset(parameters["offset"] * half, half)
    return jnp.concatenate([codes, offset[..., None, :, :]], axis=-3)


def decode_parameters(
    parameters: Mapping[str, jax.Array], width: int
) -> tuple[jax.Array, jax.Array]:
    """As `decode` of `from_parameters`, with gradients as if nothing were rounded."""
    steps = jnp.exp2(parameters["steps"])
    alpha = _mixed(straight_through(steps, round_step(steps)[1]), width)
    half = jnp.sum(alpha, axis=-3)
    offset = parameters["offset"] * half
    return alpha, straight_through(offset, round_offset(offset, half)[1])


def straight_through(smooth: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of `smooth`."""
    return smooth + jax.lax.stop_gradient(value - smooth)


def _mixed(steps: jax.Array, width: int) -> jax.Array:
    """As `alphas`, of which the derivative would be a sum of what was broadcast."""
    # No sum of broadcast arrays: XLA on CPU gets some of those wrong, see `mcjax.quantize.nested`.
    return jnp.einsum("...sgo,sp->...pgo", steps, basis(width), precision="highest")


def offset_ratio(code: jax.Array) -> jax.Array:
    """What a stored offset stands for, in half spans."""
    return code.astype(jnp.float32) / _OFFSET_STEPS - 128 / _OFFSET_STEPS


def step_value(code: jax.Array) -> jax.Array:
    """The step size that a code stands for."""
    exponent = code.astype(jnp.float32) / _STEPS_PER_OCTAVE - 128 / _STEPS_PER_OCTAVE
    # The taper's three lines: of slope 1 in the middle, above the lower and below the upper one.
    steep, reach = (1 + _TAPER) * exponent, _TAPER * _FINE_OCTAVES
    tapered = jnp.maximum(jnp.minimum(exponent, steep + reach), steep - reach)
    return jnp.where(code == 0, 0.0, jnp.exp2(tapered + _CENTER))
