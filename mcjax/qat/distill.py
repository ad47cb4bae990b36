"""Losses at many widths of one network, each learning from the next higher one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def cascade_losses(
    logits_at: Callable[[Any, Any], tuple[jax.Array, Any]],
    loss: Callable[[jax.Array], jax.Array],
    widths: Sequence[Any] | jax.Array,
    state: Any = (),
    *,
    distill: float = 0.0,
    teacher: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """The mean loss at each width, with recursive distillation.

    ``L_k = (1 - distill) loss(z_k) + distill * CE(softmax(z_next higher), z_k)``, the higher one
    detached (Any-Precision DNN, arXiv 1911.07346, section 3.3); the highest learns from `teacher`
    or from the labels alone.

    Args:
      logits_at: (width, state) -> logits [B, ..., C] and the state after it; normalisation
        statistics for instance. For widths that are traced, call this and differentiate it inside
        the branches of `jax.lax.switch`, a width each, as train/vision.py does: a switch that is
        itself differentiated keeps what the backward pass needs of every branch.
      loss: logits -> [B, ...], per example.
      widths: descending.
      state: goes through all widths in turn.
      distill: from 0, labels alone, to 1, the higher precision alone.
      teacher: logits that the highest width learns from, the float network's for instance.

    Returns:
      Losses [K], and the logits of the last width with the final state.

    Raises:
      ValueError: if `distill` is not within 0 to 1.
    """
    if not 0 <= distill <= 1:
        raise ValueError(f"distill must be 0 to 1, got {distill}")
    values = []
    for width in widths:
        logits, state = logits_at(width, state)
        value = jnp.mean(loss(logits))
        if teacher is not None and distill:
            target = jax.nn.softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32))
            soft = -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
            value = (1 - distill) * value + distill * jnp.mean(soft)
        values.append(value)
        teacher = logits
    return jnp.stack(values), (logits, state)


def sample_widths(key: jax.Array, num: int, count: int) -> jax.Array:
    """Which of K widths a step trains: the highest, the lowest, and others at random.

    With it a step's cost is that of `count` widths, however many there are (the sandwich rule of
    slimmable networks, arXiv 1903.05134).

    Args:
      key: of the draw.
      num: K.
      count: how many, 2 to K; or 1 for a single random one.

    Returns:
      int32 [count], ascending indices into the widths.

    Raises:
      ValueError: if `count` is not 1 to K.
    """
    if not 1 <= count <= num:
        raise ValueError(f"cannot sample {count} of {num} widths")
    if count == 1:
        return jax.random.randint(key, (1,), 0, num)
    between = jax.random.permutation(key, num - 2)[: count - 2] + 1
    return jnp.sort(jnp.concatenate([jnp.array([0, num - 1]), between])).astype(jnp.int32)
