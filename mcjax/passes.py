"""A pass through a dense model and back, with one layer in memory at a time.

Going back, each layer gets the gradient of a loss by what it gives: the negative log-likelihood of
labels that are drawn from the model's own predictions, one for each token. Its outer products are,
on average, the Fisher information: what a small change does to predictions, in nats.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax.models.decoder import Decoder
from mcjax.models.language_model import embed
from mcjax.tune_artifact import outputs
from mcjax.vocabulary import head_of, log_probabilities

TOGETHER = 8
"""Windows that share the likeliest tokens of a large vocabulary, see `mcjax.vocabulary`."""

Visit = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
"""From what goes into a layer and the gradient by what it gives, [B, T, D], to the gradient by what
goes in, and what is wanted."""


def there_and_back(
    decoder: Decoder,
    outside: Any,
    read: Callable[[int], Any],
    windows: np.ndarray,
    batch: int,
    directory: Path,
    visit: Callable[[int, Any], Visit],
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> list[list[Any]]:
    """What visiting each layer on the way back finds, by layers, for every batch.

    Layers' inputs lie in `directory` in bfloat16 from the one way to the other.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      read: gives the dense weights of layer i.
      windows: tokens int [N, T].
      batch: windows computed at once.
      directory: for what lies there.
      visit: from a layer's number and its weights to what visits it.
      progress: wraps the iteration over layers, there and back.
    """
    inputs = directory / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    starts = range(0, len(windows), batch)
    count = len(decoder.layers)
    x = np.array(embed(decoder, outside, windows, jnp.float32))
    found: list[list[Any]] = [[] for _ in range(count)]
    for step in progress(range(2 * count)):
        i = step if step < count else 2 * count - 1 - step
        own, layer, file = read(i), decoder.layers[i], inputs / f"{i}.npy"
        if step < count:
            np.save(file, x.astype(ml_dtypes.bfloat16).view(np.uint16))
            for s in starts:
                x[s : s + batch] = outputs(layer, decoder.norm_eps, own, x[s : s + batch])
            if i + 1 == count:
                x = _last_gradient(decoder, outside, x)
            continue
        kept, here = np.load(file).view(ml_dtypes.bfloat16), visit(i, own)
        for s in starts:
            some = jnp.asarray(kept[s : s + batch].astype(np.float32))
            change, wanted = here(some, jnp.asarray(x[s : s + batch]))
            x[s : s + batch] = change
            found[i].append(jax.tree.map(np.asarray, wanted))
        del own, here
        file.unlink()
    inputs.rmdir()
    return found


def _last_gradient(decoder: Decoder, outside: Any, x: np.ndarray) -> np.ndarray:
    """The loss's gradient by what the last layer gives, float32 [N, T, D], a window at a time."""
    made = np.empty_like(x)
    for first in range(0, len(x), TOGETHER):
        norm, head = head_of(decoder, outside, x[first : first + TOGETHER])
        for n in range(first, min(first + TOGETHER, len(x))):
            key = jax.random.key(n)
            made[n] = _drawn_loss_gradient(decoder, norm, head, key, x[n : n + 1])[0]
    return made


@partial(jax.jit, static_argnums=0)
def _drawn_loss_gradient(decoder: Decoder, norm, head, key, x):
    labels = jax.random.categorical(key, log_probabilities(decoder, norm, head, x))

    def loss(x):
        likely = log_probabilities(decoder, norm, head, x)
        return -jnp.sum(jnp.take_along_axis(likely, labels[..., None], axis=-1))

    return jax.grad(loss)(x)
