"""Online dynamic pruning: experts of small routing weight are skipped, token by token.

Expert j of a token, ranked by routing weight w_0 >= w_1 >= ..., is computed only if

    w_j / w_0 >= mu_j

and the first always is (MC-MoE, arXiv 2410.06270, section 3.3, there for two experts with mu the
median of w_1 / w_0 on calibration text). The most important tokens of a prefill are protected: all
their experts are computed. While decoding, a token's future readers are unknown, so nothing
protects it (ours).

What takes a skipped expert's place is the policy:

* ``"paper"``: nothing, and the remaining weights are scaled to the sum that all had. Of more than
  two experts each rank has a mu of its own, at one quantile.
* ``"affine"`` (ours, the default): an estimate of the expert's output from that of the token's
  first expert, ``f_e(x) = intercept_e + slope_e f_first(x)``, under the expert's own weight. One
  vector and one number for each expert, fitted on calibration text. All ranks have one mu. On one
  trained Mixtral it cost less than half as much as the paper's policy at equal skips, on another as
  much, see benchmarks/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

POLICIES = ("affine", "paper")
QUANTILE = 0.3
"""Share of lower-ranked experts that falls under mu on calibration text; of two, 15 % of all."""

PROTECTED_SHARE = 0.02
LEVELS = np.linspace(0, 1, 101)
"""Where the quantiles of w_j / w_0 are kept, so that a threshold can be chosen when serving."""


class PruningStatistics(NamedTuple):
    """What calibration says of one layer's pruning.

    Attributes:
      ratio: float32 [K - 1, 101], quantiles of w_j / w_0 for j = 1..K-1 at `LEVELS`.
      slope: float32 [E], least squares with weight w^2 over the tokens that have the expert at rank
        1 or lower, moved a quarter of the way to the published rule's 1; likewise `intercept`, to
        its 0. Experts that have few such tokens lean on their layer's.
      intercept: float32 [E, D].
    """

    ratio: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray


def token_importance(
    hidden: jax.Array, attention: jax.Array | None, length: jax.Array | None = None
) -> jax.Array:
    """How much each token matters to those after it.

    ``I_j = ||t_j||_1 * sum_{i>=j} A[i, j] / (length - j)``: the token's size times the attention
    that it receives from the queries that can see it, averaged over heads. (The released code sums
    over the other axis, which is constant; this follows the paper.) Where a layer mixes tokens
    without an attention map, a token's size alone tells (ours).

    Args:
      hidden: [B, T, D].
      attention: probabilities [B, H, T, T], (query, key); None if there is no such map.
      length: int [B], tokens that are not padding at the end; None for all.

    Returns:
      float32 [B, T]; -inf for padding.
    """
    batch, tokens, _ = hidden.shape
    position = jnp.arange(tokens)
    length = jnp.full((batch,), tokens) if length is None else length
    real = position < length[:, None]
    size = jnp.sum(jnp.abs(hidden.astype(jnp.float32)), axis=-1)
    if attention is None:
        return jnp.where(real, size, -jnp.inf)
    weights = jnp.mean(attention.astype(jnp.float32), axis=1)
    received = jnp.sum(weights * real[:, :, None], axis=1) / jnp.maximum(
        length[:, None] - position, 1
    ).astype(jnp.float32)
    return jnp.where(real, size * received, -jnp.inf)


def protect(importance: jax.Array, share: float = PROTECTED_SHARE) -> jax.Array:
    """Marks the `share` most important tokens of each sequence, at least one: bool [B, T]."""
    count = max(1, round(share * importance.shape[-1]))
    bound = jax.lax.top_k(importance, count)[0][..., -1:]
    return importance >= bound


def keep_mask(
    weights: jax.Array, threshold: jax.Array | float, protected: jax.Array | None = None
) -> jax.Array:
    """Which of each token's experts to compute: ``w_j / w_0 >= mu_j``.

    Args:
      weights: routing weights [..., K], descending.
      threshold: mu, one for all, or [K - 1] for the ranks after the first.
      protected: bool [...], tokens that keep all experts; None for no token.

    Returns:
      bool [..., K]; the first is always True.

    Raises:
      ValueError: if there are neither one nor K - 1 thresholds.
    """
    ranks = weights.shape[-1] - 1
    mu = jnp.asarray(threshold, jnp.float32)
    if mu.shape not in ((), (1,), (ranks,)):
        raise ValueError(f"threshold of shape {mu.shape} for {ranks} ranks after the first")
    keep = weights[..., 1:] >= mu * weights[..., :1]
    if protected is not None:
        keep |= protected[..., None]
    return jnp.concatenate([jnp.ones_like(weights[..., :1], bool), keep], axis=-1)


def renormalize(weights: jax.Array, keep: jax.Array) -> jax.Array:
    """Routing weights [..., K] of the kept experts, scaled to the sum of all; zero elsewhere."""
    kept = jnp.where(keep, weights, 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return kept * (total / jnp.sum(kept, axis=-1, keepdims=True))


def thresholds(ratio: np.ndarray, quantile: float = QUANTILE, apart: bool = False) -> np.ndarray:
    """The thresholds mu at a quantile.

    Args:
      ratio: quantiles [..., K - 1, 101] of `PruningStatistics`.
      quantile: from 0, nothing is skipped, to 1, almost all but the first.
      apart: whether each rank has its own, under which as much of it falls as of any other; else
        all ranks have one, which skips more of the last (ours).

    Returns:
      float32 [..., K - 1]; none where each token has one expert, even if the empty array's last
      axis is lost, as JSON loses it.

    Raises:
      ValueError: if the quantile is not within 0 to 1.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"the pruning quantile must be 0 to 1, got {quantile}")
    ratio = np.asarray(ratio, np.float32)
    if not ratio.size:
        return np.zeros(ratio.shape[:-1] if ratio.ndim > 1 else ratio.shape, np.float32)
    if quantile == 0:
        return np.zeros(ratio.shape[:-1], np.float32)
    if apart:
        return np.quantile(ratio, quantile, axis=-1).astype(np.float32)
    # Quantiles of each rank, an equal share of it between any two: together a sample of all ranks.
    every = np.quantile(ratio, quantile, axis=(-2, -1))
    return np.broadcast_to(every[..., None], ratio.shape[:-1]).astype(np.float32)
