"""A pass through a model and back, with one layer in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax import vocabulary
from mcjax.atomic import whole
from mcjax.models.decoder import Decoder
from mcjax.models.language_model import embed
from mcjax.tune_artifact import divergence_and_gradient, outputs

TOGETHER = 8
"""Windows that share the likeliest tokens of a large vocabulary, see `mcjax.vocabulary`."""

LossGradient = Callable[[np.ndarray, np.ndarray], None]
"""From what the last layer gives, float32 [N, T, D], to a loss's gradient by it, which is put into
the second array."""

Found = Mapping[str, np.ndarray]
"""What was found at a layer."""


class Visit(NamedTuple):
    """What happens at a layer on the way back.

    Attributes:
      backward: from what goes into the layer and the gradient by what it gives, [B, T, D], to the
        gradient by what goes in, and what is wanted of that batch.
      collect: from an iterable of what is wanted of each batch, all of which it must consume since
        that runs the layer, to what is found at the layer.
    """

    backward: Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]
    collect: Callable[[Iterable[Any]], Found]


def there_and_back(
    decoder: Decoder,
    outside: Any,
    windows: np.ndarray,
    read: Callable[[int], Any],
    loss: LossGradient,
    visit: Callable[[int, Any], Visit],
    batch: int,
    directory: Path,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> list[Path]:
    """Visits each layer on the way back, and keeps what that finds.

    Layers' inputs lie in `directory` in bfloat16 from the one way to the other, and what goes on to
    the next layer in float32, so a run that is interrupted goes on from the last whole layer.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
      windows: tokens int [N, T].
      read: gives the dense weights of layer i.
      loss: the gradient of one.
      visit: from a layer's number and its weights to what visits it.
      batch: windows computed at once.
      directory: where all this lies; made if it is missing.
      progress: wraps the iteration over layers, there and back.

    Returns:
      For each layer the file of what was found, see `read_found`.
    """
    count = len(decoder.layers)
    found = [directory / f"found_{i}.npz" for i in range(count)]
    directory.mkdir(parents=True, exist_ok=True)
    some = [slice(first, first + batch) for first in range(0, len(windows), batch)]

    def arriving(step):
        return directory / f"arriving_{step}.npy"

    def going_in(i):
        return directory / f"going_in_{i}.npy"

    def one_step(step, x, after):
        i = step if step < count else 2 * count - 1 - step
        own = read(i)
        if step < count:
            with written(going_in(i), x.shape, np.uint16) as kept:
                for s in some:
                    kept[s] = x[s].astype(ml_dtypes.bfloat16).view(np.uint16)
            for s in some:
                after[s] = outputs(decoder.layers[i], decoder.norm_eps, own, x[s])
            return
        backward, collect = visit(i, own)
        kept = np.load(going_in(i), mmap_mode="r").view(ml_dtypes.bfloat16)

        def batches():
            for s in some:
                given = jnp.asarray(kept[s], jnp.float32), jnp.asarray(x[s])
                after[s], wanted = backward(*given)
                yield wanted

        values: dict[str, Any] = dict(collect(batches()))
        with whole(found[i]) as aside:
            np.savez(aside, **values)

    begun = [step for step in range(2 * count + 1) if arriving(step).exists()]
    if not begun:
        if all(file.exists() for file in found):
            return found
        embed_all(decoder, outside, windows, batch, arriving(0))
        begun = [0]
    for step in progress(range(2 * count)):
        if step < begun[-1]:  # a run that was killed may have left what it needed no more
            arriving(step).unlink(missing_ok=True)
            if step >= count:
                going_in(2 * count - 1 - step).unlink(missing_ok=True)
            continue
        x = np.load(arriving(step), mmap_mode="r")
        with written(arriving(step + 1), x.shape, np.float32) as after:
            one_step(step, x, after)
            if step + 1 == count:
                loss(after, after)
        arriving(step).unlink()
        if step >= count:
            going_in(2 * count - 1 - step).unlink()
    arriving(2 * count).unlink()
    return found


def read_found(file: Path) -> dict[str, np.ndarray]:
    """What was found at a layer, by name."""
    with np.load(file) as held:
        return {name: held[name] for name in held.files}


@contextmanager
def written(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    """An array that lies in a file, which is at `path` once it is whole.

    Raises:
      OSError: if there is no room for it.
    """
    with whole(path) as aside:
        array = np.lib.format.open_memmap(aside, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
            with open(aside, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, aside.stat().st_size)
        yield array


def embed_all(decoder: Decoder, outside: Any, windows: np.ndarray, batch: int, path: Path) -> None:
    """Writes what goes into the first layer for all windows, float32 [N, T, D]."""
    with written(path, (*windows.shape, decoder.width), np.float32) as x:
        for first in range(0, len(windows), batch):
            some = slice(first, first + batch)
            x[some] = embed(decoder, outside, windows[some], jnp.float32)


def own_predictions(decoder: Decoder, outside: Any) -> LossGradient:
    """The negative log-likelihood of labels drawn from the model's own predictions, one a token.

    Its gradients' outer products are, on average, the Fisher information: what a small change does
    to predictions, in nats.

    Args:
      decoder: the model.
      outside: its parameters outside of the layers.
    """

    def gradient(x, made):
        for first in range(0, len(x), TOGETHER):
            norm, head = vocabulary.head_of(decoder, outside, x[first : first + TOGETHER])
            for n in range(first, min(first + TOGETHER, len(x))):
                key = jax.random.key(n)
                made[n] = _drawn_gradient(decoder, norm, head, key, x[n : n + 1])[0]

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

    def gradient(x, made):
        for s, (norm, head) in zip(some, heads, strict=True):
            wanted = jnp.asarray(target[s], jnp.float32)
            change = divergence_and_gradient(decoder, norm, head, x[s], wanted)[1]
            made[s] = change * (len(wanted) / len(x))

    return gradient


@partial(jax.jit, static_argnums=0)
def _drawn_gradient(decoder: Decoder, norm, head, key, x):
    labels = jax.random.categorical(key, vocabulary.log_probabilities(decoder, norm, head, x))

    def loss(x):
        likely = vocabulary.log_probabilities(decoder, norm, head, x)
        return -jnp.sum(jnp.take_along_axis(likely, labels[..., None], axis=-1))

    return jax.grad(loss)(x)
