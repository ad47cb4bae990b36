"""Residual networks (arXiv 1512.03385) in Flax Linen, at any precision of one set of weights."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax.models.layers import BatchNorm, Conv, Dense
from mcjax.qat import QuantSpec


class Block(nn.Module):
    """Two convolutions, or with `bottleneck` three, and a shortcut around them.

    Attributes:
      channels: of the 3x3 convolutions; a bottleneck gives out four times as many.
      strides: of the first 3x3 convolution (torchvision's form for bottlenecks, not the paper's,
        whose first 1x1 convolution strides).
      bottleneck: 1x1, 3x3 and 1x1 rather than two of 3x3.
      projection: whether a shortcut that changes shape is a 1x1 convolution (the paper's option B)
        or subsamples and pads channels with zeros (option A, no parameters).
      spec: see `mcjax.models.layers`; likewise `bits`.
      bits: see `spec`.
    """

    channels: int
    strides: int = 1
    bottleneck: bool = False
    projection: bool = False
    spec: QuantSpec | None = None
    bits: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """X [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), C']."""

        def conv(name, x, features, size, strides=1):
            x = Conv(
                features, (size, size), strides, spec=self.spec, bits=self.bits, name=f"conv_{name}"
            )(x)
            return BatchNorm(spec=self.spec, bits=self.bits, name=f"norm_{name}")(x, train)

        c = self.channels
        if self.bottleneck:
            y = nn.relu(conv("1", x, c, 1))
            y = nn.relu(conv("2", y, c, 3, self.strides))
            y = conv("3", y, 4 * c, 1)
        else:
            y = nn.relu(conv("1", x, c, 3, self.strides))
            y = conv("2", y, c, 3)
        if x.shape != y.shape:
            if self.projection:
                x = conv("shortcut", x, y.shape[-1], 1, self.strides)
            else:
                more = y.shape[-1] - x.shape[-1]
                x = x[:, :: self.strides, :: self.strides]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network on images.

    The first convolution and the last dense layer stay float, as in DoReFa-Net (arXiv 1606.06160)
    and Any-Precision DNN (arXiv 1911.07346); every other convolution is quantised, that of a
    projection shortcut included. Each width has its own batch normalisation, the first one too.

    Attributes:
      num_classes: logits.
      blocks: blocks in each stage; a stage halves the resolution (the first does not) and doubles
        the channels.
      channels: of the first stage.
      form: "cifar", whose stem is a 3x3 convolution and whose shortcuts have no parameters
        (section 4.2), or "imagenet", a 7x7 convolution of stride 2, max-pooling and projections.
      bottleneck: see `Block`.
      spec: how to quantise, None for plain float layers.
      bits: which of the spec's widths to compute with, None for float weights;
        `model.clone(bits=k)` has the same parameters.
      dtype: of activations and products; parameters and logits are float32.
    """

    num_classes: int
    blocks: tuple[int, ...]
    channels: int
    form: Literal["cifar", "imagenet"] = "cifar"
    bottleneck: bool = False
    spec: QuantSpec | None = None
    bits: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.form not in ("cifar", "imagenet"):
            raise ValueError(f"form must be 'cifar' or 'imagenet', got {self.form!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits of images.

        Args:
          x: [B, H, W, C], of about zero mean and unit variance.
          train: normalise by the batch and update `batch_stats`, which must then be mutable.

        Returns:
          float32 [B, num_classes].
        """
        x = x.astype(self.dtype)
        imagenet = self.form == "imagenet"
        size, strides = (7, 2) if imagenet else (3, 1)
        x = Conv(self.channels, (size, size), strides, name="stem")(x)
        x = nn.relu(BatchNorm(spec=self.spec, bits=self.bits, name="stem_norm")(x, train))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                x = Block(
                    self.channels * 2**stage,
                    2 if stage and not i else 1,
                    self.bottleneck,
                    imagenet,
                    self.spec,
                    self.bits,
                    name=f"stage_{stage}_block_{i}",
                )(x, train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return Dense(self.num_classes, name="head")(x)


def resnet20(num_classes: int = 10, **fields: Any) -> ResNet:
    """ResNet-20 of section 4.2 for 32x32 images; 269,722 parameters with 10 classes.

    `fields` are further ones of `ResNet`; likewise in the functions below.
    """
    return ResNet(num_classes, (3, 3, 3), 16, "cifar", **fields)


def resnet18(num_classes: int = 1000, **fields: Any) -> ResNet:
    """ResNet-18 for 224x224 images; 11,689,512 parameters with 1000 classes."""
    return ResNet(num_classes, (2, 2, 2, 2), 64, "imagenet", **fields)


def resnet50(num_classes: int = 1000, **fields: Any) -> ResNet:
    """ResNet-50 for 224x224 images; 25,557,032 parameters with 1000 classes."""
    return ResNet(num_classes, (3, 4, 6, 3), 64, "imagenet", bottleneck=True, **fields)


def resnet8(num_classes: int = 10, **fields: Any) -> ResNet:
    """One block a stage, for 8x8 images."""
    return ResNet(num_classes, (1, 1, 1), 16, "cifar", **fields)
