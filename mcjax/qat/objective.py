"""The losses of all widths as one objective, behind one small interface.

An `Objective` turns K losses, and where it asks for it the Gram matrix of their gradients, into K
weights; `combine` applies the weights to the gradients. State passes through, as in optax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Objective(NamedTuple):
    """How much each loss counts.

    Attributes:
      init: number of losses K -> state.
      weigh: (state, losses [K], Gram matrix [K, K] or None) -> weights [K], new state.
      needs_gram: whether every loss's own gradient is computed, which costs K backward passes
        instead of one.
    """

    init: Callable[[int], Any]
    weigh: Callable[[Any, jax.Array, jax.Array | None], tuple[jax.Array, Any]]
    needs_gram: bool = False


def fixed(weights: Sequence[float] | None = None) -> Objective:
    """Constant weights, by default 1 each.

    The sum, not the mean: what belongs to one width alone, its tables and its normalisation, then
    learns as fast as in a network of that width only. On digits that is worth half a point, see
    benchmarks/README.md. Clip gradients at K times what suits one loss.

    Raises:
      ValueError: at `init`, if there are not K of them or one is negative.
    """

    def init(num):
        chosen = np.ones(num) if weights is None else np.asarray(weights, float)
        if chosen.shape != (num,) or (chosen < 0).any() or not np.isfinite(chosen).all():
            raise ValueError(f"fixed weights {weights} must be {num} numbers of at least 0")
        return jnp.asarray(chosen, jnp.float32)

    return Objective(init, lambda state, losses, gram: (state, state))


def uncertainty(learning_rate: float = 0.01) -> Objective:
    """Weights exp(-s_k) with learned log variances (Kendall et al., arXiv 1705.07115).

    The objective is ``sum_k exp(-s_k) L_k + s_k``; s descends it with `learning_rate` (the paper
    trains s with the network's optimiser).
    """

    def weigh(state, losses, gram):
        weights = jnp.exp(-state)
        gradient = 1 - weights * jax.lax.stop_gradient(losses)
        return weights, state - learning_rate * gradient

    return Objective(lambda num: jnp.zeros(num, jnp.float32), weigh)


def mgda() -> Objective:
    """The minimum-norm point of the gradients' convex hull (Desideri 2012; arXiv 1810.04650).

    Its negative descends every loss at once, or is zero where no direction does.
    """

    def weigh(state, losses, gram):
        return min_norm(gram), state

    return Objective(lambda num: (), weigh, needs_gram=True)


def min_norm(gram: jax.Array) -> jax.Array:
    """Weights of the shortest convex combination of vectors.

    Minimises ``w' G w`` over ``w >= 0, sum w = 1`` exactly: the optimum on each of the 2^K - 1
    subsets of vectors solves a linear system; the best of those that are feasible is taken (ours;
    K is a handful of widths).

    Args:
      gram: float [K, K], inner products of the vectors, K at most 8.

    Returns:
      float32 [K].

    Raises:
      ValueError: if there are more than 8 vectors.
    """
    num = gram.shape[0]
    if num > 8:
        raise ValueError(f"min_norm takes at most 8 vectors, got {num}")
    scale = jnp.trace(gram) / num
    gram = gram.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)
    subsets = jnp.asarray([[m >> i & 1 for i in range(num)] for m in range(1, 2**num)], jnp.float32)
    eye = jnp.eye(num, dtype=jnp.float32)

    def on_subset(chosen):
        inside = chosen[:, None] * chosen[None]
        system = jnp.where(inside > 0, gram, 0) + eye * jnp.where(chosen > 0, 1e-7, 1.0)
        weights = jnp.linalg.solve(system, chosen) * chosen
        weights = weights / jnp.sum(weights)
        feasible = jnp.all(weights >= 0) & jnp.all(jnp.isfinite(weights))
        return weights, jnp.where(feasible, weights @ gram @ weights, jnp.inf)

    weights, norms = jax.vmap(on_subset)(subsets)
    return weights[jnp.argmin(norms)]


def combine(
    losses: Callable[[Any], tuple[jax.Array, Any]], params: Any, objective: Objective, state: Any
) -> tuple[Any, jax.Array, Any, jax.Array, Any]:
    """One gradient for many losses.

    Args:
      losses: params -> (losses [K], auxiliary output).
      params: a pytree of float arrays.
      objective: `fixed`, `uncertainty` or `mgda`.
      state: from ``objective.init(K)``.

    Returns:
      The weighted gradient, losses [K], the auxiliary output, weights [K] and the new state.
    """
    if not objective.needs_gram:
        values, pull, aux = jax.vjp(losses, params, has_aux=True)
        weights, state = objective.weigh(state, values, None)
        (gradient,) = pull(weights.astype(values.dtype))
        return gradient, values, aux, weights, state
    values, pull, aux = jax.vjp(losses, params, has_aux=True)
    (every,) = jax.lax.map(pull, jnp.eye(values.shape[0], dtype=values.dtype))
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(every)]
    gram = sum(leaf @ leaf.T for leaf in flat)
    weights, state = objective.weigh(state, values, gram)
    gradient = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1).astype(leaf.dtype), every)
    return gradient, values, aux, weights, state
