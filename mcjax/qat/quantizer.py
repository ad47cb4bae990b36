"""Weights that train as what they are served as: one code, its prefixes, a learned table for each.

A weight w and one table for each width k (the same numbers that `BitPlanes` stores, see
`mcjax.tables`) give the code

    c(w) = argmin_c sum_k lambda_k (w - W_k(c >> (n - k)))^2,      lambda_k = 4^k

over the n-bit codes c, and the weight at width k is ``W_k(c >> (n - k))``: *cascade downsampling*
drops the last bit to get from one precision to the next lower (arXiv 2212.05326), so what is
trained is what is sliced later. Tables train by their exact gradient, rounded to their eight bits
with a straight-through gradient; w trains by the straight-through gradient within the range of the
widest table. That the code serves all widths at once, and that tables are free at narrow widths, is
ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import rotation
from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes, pack, padded, resolve_group_size

_ENUMERATED = 4  # prefixes of so many bits are tried one by one; the rest follows in closed form


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How weights and activations of a layer are quantised.

    Attributes:
      widths: descending, the first being the code's.
      group_size: input features that share a table; None for one table an output channel.
      act_bits: 8 rounds activations dynamically, row by row; 2 to 7 with a learned step (LSQ, arXiv
        1902.08153); None leaves them.
      frozen: weights are `BitPlanes` of the one width that the layer is asked for, see `freeze`.
      rotated: whether input features are rotated before weights are quantised, see `BitPlanes`.
    """

    widths: tuple[int, ...] = (8, 4, 3, 2, 1)
    group_size: int | None = None
    act_bits: int | None = 8
    frozen: bool = False
    rotated: bool = False

    def __post_init__(self):
        widths = self.widths
        if not widths or list(widths) != sorted(set(widths), reverse=True):
            raise ValueError(f"widths must descend without repeats, got {widths}")
        if not 1 <= widths[-1] <= widths[0] <= 8:
            raise ValueError(f"widths must be 1 to 8, got {widths}")
        if self.act_bits is not None and not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must be None or 2 to 8, got {self.act_bits}")

    def group_of(self, d_in: int) -> int:
        """The group size for a weight of d_in input features."""
        if self.group_size is None:
            return padded(d_in)
        return resolve_group_size(d_in, self.group_size)

    def check(self, bits: int) -> None:
        """Raises ValueError unless `bits` is one of the widths."""
        if bits not in self.widths:
            raise ValueError(f"bits {bits} is not one of the widths {self.widths}")


def cascade(code: jax.Array, from_bits: int, to_bits: int) -> jax.Array:
    """Integer codes of one precision to those of a coarser one: the last bits are dropped.

    Args:
      code: unsigned integers below ``2**from_bits``, any shape.
      from_bits: their precision.
      to_bits: at most `from_bits`.

    Returns:
      ``code >> (from_bits - to_bits)``, same shape and dtype.

    Raises:
      ValueError: if `to_bits` is more than `from_bits` or either is not 1 to 8.
    """
    if not 1 <= to_bits <= from_bits <= 8:
        raise ValueError(f"cannot cascade from {from_bits} bits to {to_bits}: need 8 >= from >= to")
    return jnp.right_shift(code, jnp.asarray(from_bits - to_bits, jnp.asarray(code).dtype))


def init_quantizer(w: jax.Array, spec: QuantSpec) -> dict[str, dict[str, jax.Array]]:
    """Uniform tables that suit a weight's spread, as trainable parameters.

    Args:
      w: float [..., d_in, d_out].
      spec: widths and groups.

    Returns:
      For each width, "k": `steps` float32 [..., steps, groups, d_out], log2 of the step sizes, and
      `offset` float32 [..., groups, d_out], in half spans.
    """
    real = _grouped(jnp.ones_like(w), replace(spec, rotated=False))
    count = jnp.maximum(jnp.sum(real, axis=-2), 1)
    spread = jnp.sqrt(jnp.sum(_grouped(w, spec) ** 2, axis=-2) / count)[..., None, :, :]
    quantizer = {}
    for k in spec.widths:
        step = tables_lib.GAUSSIAN_STEP[k] * jnp.maximum(spread, 1e-6)
        firsts = np.cumsum((0, *tables_lib.segments(k)))[:-1]
        step = step * 2.0 ** (k - 2 - firsts.astype(np.float32))[:, None, None]
        offset = jnp.zeros_like(spread[..., 0, :, :])
        quantizer[str(k)] = {"steps": jnp.log2(step), "offset": offset}
    return quantizer


def from_planes(planes: BitPlanes) -> dict[str, dict[str, jax.Array]]:
    """The tables of planes as trainable parameters, see `init_quantizer`."""
    return {
        str(k): tables_lib.to_parameters(table)
        for k, table in zip(planes.widths, planes.tables, strict=True)
    }


def codes(w: jax.Array, quantizer: Any, spec: QuantSpec) -> jax.Array:
    """The code of every weight.

    Args:
      w: float [..., d_in, d_out].
      quantizer: see `init_quantizer`.
      spec: widths and groups.

    Returns:
      uint8 [..., padded d_in, d_out].
    """
    grouped = _grouped(w, spec)
    code, _, _ = _assign(grouped, _decode_all(quantizer, spec), spec)
    return code.reshape(*w.shape[:-2], -1, w.shape[-1]).astype(jnp.uint8)


