"""A rotation of input features after which none of them is out of the ordinary.

A few input features of a trained weight are much larger than the others, and so are a few weights;
both are what low precision is worst at. With an orthogonal R that mixes all features,

    x W = (x R) (R' W),   R = D (A (x) B),

where D is a diagonal of signs and A (x) B the Kronecker product of two orthogonal matrices, R' W
has rows alike and so has x R, and rounding either loses less (QuIP#, arXiv 2402.04396; QuaRot,
arXiv 2404.00456). B is a Hadamard matrix, and A one times the cosine transform of what is left of
the size after all its factors of two. Everything follows from the number of features alone, so
weights of the same inputs share one rotation, and no file holds any of it (ours).
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

MOST_ODD = 255
"""The greatest odd factor of a size whose features are mixed by a cosine transform. Beyond it they
are mixed in so many parts, since the matrix of a great prime would be as large as a weight."""


def rotate(x: jax.Array) -> jax.Array:
    """X R of rows x [..., d], in x's dtype."""
    first, second = _matrices(x.shape[-1])
    return _mixed(_signed(x.astype(jnp.float32)), first, second).astype(x.dtype)


def unrotate(x: jax.Array) -> jax.Array:
    """X R' of rows x [..., d], in x's dtype: the inverse of `rotate`."""
    first, second = _matrices(x.shape[-1])
    y = _mixed(x.astype(jnp.float32), first.T, second.T)
    return _signed(y).astype(x.dtype)


def rotate_inputs(w: jax.Array) -> jax.Array:
    """R' W of weights [..., d, d_out]."""
    return jnp.swapaxes(rotate(jnp.swapaxes(w, -1, -2)), -1, -2)


def unrotate_inputs(w: jax.Array) -> jax.Array:
    """R W of weights [..., d, d_out]: the inverse of `rotate_inputs`."""
    return jnp.swapaxes(unrotate(jnp.swapaxes(w, -1, -2)), -1, -2)


def rotate_gram(gram: jax.Array) -> jax.Array:
    """R' H R of Gram matrices [..., d, d], the sums of x x' of inputs x."""
    return rotate_inputs(rotate(gram))


def _signed(x: jax.Array) -> jax.Array:
    """X D."""
    return x * _signs(x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))


def _mixed(y: jax.Array, first: np.ndarray, second: np.ndarray) -> jax.Array:
    """Y (first (x) second), of features in so many parts as these are smaller than they."""
    grid = y.reshape(*y.shape[:-1], -1, len(first), len(second))
    grid = jnp.einsum("...ab,bd->...ad", grid, second, precision="highest")
    return jnp.einsum("...ad,ac->...cd", grid, first, precision="highest").reshape(y.shape)


@lru_cache
def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B, float32, as nearly of one size as the factors of two allow."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    of_odd = _cosines(odd) if odd <= MOST_ODD else np.ones((1, 1))
    second = min(twos, max(0, int(np.ceil(np.log2(size) / 2))))
    first = np.kron(of_odd, _hadamard(twos - second))
    return first.astype(np.float32), _hadamard(second).astype(np.float32)


def _hadamard(twos: int) -> np.ndarray:
    """The orthogonal Hadamard matrix of size 2**twos."""
    matrix = np.ones((1, 1))
    for _ in range(twos):
        matrix = np.kron(np.array([[1, 1], [1, -1]]) / np.sqrt(2), matrix)
    return matrix


def _cosines(size: int) -> np.ndarray:
    """The orthogonal cosine transform (type II)."""
    row, column = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * row * (2 * column + 1) / (2 * size)) * np.sqrt(2 / size)
    return np.where(row == 0, np.sqrt(1 / size), matrix)


@lru_cache
def _signs(size: int) -> np.ndarray:
    """Fixed signs without a pattern: the top bits of a finaliser of integers (MurmurHash3)."""
    bits = np.arange(1, size + 1, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return (1 - 2 * ((bits >> np.uint32(31)).astype(np.float32))).astype(np.float32)
