"""Vision transformers (arXiv 2010.11929, 2012.12877) at any precision of one set of weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax.models.layers import Conv, Dense
from mcjax.qat import QuantSpec

# As in the released code of arXiv 2010.11929 (recalled); with He's kernels the first attention
# weights are sharp, and training on digits was slower.
dense = partial(Dense, kernel_init=nn.initializers.xavier_uniform())


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32.

    Attributes:
      heads: that share the features evenly.
      spec: see `mcjax.models.layers`; likewise `bits`.
      bits: see `spec`.
    """

    heads: int
    spec: QuantSpec | None = None
    bits: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, D] to [B, T, D]."""
        batch, length, dim = x.shape
        qkv = dense(3 * dim, spec=self.spec, bits=self.bits, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        out = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape)
        return dense(dim, spec=self.spec, bits=self.bits, name="out")(out)


class Block(nn.Module):
    """Attention and a GELU MLP, each normalised before and added back.

    Attributes:
      heads: of the attention.
      hidden: features inside the MLP.
      spec: see `mcjax.models.layers`; likewise `bits`.
      bits: see `spec`.
    """

    heads: int
    hidden: int
    spec: QuantSpec | None = None
    bits: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """X [B, T, D] to [B, T, D]."""
        h = norm("attention_norm", x)
        x = x + Attention(self.heads, self.spec, self.bits, name="attention")(h)
        h = norm("mlp_norm", x)
        h = dense(self.hidden, spec=self.spec, bits=self.bits, name="up")(h)
        h = nn.gelu(h, approximate=False)
        return x + dense(x.shape[-1], spec=self.spec, bits=self.bits, name="down")(h)


def norm(name: str, x: jax.Array) -> jax.Array:
    """Layer normalisation within a compact method; all widths share its parameters."""
    return nn.LayerNorm(epsilon=1e-6, dtype=x.dtype, name=name)(x)


class ViT(nn.Module):
    """A vision transformer that reads its class token.

    The dense layers inside the blocks are quantised; the patch embedding and the head, as first
    and last layers, and the products of attention itself stay float.

    Attributes:
      num_classes: logits.
      patch: side of a patch; must divide the image's.
      dim: features of a token.
      depth: blocks.
      heads: of each attention; must divide `dim`.
      position_scale: standard deviation of the position embeddings before training. The published
        0.02 suits long training on patches of many pixels.
      spec: how to quantise, None for plain float layers.
      bits: which of the spec's widths to compute with, None for float weights;
        `model.clone(bits=k)` has the same parameters.
      dtype: of activations and products; parameters and logits are float32.
    """

    num_classes: int
    patch: int
    dim: int
    depth: int
    heads: int
    position_scale: float = 0.02
    spec: QuantSpec | None = None
    bits: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
          x: [B, H, W, C], of about zero mean and unit variance.
          train: no effect: nothing here is normalised by the batch.

        Returns:
          float32 [B, num_classes].
        """
        batch, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patches of {self.patch} do not tile an image of {height}x{width}")
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads cannot share {self.dim} features")
        size = (self.patch, self.patch)
        x = Conv(
            self.dim, size, self.patch, padding="VALID", use_bias=True, name="patch_embedding"
        )(x.astype(self.dtype))
        x = x.reshape(batch, -1, self.dim)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim))
        token = jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.dim))
        x = jnp.concatenate([token, x], axis=1)
        shape = (1, *x.shape[1:])
        first = nn.initializers.normal(self.position_scale)
        x = x + self.param("positions", first, shape).astype(x.dtype)
        for i in range(self.depth):
            x = Block(self.heads, 4 * self.dim, self.spec, self.bits, name=f"block_{i}")(x)
        x = norm("norm", x[:, 0]).astype(jnp.float32)
        return dense(self.num_classes, name="head")(x)


def vit_tiny(num_classes: int = 1000, **fields: Any) -> ViT:
    """ViT-Ti/16, DeiT-Ti's architecture; 5,717,416 parameters at 224x224 with 1000 classes.

    `fields` are further ones of `ViT`; likewise in the functions below.
    """
    return ViT(num_classes, patch=16, dim=192, depth=12, heads=3, **fields)


def vit_small(num_classes: int = 1000, **fields: Any) -> ViT:
    """ViT-S/16, DeiT-S's architecture; 22,050,664 parameters at 224x224 with 1000 classes."""
    return ViT(num_classes, patch=16, dim=384, depth=12, heads=6, **fields)


def vit_digits(num_classes: int = 10, **fields: Any) -> ViT:
    """Four blocks of 64 features on patches of 2, for 8x8 images.

    Positions start about as large as what they are added to: a float network got to 92 rather than
    79 % on digits in 30 epochs.
    """
    fields = {"position_scale": 0.5, **fields}
    return ViT(num_classes, patch=2, dim=64, depth=4, heads=4, **fields)
