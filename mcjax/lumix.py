"""LUMix: mixup and CutMix whose labels are uncertain.

Mixing puts label weights ``lambda_0`` and ``1 - lambda_0`` on two sources, but an object need not
fill its image, so the share of pixels is only a guess at the right label. LUMix (arXiv 2211.15846)
perturbs it while training:

    lambda = (1 - r_s - r_r) * lambda_0 + r_s * lambda_s + r_r * lambda_r

    lambda_s = p_a / (p_a + p_b) = sigmoid(z_a - z_b)     (no gradient flows through it)
    lambda_r ~ Beta(beta, beta)

with z_a and z_b the network's own logits of the two labels on the mixed image. That labels are
perturbed, for any network, is the abstract's; the formula is recalled from the paper, not checked
against it. The values of r_s, r_r and beta are not at hand: the defaults here are ours, see
`lumix`. The weight stays that of the first label, and the second has the rest.

    images, labels = mix(key, images, labels, mode="cutmix")
    loss = lumix()                        # a loss transform: wraps any soft-target loss
    loss(key, logits, labels)             # [B]

Shapes: B examples, H x W pixels, C channels of an image, or classes of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MODES = ("mixup", "cutmix")

R_S = 0.5
R_R = 0.0
BETA = 1.0
"""Ours, not the paper's, whose values are not at hand; `lumix` says what they rest on."""


