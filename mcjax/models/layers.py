"""Dense, convolution and batch normalisation that train and serve at every width of a `QuantSpec`.

Without a spec they are plain float layers. With one, ``bits=k`` computes with the weight as it will
be served at k planes and ``bits=None`` with the float weight; all widths share the parameters. With
``spec.frozen`` the kernel is `BitPlanes` of width k.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax import bitplane, qat
from mcjax.bitplane import BitPlanes
from mcjax.ops import dense
from mcjax.qat.quantizer import QuantSpec

HE_NORMAL = nn.initializers.he_normal()


def kernel(
    module: nn.Module,
    shape: tuple[int, ...],
    spec: QuantSpec | None,
    bits: int | None,
    init: Any = HE_NORMAL,
) -> jax.Array | BitPlanes:
    """A module's kernel [..., d_out] as the layer is to use it; as planes [d_in, d_out] if frozen.

    Args:
      module: owns the parameters `kernel` and, while training, `quantizer`.
      shape: of the kernel; all axes but the last are input features.
      spec: see `QuantSpec`.
      bits: the width, None for the float kernel.
      init: of the float kernel, (key, shape) -> array.

    Raises:
      ValueError: if `bits` is not one of the spec's widths, or a frozen layer is not given one.
    """
    matrix = (math.prod(shape[:-1]), shape[-1])
    if spec is None:
        if bits is not None:
            raise ValueError(f"bits {bits} was asked of a layer that has no QuantSpec")
        return module.param("kernel", init, shape)
    if bits is not None:
        spec.check(bits)
    if spec.frozen:
        if bits is None:
            raise ValueError("a frozen layer serves one width; give bits")
        group = spec.group_of(matrix[0])
        return module.param("kernel", lambda key: bitplane.empty(matrix, bits, group, spec.rotated))
    weight = module.param("kernel", init, shape)
    quantizer = module.param(
        "quantizer", lambda key: qat.init_quantizer(weight.reshape(matrix), spec)
    )
    if bits is None:
        return weight
    return qat.fake_quant(weight.reshape(matrix), quantizer, spec, bits).reshape(shape)


def activations(
    module: nn.Module, x: jax.Array, spec: QuantSpec | None, bits: int | None, axes: tuple[int, ...]
) -> jax.Array:
    """X as the layer multiplies it: rounded as the spec says, unless it computes in float.

    Args:
      module: owns the parameter `activation_step` if the step is learned.
      x: float array.
      spec: see `QuantSpec`.
      bits: the weights' width, None for float.
      axes: those that share a dynamic scale.
    """
    if spec is None or spec.act_bits is None:
        return x
    step = None
    if spec.act_bits < 8:
        # LSQ's start, 2 E|x| / sqrt(levels), for inputs of unit size.
        first = 2.0 / math.sqrt(2 ** (spec.act_bits - 1) - 1)
        step = module.param("activation_step", nn.initializers.constant(first), ())
    return x if bits is None else qat.fake_quant_activations(x, spec.act_bits, step, axes)


class Dense(nn.Module):
    """``x @ kernel + bias``; x [..., d_in] to [..., features].

    Attributes:
      features: d_out.
      spec: widths and groups, None for a plain layer.
      bits: the width to compute at, None for float.
      use_bias: whether to add a bias.
      kernel_init: of the kernel.
    """

    features: int
    spec: QuantSpec | None = None
    bits: int | None = None
    use_bias: bool = True
    kernel_init: Any = HE_NORMAL

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x [..., d_in]."""
        shape = (x.shape[-1], self.features)
        w = kernel(self, shape, self.spec, self.bits, self.kernel_init)
        x = activations(self, x, self.spec, self.bits, (-1,))
        y = jnp.dot(x, dense(w, x.dtype))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Conv(nn.Module):
    """Two-dimensional convolution, NHWC; the kernel's input features are (height, width, channel).

    Attributes:
      features: output channels.
      kernel_size: height and width.
      strides: of both axes.
      padding: as in `jax.lax.conv_general_dilated`.
      spec: widths and groups, None for a plain layer.
      bits: the width to compute at, None for float.
      use_bias: whether to add a bias.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: int = 1
    padding: Any = "SAME"
    spec: QuantSpec | None = None
    bits: int | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to x [B, H, W, C]."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        w = kernel(self, shape, self.spec, self.bits)
        x = activations(self, x, self.spec, self.bits, (1, 2, 3))
        y = jax.lax.conv_general_dilated(
            x,
            dense(w, x.dtype).reshape(shape),
            (self.strides, self.strides),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation with scale, bias and statistics of its own for every width and for float.

    Activations of different precisions have different statistics (Any-Precision DNN, arXiv
    1911.07346, section 3.2).

    Attributes:
      spec: whose widths get a row each; None for a single row.
      bits: the width whose row is used, None for that of the float network.
      momentum: of the running statistics.
      eps: added to the variance.
    """

    spec: QuantSpec | None = None
    bits: int | None = None
    momentum: float = 0.9
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises x [..., C] over all but the last axis; updates `batch_stats` if training."""
        every = () if self.spec is None else self.spec.widths
        row = 0 if self.bits is None else 1 + every.index(self.bits)
        shape = (1 + len(every), x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape)[row]
        bias = self.param("bias", nn.initializers.zeros, shape)[row]
        means = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variances = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        wide = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(wide, axis=axes)
            variance = jnp.mean((wide - mean) ** 2, axis=axes)
            if not self.is_initializing():
                for kept, new in ((means, mean), (variances, variance)):
                    old = kept.value[row]
                    blend = self.momentum * old + (1 - self.momentum) * new
                    kept.value = kept.value.at[row].set(blend)
        else:
            mean, variance = means.value[row], variances.value[row]
        y = (wide - mean) * jax.lax.rsqrt(variance + self.eps) * scale + bias
        return y.astype(x.dtype)
