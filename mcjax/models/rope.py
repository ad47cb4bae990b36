"""Rotary position embeddings (arXiv 2104.09864) and their published stretchings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched beyond its trained length.

    Attributes mean what transformers' `rope_parameters` of the same names mean; factors of longrope
    are tuples of head_dim / 2 numbers.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


STRETCHED = ("dynamic", "longrope")
"""Kinds that depend on the length of the whole sequence, for which a cache's slots stand."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of some features.

    Attributes:
      config: base and stretching.
      dim: how many features are rotated, the first of a head.
      longest: positions that the model was made for.
      interleaved: whether neighbours make a pair (2 i, 2 i + 1), or halves (i, i + dim / 2).
    """

    config: RopeConfig
    dim: int
    longest: int
    interleaved: bool = False


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Turns each pair of the first features of x [B, T, H, head_dim] by its angle.

    Args:
      x: queries or keys.
      cos: float32 [B or 1, T, dim / 2], from `angles`.
      sin: likewise.
      interleaved: see `Rope`; the result has halves in any case, which scores do not notice.
    """
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def angles(rope: Rope, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions.

    Args:
      rope: of the features.
      positions: int [B or 1, T].
      length: tokens in the whole sequence, which `dynamic` and `longrope` adapt to.

    Returns:
      Two float32 [B or 1, T, dim / 2].
    """
    frequencies, scale = inverse_frequencies(rope, length)
    phase = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None]
    return jnp.cos(phase) * scale, jnp.sin(phase) * scale


def inverse_frequencies(own: Rope, length: int) -> tuple[np.ndarray, float]:
    """Frequencies float32 [dim / 2] and the factor on cosine and sine, as transformers has it.

    Args:
      own: of the features.
      length: tokens in the whole sequence.
    """
    rope, dim = own.config, own.dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = rope.rope_theta
    if rope.rope_type == "dynamic":
        longest = own.longest
        stretch = rope.factor * max(length, longest) / longest - (rope.factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    frequencies = (1.0 / np.float32(base) ** exponent).astype(np.float32)
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(own, frequencies)
    if rope.rope_type == "llama3":
        return _llama3(own, frequencies), 1.0
    if rope.rope_type == "proportional":
        turning = int(rope.partial_rotary_factor * dim // 2)
        still = np.arange(dim // 2) >= turning  # whose partners lie half a head away all the same
        return np.where(still, np.float32(0), frequencies / np.float32(rope.factor)), 1.0
    if rope.rope_type == "longrope":
        return _longrope(own, frequencies, length)
    return frequencies, 1.0


def _yarn(own: Rope, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    rope, dim = own.config, own.dim
    original = rope.original_max_position_embeddings

    def correction(rotations):
        return (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))
        )

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    mixed = frequencies / np.float32(rope.factor) * (1 - keep) + frequencies * keep

    def magnitude(scale):
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return mixed.astype(np.float32), rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mixed.astype(np.float32), magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return mixed.astype(np.float32), magnitude(1.0)


def _llama3(own: Rope, frequencies: np.ndarray) -> np.ndarray:
    rope = own.config
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelength
    # Where both factors are the same, the step between them is a jump.
    between = max(rope.high_freq_factor - rope.low_freq_factor, 1e-9)
    smooth = (turns - rope.low_freq_factor) / between
    smooth = np.clip(smooth, 0, 1)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)


def _longrope(own: Rope, frequencies: np.ndarray, length: int):
    rope = own.config
    original = rope.original_max_position_embeddings
    factor = rope.long_factor if length > original else rope.short_factor
    if len(factor) != len(frequencies):
        raise ValueError(f"longrope wants {len(frequencies)} factors, got {len(factor)}")
    scale = rope.attention_factor
    if scale is None:
        grown = rope.factor <= 1.0
        scale = 1.0 if grown else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    return frequencies / np.asarray(factor, np.float32), scale
