"""A pass through a model and back, with one layer in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax import vocabulary
from mcjax.models.decoder import Decoder
from mcjax.tune_artifact import divergence_and_gradient, outputs

TOGETHER = 8
"""Windows that share the likeliest tokens of a large vocabulary, see `mcjax.vocabulary`."""

LossGradient = Callable[[np.ndarray], np.ndarray]
"""From what the last layer gives, float32 [N, T, D], to a loss's gradient by it."""


class Visit(NamedTuple):
    """What happens at a layer on the way back.

    Attributes:
      backward: from what goes into the layer and the gradient by what it gives, [B, T, D], to the
        gradient by what goes in, and what is wanted of that batch.
      collect: from an iterable of what is wanted of each batch, all of which it must consume since
        that runs the layer, to what is found at the layer.
    """

    backward: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
    collect: Callable[[Iterable[Any]], Any]


def there_and_back(
    decoder: Decoder,
    x: np.ndarray,
    read: Callable[[int], Any],
    loss: LossGradient,
    visit: Callable[[int, Any], Visit],
    batch: int,
    directory: Path,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> list[Any]:
    """What visiting each layer on the way back finds, by layers.

    Layers' inputs lie in `directory` in bfloat16 from the one way to the other.

    Args:
      decoder: the model.
      x: what goes into the first layer, float32 [N, T, D]; changed.
      read: gives the dense weights of layer i.
      loss: the gradient of one.
      visit: from a layer's number and its weights to what visits it.
      batch: windows computed at once.
      directory: for what lies there.
      progress: wraps the iteration over layers, there and back.
    """
    inputs = directory / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    some = [slice(first, first + batch) for first in range(0, len(x), batch)]
    count = len(decoder.layers)
    found: list[Any] = [None] * count
    for step in progress(range(2 * count)):
        i = step if step < count else 2 * count - 1 - step
        own, file = read(i), inputs / f"{i}.npy"
        if step < count:
            np.save(file, x.astype(ml_dtypes.bfloat16).view(np.uint16))
            for s in some:
                x[s] = outputs(decoder.layers[i], decoder.norm_eps, own, x[s])
            if i + 1 == count:
                x[...] = loss(x)
            del own
            continue
        backward, collect = visit(i, own)

        def batches(file=file, backward=backward):
            kept = np.load(file).view(ml_dtypes.bfloat16)
            for s in some:
                x[s], wanted = backward(jnp.asarray(kept[s], jnp.float32), jnp.asarray(x[s]))
                yield wanted

        found[i] = collect(batches())
        del own, backward, collect, batches
        file.unlink()
    inputs.rmdir()
    return found


def own_predictions(decoder: Decoder, outside: Any) -> LossGradient:
    """The negative log-likelihood of labels drawn from the model's own predictions, one a token.

    Its gradients' outer products are, on average, the Fisher information: what a small change does
    to predictions, in nats.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
    """

    def gradient(x):
        made = np.empty_like(x)
        for first in range(0, len(x), TOGETHER):
            norm, head = vocabulary.head_of(decoder, outside, x[first : first + TOGETHER])
            for n in range(first, min(first + TOGETHER, len(x))):
                key = jax.random.key(n)
                made[n] = _drawn_gradient(decoder, norm, head, key, x[n : n + 1])[0]
        return made

    return gradient


def divergence_from(decoder: Decoder, outside: Any, target: np.ndarray) -> LossGradient:
    """The mean divergence of predictions from those of another model, nats a token.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      target: float [N, T, D], what the other model's last layer gives.
    """
    some = [slice(first, first + TOGETHER) for first in range(0, len(target), TOGETHER)]
    heads = [vocabulary.head_of(decoder, outside, target[s]) for s in some]

    def gradient(x):
        made = np.empty_like(x)
        for s, (norm, head) in zip(some, heads, strict=True):
            wanted = jnp.asarray(target[s], jnp.float32)
            change = divergence_and_gradient(decoder, norm, head, x[s], wanted)[1]
            made[s] = change * (len(wanted) / len(x))
        return made

    return gradient


@partial(jax.jit, static_argnums=0)
def _drawn_gradient(decoder: Decoder, norm, head, key, x):
    labels = jax.random.categorical(key, vocabulary.log_probabilities(decoder, norm, head, x))

    def loss(x):
        likely = vocabulary.log_probabilities(decoder, norm, head, x)
        return -jnp.sum(jnp.take_along_axis(likely, labels[..., None], axis=-1))

    return jax.grad(loss)(x)