class MixedLabels(NamedTuple):
    """The labels of mixed images.

    Attributes:
      first: int [B], labels of the images.
      second: int [B], labels of their partners.
      weight: float32 [B], lambda_0, the weight of `first`; `second` has the rest.
    """

    first: jax.Array
    second: jax.Array
    weight: jax.Array


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    mode: str = "mixup",
    per_example: bool = True,
) -> tuple[jax.Array, MixedLabels]:
    """Mixes each image of a batch with another one, its partner under a random permutation.

    With lambda ~ Beta(alpha, alpha):

    * ``"mixup"`` (arXiv 1710.09412, section 2): ``lambda * image + (1 - lambda) * partner``.
    * ``"cutmix"`` (arXiv 1905.04899, section 3.1, recalled): a box of sides
      ``H * sqrt(1 - lambda)`` and ``W * sqrt(1 - lambda)`` around a centre uniform over the image
      shows the partner. Boxes are clipped to the image, and the label weight is the share of
      pixels that still show the image. A pixel is in the box if its centre is (ours; the released
      code rounds sides to even numbers, which is coarse on small images).

    A permutation may map an image to itself, which leaves it as it is.

    Args:
      key: a PRNG key.
      images: float [B, H, W, C].
      labels: int [B].
      alpha: of the Beta distribution; 1 makes lambda uniform.
      mode: "mixup" or "cutmix".
      per_example: whether each example draws its own lambda and box (ours, the default), or one of
        each serves the batch (as both released codes do).

    Returns:
      The mixed images, like `images`, and their `MixedLabels`.

    Raises:
      ValueError: for an unknown mode, an empty batch, shapes or dtypes that do not fit, and an
        alpha that is not positive (unless traced).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    _check_scale("alpha", alpha)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be float [B, H, W, C], got {images.dtype} {images.shape}")
    if 0 in images.shape:
        raise ValueError(f"images of shape {images.shape} hold nothing to mix")
    batch, height, width, _ = images.shape
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be int [{batch}], got {labels.dtype} {labels.shape}")

    partner_key, weight_key, box_key = jax.random.split(key, 3)
    partner = jax.random.permutation(partner_key, batch)
    draws = batch if per_example else 1
    weight = jax.random.beta(weight_key, alpha, alpha, (draws,), jnp.float32)
    other = images[partner]
    if mode == "mixup":
        # bfloat16 images are mixed in float32: the weight on the label is then the one used.
        wide = jnp.float64 if images.dtype == jnp.float64 else jnp.float32
        share = weight[:, None, None, None].astype(wide)
        mixed = share * images.astype(wide) + (1 - share) * other.astype(wide)
        mixed = mixed.astype(images.dtype)
    else:
        side = jnp.sqrt(1 - weight)
        centre = jax.random.uniform(box_key, (2, draws))
        rows = _covered(height, centre[0], side)
        columns = _covered(width, centre[1], side)
        box = rows[:, :, None, None] & columns[:, None, :, None]
        mixed = jnp.where(box, other, images)
        pixels = jnp.sum(rows, axis=-1) * jnp.sum(columns, axis=-1)
        weight = (height * width - pixels).astype(jnp.float32) / (height * width)
    weight = jnp.broadcast_to(weight, (batch,))
    return mixed, MixedLabels(labels, labels[partner], weight)


def _covered(size, centre, side):
    """Which of `size` pixels have their centre in an interval, both in shares: bool [B, size]."""
    place = (jnp.arange(size).astype(jnp.float32) + 0.5) / size
    return jnp.abs(place - centre[:, None]) < side[:, None] / 2


def perturb(
    key: jax.Array | None,
    logits: jax.Array,
    labels: MixedLabels,
    r_s: float = R_S,
    r_r: float = R_R,
    beta: float = BETA,
) -> jax.Array:
    """The perturbed weight lambda of the first label; see the module for the formula.

    Args:
      key: a PRNG key; not used, and may be None, if `r_r` is 0.
      logits: float [B, C], the network's on the mixed images.
      labels: the labels of the mixed images.
      r_s: share of lambda_s, the network's own opinion.
      r_r: share of lambda_r, drawn for each example.
      beta: of lambda_r's Beta distribution; 1 makes it uniform.

    Returns:
      float32 [B], within 0 to 1, constant to differentiation by the logits; exactly
      `labels.weight` if both shares are 0.

    Raises:
      ValueError: for shapes that do not fit, an empty batch, and, unless traced, labels that are
        not classes, weights outside 0 to 1, shares outside 0 to 1 or of a sum above 1, a beta that
        is not positive, and a key of None if `r_r` is not 0.
    """
    _check_shares(r_s, r_r)
    _check_scale("beta", beta)
    logits, labels = _check_logits(logits, labels)
    return _perturb(key, logits, labels, r_s, r_r, beta)


def _perturb(key, logits, labels, r_s, r_r, beta):
    weight = labels.weight
    opinion, noise = not _is_zero(r_s), not _is_zero(r_r)
    if not opinion and not noise:
        return weight
    if noise and key is None:
        raise ValueError(f"a PRNG key is needed to draw lambda_r, as r_r is {r_r}")
    r_s, r_r = jnp.asarray(r_s, jnp.float32), jnp.asarray(r_r, jnp.float32)
    mixture = (1 - r_s - r_r) * weight
    if opinion:
        pair = jnp.stack([labels.first, labels.second], axis=-1)
        z = jnp.take_along_axis(jax.lax.stop_gradient(logits), pair, axis=-1).astype(jnp.float32)
        mixture += r_s * jax.nn.sigmoid(z[:, 0] - z[:, 1])
    if noise:
        mixture += r_r * jax.random.beta(key, beta, beta, weight.shape, jnp.float32)
    return jnp.clip(mixture, 0, 1)  # a sum of 1 can round to a little more


def soft_targets(labels: MixedLabels, num_classes: int, dtype=jnp.float32) -> jax.Array:
    """The two-hot distribution of mixed labels; one-hot where both labels are the same.

    Args:
      labels: the labels of the mixed images.
      num_classes: C.
      dtype: of the targets.

    Returns:
      `dtype` [B, C], nonnegative; rows sum to 1 (exactly so at the labels, in any float type).

    Raises:
      ValueError: for shapes that do not fit, an empty batch, and, unless traced, labels that are
        not classes and weights outside 0 to 1. Traced labels that are no classes get no weight.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return _soft_targets(_check_labels(labels, num_classes), num_classes, dtype)


def _soft_targets(labels, num_classes, dtype):
    # 1 - w is taken after the cast, as w + (1 - w) then rounds to 1 in every format.
    weight = labels.weight.astype(dtype)[:, None]
    first = jax.nn.one_hot(labels.first, num_classes, dtype=dtype)
    second = jax.nn.one_hot(labels.second, num_classes, dtype=dtype)
    return weight * first + (1 - weight) * second


