"""The entry point of quantisation: checks, padding, leading axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import rotation
from mcjax.bitplane import BitPlanes, pack, padded, resolve_group_size
from mcjax.quantize import gram as gram_lib
from mcjax.quantize.nested import quantize_matrix
from mcjax.tables import MAX_MAGNITUDE

CHUNK = 1 << 24
"""Weights that are quantised at once: by estimate 2 GB of working memory at four widths."""


WEIGHTS = (1.0, 4.0, 16.0, 64.0, 6.4, 6.4, 6.4, 6.4)
"""The lambda_k that a code minimises ``sum_k lambda_k error_k`` with, from 1 bit up. Each width has
about a quarter of the error of the one below it, so up to 4 bits all count alike. Wider ones count
a tenth of the fourth, so that the first four planes are about as good as with none after them."""

MANY_WEIGHTS = (1.0, 4.0, 16.0, 52.0, 4.8, 4.8, 4.8, 4.8)
"""The same where several widths are wider than 4 bits: each of those pulls the first four planes
towards what serves it, much as 4 bits do, so all of these count less."""


def usual_weights(widths: Sequence[int]) -> tuple[float, ...]:
    """How much the error of each of these widths counts."""
    each = MANY_WEIGHTS if sum(k > 4 for k in widths) > 1 else WEIGHTS
    return tuple(each[k - 1] for k in widths)


def quantize(
    w: jax.Array,
    bits: int = 4,
    group_size: int | None = None,
    gram: jax.Array | None = None,
    *,
    widths: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    rotated: bool = False,
    damping: float = 0.03,
    sweeps: int = 6,
    chunk: int = CHUNK,
) -> BitPlanes:
    """Quantises a weight once, for every width up to `bits`.

    Args:
      w: float [..., d_in, d_out]; leading axes (experts) are independent.
      bits: number of planes, 1 to 8.
      group_size: input features that share a table entry, a multiple of 32 that divides d_in
        (padded to whole words); by default the largest up to 128.
      gram: float [..., d_in, d_in], sums of x x' over calibration inputs x; None minimises the
        plain squared error of the weights.
      widths: widths that get a table, ascending up to `bits`; by default 1..bits.
      weights: lambda_k, how much each width's error counts; by default `usual_weights`.
      rotated: rotates input features first, see `mcjax.rotation`; for trained weights and inputs,
        of which some stand out.
      damping: fraction of the Gram matrix's mean diagonal added to its diagonal.
      sweeps: rounds of coordinate descent after the GPTQ pass.
      chunk: most weights that are worked on at once, which bounds the memory and changes nothing
        else: as many experts as that makes, or a part of one's output features.

    Returns:
      `BitPlanes` of logical shape [..., d_in, d_out] with a table for each of `widths`.

    Raises:
      ValueError: for shapes, widths, group sizes or values that cannot be quantised.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    widths = tuple(range(1, bits + 1)) if widths is None else tuple(int(k) for k in widths)
    if not widths or widths[-1] != bits or sorted(set(widths)) != list(widths) or widths[0] < 1:
        raise ValueError(f"widths must ascend from at least 1 to bits={bits}, got {widths}")
    weights = usual_weights(widths) if weights is None else tuple(weights)
    if len(weights) != len(widths) or min(weights) <= 0:
        raise ValueError(f"weights must be {len(widths)} positive numbers, got {weights}")
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be float [..., d_in, d_out], got {w.dtype} {w.shape}")
    d_in = w.shape[-2]
    if gram is not None and gram.shape != (*w.shape[:-1], d_in):
        raise ValueError(f"gram {gram.shape} does not fit w {w.shape}: want [..., d_in, d_in]")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 weight, got {chunk}")
    group_size = resolve_group_size(d_in, group_size)
    _check_values("w", w, MAX_MAGNITUDE)
    if gram is not None:
        _check_values("gram", gram, np.inf)
    return _quantize(
        w,
        gram,
        widths=widths,
        weights=weights,
        group_size=group_size,
        rotated=rotated,
        damping=damping,
        sweeps=sweeps,
        chunk=chunk,
    )


@partial(jax.jit, static_argnames=("widths", "weights", "group_size", "rotated", "chunk"))
def _quantize(w, gram, *, widths, weights, group_size, rotated, damping, sweeps, chunk):
    d_in = w.shape[-2]
    extra = padded(d_in) - d_in
    w = w.astype(jnp.float32)
    if gram is not None:
        gram = gram_lib.condition(gram, damping)
    if rotated:
        w = rotation.rotate_inputs(w)
        gram = None if gram is None else rotation.rotate_gram(gram)
    w = jnp.pad(w, [(0, 0)] * (w.ndim - 2) + [(0, extra), (0, 0)])
    if gram is not None:
        gram = gram_lib.pad(gram, padded(d_in))
    leading, d_out = w.shape[:-2], w.shape[-1]
    w, gram = jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), (w, gram))
    columns = min(d_out, max(1, chunk // w.shape[-2]))

    def one(matrix):
        return quantize_matrix(
            *matrix,
            widths=widths,
            weights=weights,
            group_size=group_size,
            sweeps=sweeps,
            columns=columns,
        )

    at_once = max(1, chunk // (w.shape[-2] * d_out))
    with jax.default_matmul_precision("highest"):  # a GPU would round to 10 bits
        codes, tables = jax.lax.map(one, (w, gram), batch_size=min(at_once, len(w)))
    codes, tables = jax.tree.map(lambda a: a.reshape(*leading, *a.shape[1:]), (codes, tables))
    return BitPlanes(
        planes=pack(codes, widths[-1], group_size),
        tables=tables,
        widths=widths,
        d_in=d_in,
        group_size=group_size,
        rotated=rotated,
    )


def _check_values(name, value, limit):
    """Refuses NaN, infinity and values out of range, where the array is concrete."""
    if isinstance(value, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        unusable, peak = (fact.item() for fact in _facts(value))
    if unusable:
        raise ValueError(f"{name} holds {unusable} NaN or infinite values")
    if peak > limit:
        raise ValueError(f"{name} has a magnitude of {peak}, the most that fits is {limit}")


@jax.jit
def _facts(value):
    """How many values are not finite, and the greatest magnitude."""
    return jnp.sum(~jnp.isfinite(value)), jnp.max(jnp.abs(value), initial=0)
