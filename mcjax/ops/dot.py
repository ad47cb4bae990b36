"""Products of activations with dense or plane weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.ops.grouped import Weight, expert_map
from mcjax.ops.popcount import popcount_dot


def dense(weight: Weight, dtype=jnp.float32) -> jax.Array:
    """The weight as an array [..., d_in, d_out] of `dtype`, dequantised if it is planes."""
    if isinstance(weight, BitPlanes | MixedPlanes):
        return weight.dequantize(dtype)
    return weight.astype(dtype)


def dot(x: jax.Array, planes: Weight, act_bits: int | None = None) -> jax.Array:
    """Activations times one weight.

    Args:
      x: float [..., d_in].
      planes: a weight of logical shape [d_in, d_out].
      act_bits: None multiplies in x's own type; 8 rounds every row of x to int8 first and counts
        bits, a deliberate change of numerics.

    Returns:
      [..., d_out] of x's dtype.

    Raises:
      ValueError: if shapes do not fit or `act_bits` is neither None nor 8.
    """
    if len(planes.shape) != 2 or x.shape[-1] != planes.shape[0]:
        raise ValueError(f"x {x.shape} does not multiply a weight of shape {planes.shape}")
    if act_bits is None:
        return jnp.dot(x, dense(planes, x.dtype))
    if act_bits != 8 or not isinstance(planes, BitPlanes):
        raise ValueError(f"act_bits must be None, or 8 with BitPlanes; got {act_bits}")
    return popcount_dot(x, planes)


def expert_dot(
    x: jax.Array,
    planes: Weight,
    index: jax.Array,
    keep: jax.Array | None = None,
    act_bits: int | None = None,
) -> jax.Array:
    """Every token times each of the experts it is routed to.

    Args:
      x: float [T, d_in].
      planes: a weight of logical shape [E, d_in, d_out].
      index: int [T, K], the experts of each token.
      keep: bool [T, K]; pairs that are not kept are not computed and give zeros. None keeps all.
      act_bits: as in `dot`.

    Returns:
      [T, K, d_out] of x's dtype.

    Raises:
      ValueError: if shapes do not fit.
    """
    if x.ndim != 2 or len(planes.shape) != 3 or x.shape[1] != planes.shape[1]:
        raise ValueError(f"x {x.shape} does not multiply experts of shape {planes.shape}")
    if index.shape[:1] != x.shape[:1] or (keep is not None and keep.shape != index.shape):
        raise ValueError(
            f"index {index.shape} and keep {None if keep is None else keep.shape} must be "
            f"[{x.shape[0]}, K]"
        )
    tokens, k = index.shape
    out = expert_map(
        partial(_one_dot, act_bits),
        (planes,),
        jnp.repeat(x, k, axis=0),
        index.reshape(-1),
        None if keep is None else keep.reshape(-1),
    )
    return out.reshape(tokens, k, -1)


def _one_dot(act_bits, weights, rows):
    (weight,) = weights
    return dot(rows, weight, act_bits)