def lumix(
    base_loss: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    *,
    r_s: float = R_S,
    r_r: float = R_R,
    beta: float = BETA,
) -> Callable[[jax.Array | None, jax.Array, MixedLabels], jax.Array]:
    """Turns a soft-target loss into one on mixed labels that are perturbed as LUMix does.

    With ``r_s = r_r = 0`` the loss is exactly that of plain mixing, `base_loss` with two-hot
    targets. No key is needed where `r_r` is 0, as by default.

    The defaults are ours. On digits with ten labels a class (`resnet8` and a small vision
    transformer, mixup and CutMix, five seeds, see benchmarks/README.md) no setting was more
    accurate than plain mixing. What `r_s` does there is to mend the low confidence that mixing
    leaves behind: 0.5 takes 5.5 points off the calibration error and 0.04 off the log-loss for 0.7
    points of accuracy, with a standard error of 0.4; more of it costs more. `r_r` alone made both
    worse at every value tried, whatever beta, so it is off. The gains that the paper reports are on
    ImageNet (+0.7 % for DeiT-S), where it may be worth a trial.

    Args:
      base_loss: a loss of logits [B, C] and targets [B, C] for each example, [B]; by default
        `optax.softmax_cross_entropy`.
      r_s: share of lambda_s, the network's own opinion.
      r_r: share of lambda_r, drawn for each example.
      beta: of lambda_r's Beta distribution; 1 makes it uniform.

    Returns:
      ``loss(key, logits, labels)`` of a PRNG key, logits float [B, C] and `MixedLabels`, which
      returns [B] and raises a ValueError as `perturb` does. Targets have the type of the logits.

    Raises:
      ValueError: for shares outside 0 to 1 or of a sum above 1, and a beta that is not positive
        (unless traced).
    """
    _check_shares(r_s, r_r)
    _check_scale("beta", beta)
    if base_loss is None:
        import optax  # here, so that `import mcjax` does not need it

        base_loss = optax.softmax_cross_entropy

    def loss(key: jax.Array | None, logits: jax.Array, labels: MixedLabels) -> jax.Array:
        logits, labels = _check_logits(logits, labels)
        labels = labels._replace(weight=_perturb(key, logits, labels, r_s, r_r, beta))
        losses = base_loss(logits, _soft_targets(labels, logits.shape[-1], logits.dtype))
        if losses.shape != labels.weight.shape:
            raise ValueError(
                f"base_loss returned {losses.shape} for logits {logits.shape}: "
                f"want {labels.weight.shape}, one loss for each example"
            )
        return losses

    return loss


def _traced(value):
    return isinstance(value, jax.core.Tracer)


def _is_zero(share):
    """Whether a share is known to be 0, so that its term and its inputs are left out."""
    return not _traced(share) and float(share) == 0


def _check_scale(name, value):
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be one number, got shape {np.shape(value)}")
    if not _traced(value) and not 0 < float(value) < np.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_shares(r_s, r_r):
    for name, share in (("r_s", r_s), ("r_r", r_r)):
        if np.ndim(share) != 0:
            raise ValueError(f"{name} must be one number, got shape {np.shape(share)}")
        if not _traced(share) and not 0 <= float(share) <= 1:
            raise ValueError(f"{name} must be 0 to 1, got {share}")
    if not _traced(r_s) and not _traced(r_r) and float(r_s) + float(r_r) > 1:
        raise ValueError(f"r_s + r_r must be at most 1, got {r_s} + {r_r}")


def _check_logits(logits, labels):
    logits = jnp.asarray(logits)
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be float [B, C], got {logits.dtype} {logits.shape}")
    labels = _check_labels(labels, logits.shape[-1])
    if labels.first.shape[0] != logits.shape[0]:
        raise ValueError(f"{labels.first.shape[0]} labels do not fit logits {logits.shape}")
    return logits, labels


def _check_labels(labels, num_classes):
    for name, label in (("first", labels.first), ("second", labels.second)):
        if not jnp.issubdtype(jnp.result_type(label), jnp.integer):
            raise ValueError(f"labels.{name} must be int, got {jnp.result_type(label)}")
    if not jnp.issubdtype(jnp.result_type(labels.weight), jnp.floating):
        raise ValueError(f"labels.weight must be float, got {jnp.result_type(labels.weight)}")
    shapes = [np.shape(x) for x in labels]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"first, second and weight must all be [B], got {shapes}")
    if shapes[0] == (0,):
        raise ValueError("the batch is empty: labels of shape (0,)")
    # In numpy: operations of jax on values that are known would be traced inside jit.
    for name, label in (("first", labels.first), ("second", labels.second)):
        if not _traced(label):
            low, high = np.asarray(label).min(), np.asarray(label).max()
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"labels.{name} reach from {low} to {high}, classes from 0 to {num_classes - 1}"
                )
    if not _traced(labels.weight):
        low, high = np.asarray(labels.weight).min(), np.asarray(labels.weight).max()
        if not (low >= 0 and high <= 1):  # so written, NaN is refused too
            raise ValueError(f"labels.weight must be 0 to 1, they reach from {low} to {high}")
    return MixedLabels(
        jnp.asarray(labels.first),
        jnp.asarray(labels.second),
        jnp.asarray(labels.weight).astype(jnp.float32),
    )