def fake_quant(w: jax.Array, quantizer: Any, spec: QuantSpec, bits: int) -> jax.Array:
    """A weight as it will be served at a width, with gradients to the weight and its tables.

    Args:
      w: float [..., d_in, d_out].
      quantizer: see `init_quantizer`.
      spec: widths and groups.
      bits: one of the widths.

    Returns:
      The same shape and dtype: the values of ``freeze(...).slice(bits).dequantize()``, up to the
      rounding of their sums.

    Raises:
      ValueError: if `bits` is not one of the widths.
    """
    spec.check(bits)
    tables = _decode_all(quantizer, spec)
    grouped = _grouped(w, spec)  # [..., groups, group, d_out]
    code, low, high = _assign(*jax.lax.stop_gradient((grouped, tables)), spec)
    alpha, offset = tables[bits]
    value = _value(cascade(code, spec.widths[0], bits), alpha, offset, bits)
    inside = (grouped >= low) & (grouped <= high)
    passed = jnp.where(inside, grouped, jax.lax.stop_gradient(grouped))
    value = value + (passed - jax.lax.stop_gradient(passed))
    value = value.reshape(*w.shape[:-2], -1, w.shape[-1])[..., : w.shape[-2], :]
    value = rotation.unrotate_inputs(value) if spec.rotated else value
    return value.astype(w.dtype)


def freeze(w: jax.Array, quantizer: Any, spec: QuantSpec) -> BitPlanes:
    """The trained weight as `BitPlanes` with a table for each width.

    Args:
      w: float [..., d_in, d_out].
      quantizer: see `init_quantizer`.
      spec: widths and groups.
    """
    widths = tuple(reversed(spec.widths))
    group = spec.group_of(w.shape[-2])
    return BitPlanes(
        planes=pack(codes(w, quantizer, spec), widths[-1], group),
        tables=tuple(tables_lib.from_parameters(quantizer[str(k)], k) for k in widths),
        widths=widths,
        d_in=w.shape[-2],
        group_size=group,
        rotated=spec.rotated,
    )


def fake_quant_activations(
    x: jax.Array, bits: int = 8, step: jax.Array | None = None, axes: tuple[int, ...] = (-1,)
) -> jax.Array:
    """Activations rounded to signed integers times a step, with straight-through gradients.

    Args:
      x: float [..., features].
      bits: 2 to 8.
      step: float scalar, learned (LSQ, arXiv 1902.08153: its gradient is scaled by
        ``1 / sqrt(features * levels)``); None gives the largest magnitude over `axes` the top
        level.
      axes: see `step`; the default is row by row.

    Returns:
      The same shape and dtype.
    """
    top = 2 ** (bits - 1) - 1
    wide = x.astype(jnp.float32)
    if step is None:
        peak = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=axes, keepdims=True))
        scale = jnp.where(peak > 0, peak / top, 1.0)
    else:
        share = (x.shape[-1] * top) ** -0.5
        scale = tables_lib.straight_through(step * share, step)
    level = jnp.clip(wide / scale, -top, top)
    return (tables_lib.straight_through(level, jnp.round(level)) * scale).astype(x.dtype)


def _decode_all(quantizer: Any, spec: QuantSpec) -> dict[int, tuple[jax.Array, jax.Array]]:
    """For each width alpha [..., k, groups, d_out] and offset [..., groups, d_out], as stored."""
    return {k: tables_lib.decode_parameters(quantizer[str(k)], k) for k in spec.widths}


def _grouped(w: jax.Array, spec: QuantSpec) -> jax.Array:
    """[..., d_in, d_out] to float32 [..., groups, group, d_out], rotated and padded with zeros."""
    *batch, d_in, d_out = w.shape
    extra = padded(d_in) - d_in
    w = w.astype(jnp.float32)
    w = rotation.rotate_inputs(w) if spec.rotated else w
    w = jnp.pad(w, [(0, 0)] * len(batch) + [(0, extra), (0, 0)])
    return w.reshape(*batch, -1, spec.group_of(d_in), d_out)


def _value(code, alpha, offset, bits):
    """Codes [..., groups, group, d_out] to what they stand for at their own width."""
    value = offset[..., :, None, :]
    for p in range(bits):
        bit = (code >> (bits - 1 - p)) & 1
        step = alpha[..., p, :, None, :]
        value = value + jnp.where(bit == 1, step, -step)
    return value


def _assign(w, tables, spec):
    """Codes int32 of w [..., groups, group, d_out]; the least and greatest value at full width."""
    top = spec.widths[0]
    alpha, offset = tables[top]
    half = jnp.sum(alpha, axis=-3)
    low, high = (offset + sign * half for sign in (-1, 1))
    low, high = low[..., :, None, :], high[..., :, None, :]
    narrow = [k for k in spec.widths if k <= _ENUMERATED]
    first = max(narrow, default=min(top, _ENUMERATED))
    if len(tables_lib.segments(top)) == 2:
        first = tables_lib.segments(top)[0]
    rest = top - first  # bits after the enumerated prefix, which halve from one to the next

    prefix = jnp.arange(2**first).reshape(-1, *[1] * w.ndim)  # a leading axis of candidates
    if rest:
        delta = 2 * alpha[..., -1, :, None, :]
        start = low + sum(
            2 * alpha[..., p, :, None, :] * ((prefix >> (first - 1 - p)) & 1) for p in range(first)
        )
        tail = jnp.round((w - start) / jnp.where(delta > 0, delta, 1))
        tail = jnp.clip(tail, 0, 2**rest - 1)
        code = (prefix << rest) + tail.astype(jnp.int32)
        cost = 4.0**top * (w - start - delta * tail) ** 2
    else:
        code, cost = prefix, jnp.zeros((), w.dtype)
    for k in narrow:
        value = _value(prefix >> (first - k), tables[k][0], tables[k][1], k)
        cost = cost + 4.0**k * (w - value) ** 2
    best = jnp.argmin(cost, axis=0)
    code = jnp.broadcast_to(code, cost.shape)
    return jnp.take_along_axis(code, best[None], axis=0)[0].astype(jnp.int32), low, high
