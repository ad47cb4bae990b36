"""Rotary position embeddings (arXiv 2104.09864) and their published stretchings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.models.config import MixtralConfig


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (i, i + head_dim/2) of x [B, T, H, head_dim] by its angle.

    Args:
      x: queries or keys.
      cos: float32 [B or 1, T, head_dim / 2], from `angles`.
      sin: likewise.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def angles(config: MixtralConfig, positions: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for positions.

    Args:
      config: for its `rope`, `head_dim` and `max_position_embeddings`.
      positions: int [B or 1, T].
      length: tokens in the whole sequence, which `dynamic` and `longrope` adapt to.

    Returns:
      Two float32 [B or 1, T, head_dim / 2].
    """
    frequencies, scale = inverse_frequencies(config, length)
    phase = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    return jnp.cos(phase) * scale, jnp.sin(phase) * scale


def inverse_frequencies(config: MixtralConfig, length: int) -> tuple[np.ndarray, float]:
    """Frequencies float32 [head_dim / 2] and the factor on cosine and sine, as transformers has it.

    Args:
      config: for its `rope`, `head_dim` and `max_position_embeddings`.
      length: tokens in the whole sequence.
    """
    rope, dim = config.rope, config.head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = rope.rope_theta
    if rope.rope_type == "dynamic":
        longest = config.max_position_embeddings
        stretch = rope.factor * max(length, longest) / longest - (rope.factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    frequencies = (1.0 / np.float32(base) ** exponent).astype(np.float32)
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn(config, frequencies)
    if rope.rope_type == "llama3":
        return _llama3(config, frequencies), 1.0
    if rope.rope_type == "longrope":
        return _longrope(config, frequencies, length)
    return frequencies, 1.0


def _yarn(config: MixtralConfig, frequencies: np.ndarray) -> tuple[np.ndarray, float]:
    rope, dim = config.rope, config.head_dim
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


def _llama3(config: MixtralConfig, frequencies: np.ndarray) -> np.ndarray:
    rope = config.rope
    wavelength = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelength
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return ((1 - smooth) * frequencies / rope.factor + smooth * frequencies).astype(np.float32)


def _longrope(config: MixtralConfig, frequencies: np.ndarray, length: int):
    rope = config.rope
    original = rope.original_max_position_embeddings
    factor = rope.long_factor if length > original else rope.short_factor
    if len(factor) != len(frequencies):
        raise ValueError(f"longrope wants {len(frequencies)} factors, got {len(factor)}")
    scale = rope.attention_factor
    if scale is None:
        grown = rope.factor <= 1.0
        scale = 1.0 if grown else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    return frequencies / np.asarray(factor, np.float32), scale
