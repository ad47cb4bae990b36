"""Writing text: one prefill, then a token at a time into a key-value cache.

Prompts of a batch are padded at the end. A padded slot of the cache holds a position that its
sequence has yet to write, and a query sees only positions up to its own, so padding is never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import odp, serving
from mcjax.checkpoint import MANIFEST
from mcjax.convert import HuggingFaceFolder
from mcjax.models.mixtral import Mixtral, empty_cache


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draw among the k likeliest only.
      top_p: draw among the likeliest that together hold this probability only.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and not (self.top_k is self.top_p is None):
            raise ValueError("top_k and top_p need a temperature above 0; at 0 nothing is drawn")


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., V] over the temperature, -inf for tokens that are not to be drawn."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits.shape[-1])
        logits = jnp.where(logits >= jax.lax.top_k(logits, k)[0][..., -1:], logits, -jnp.inf)
    if sampling.top_p is not None:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        bound = jnp.min(
            jnp.where(before < sampling.top_p, descending, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits >= bound, logits, -jnp.inf)
    return logits


def sample(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws tokens int32 [...] from logits [..., V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("module", "sampling"), donate_argnames="cache")
def prefill(module: Mixtral, params, tokens, length, cache, key, sampling: Sampling):
    """Reads prompts int [B, T], padded at the end; returns their next tokens [B] and the cache."""
    logits, cache = module.apply({"params": params}, tokens, None, cache, length)
    last = jnp.take_along_axis(logits, (length - 1)[:, None, None], axis=1)[:, 0]
    return sample(key, last, sampling), cache


@partial(jax.jit, static_argnames=("module", "sampling"), donate_argnames="cache")
def decode(module: Mixtral, params, token, position, cache, key, sampling: Sampling):
    """Reads one token [B] at positions [B]; returns the next tokens [B] and the cache."""
    logits, cache = module.apply({"params": params}, token[:, None], position[:, None], cache)
    return sample(key, logits[:, 0], sampling), cache


def generate(
    module: Mixtral,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Continues prompts together, a token each at a time; compiles twice, whatever the length.

    Args:
      module: the model, with its pruning policy and activation bits.
      params: its parameters.
      prompts: token ids, of any lengths.
      max_new_tokens: how many to write.
      sampling: None takes the likeliest token.
      key: of the sampling; None for key 0.
      stop_tokens: end a continuation; all having ended, nothing more is written.

    Yields:
      int32 [B], the next token of every prompt; an ended one repeats its stop token.

    Raises:
      ValueError: for an empty prompt, one of tokens out of range, or one that is too long.
    """
    config, sampling = module.config, sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    window = max(lengths) + max_new_tokens
    if window > config.max_position_embeddings:
        raise ValueError(
            f"{max(lengths)} prompt tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions; shorten the prompt or --max-new-tokens"
        )
    padded = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    if padded.min() < 0 or padded.max() >= config.vocab_size:
        raise ValueError(
            f"prompt tokens must be 0 to {config.vocab_size - 1}, got {padded.min()} to "
            f"{padded.max()}"
        )
    key = jax.random.key(0) if key is None else key
    cache = empty_cache(config, len(prompts), window, module.dtype)
    length = jnp.asarray(lengths)
    written, cache = prefill(module, params, padded, length, cache, key, sampling)
    written = np.array(written)
    yield written
    for i in range(1, max_new_tokens):
        ended = np.isin(written, stop_tokens)
        if ended.all():
            return
        key = jax.random.fold_in(key, i)
        token, cache = decode(module, params, written, length + i - 1, cache, key, sampling)
        written = np.where(ended, written, token)
        yield written


def generate_text(
    path: str | Path,
    prompts: Sequence[str],
    *,
    budget: float | None = None,
    bits: int | None = None,
    act_bits: int | None = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    write: Callable[[str], Any] | None = None,
) -> dict[str, Any]:
    """Continues texts from an artifact or a Hugging Face folder.

    Args:
      path: an artifact; or a folder, which is served dense and without pruning.
      prompts: texts, continued as one batch.
      budget: as in `mcjax.load`.
      bits: as in `mcjax.load`.
      act_bits: as in `mcjax.load`.
      prune: as in `mcjax.load`.
      quantile: as in `mcjax.load`.
      max_new_tokens: at most so many.
      sampling: None takes the likeliest token.
      seed: of the sampling.
      stop: a continuation ends before the first of these texts, or a token of the model's
        `eos_token_ids`.
      write: called with each new piece of the first continuation as soon as it is sure.

    Returns:
      `texts`, the continuations; `new_tokens`, each one's number of tokens; `tokens_per_second`
      while decoding, compilation and prefill not counted; `average_bits`.

    Raises:
      ValueError: for input that cannot be served.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    if (path / MANIFEST).is_file():
        model = serving.load(
            path, budget, bits=bits, act_bits=act_bits, prune=prune, quantile=quantile
        )
        module, params, average = model.module, model.params, model.average_bits
        tokenizer_path = path / "tokenizer.json"
    else:
        folder = HuggingFaceFolder(path)
        if not (budget is bits is act_bits is prune is None):
            raise ValueError(
                f"{path} is not an artifact, so --budget, --bits, --act-bits and --odp do not "
                "apply; make one with `mcjax compress`"
            )
        module, params, average = Mixtral(folder.config), folder.read(np.float32), 16.0
        tokenizer_path = folder.tokenizer_path
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
    for text, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {text!r} is empty; give at least one token")

    written: list[list[int]] = [[] for _ in prompts]
    texts, done, shown = [""] * len(prompts), [False] * len(prompts), 0
    started, steps = None, 0
    # Decoding after the last token of the prompt keeps its leading space.
    starts = [tokenizer.decode(ids[-1:]) for ids in encoded]
    ends = module.config.eos_token_ids
    tokens = generate(
        module,
        params,
        encoded,
        max_new_tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        stop_tokens=ends,
    )
    for step, new in enumerate(tokens):
        if step == 1:  # both programs are compiled now
            started = time.perf_counter()
        for b, ids in enumerate(written):
            if done[b]:
                continue
            if new[b] in ends:
                done[b] = True
                continue
            ids.append(int(new[b]))
            text = tokenizer.decode([encoded[b][-1], *ids])[len(starts[b]) :]
            cuts = [text.find(s) for s in stop if s and s in text]
            done[b] = bool(cuts)
            texts[b] = text[: min(cuts)] if cuts else text
        if write is not None:
            held = max((len(s) for s in stop), default=1) - 1
            sure = texts[0].rstrip("\ufffd")
            sure = sure if done[0] else sure[: len(sure) - held]
            write(sure[shown:])
            shown = max(shown, len(sure))
        steps = step
        if all(done):
            break
    if write is not None:
        write(texts[0][shown:])
    seconds = time.perf_counter() - started if started is not None else 0.0
    return {
        "texts": texts,
        "new_tokens": [len(ids) for ids in written],
        "tokens_per_second": len(prompts) * (steps - 1) / seconds if steps > 1 else 0.0,
        "average_bits": average,
    }
