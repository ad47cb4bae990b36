"""Writing text: one prefill, then a token or a draft at a time into a key-value cache.

Prompts of a batch are padded at the end. A padded slot of the cache holds a position that its
sequence has yet to write, and a query sees only positions up to its own, so padding is never seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax import odp, serving, speculate
from mcjax.checkpoint import MANIFEST
from mcjax.hub import Checkpoint, local
from mcjax.sampling import Sampling, sample
from mcjax.speculate import Draft, Tally, hold_in_loop, on_every_device, self_draft
from mcjax.text import beginning, end_tokens, open_tokenizer, unknown_ids

PREFILL_CHUNK = 512
"""Tokens of a prompt that are read at once, by which what a prefill holds is bounded."""


@partial(jax.jit, static_argnames=("module", "sampling", "chunk"), donate_argnames="cache")
def prefill(
    module: nn.Module, params, tokens, length, cache, key, sampling: Sampling, chunk=PREFILL_CHUNK
):
    """Reads prompts, `chunk` tokens at a time.

    Args:
      module: the model.
      params: its parameters.
      tokens: int [B, T], padded at the end.
      length: int [B], tokens that are not padding.
      cache: empty.
      key: of the sampling, None where nothing is drawn.
      sampling: how tokens are drawn.
      chunk: most tokens at once; each chunk attends to those before it in the cache.

    Returns:
      The prompts' next tokens int32 [B], and the cache.

    Raises:
      ValueError: if `chunk` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"a prefill's chunk must be at least 1 token, got {chunk}")
    if tokens.shape[1] <= chunk:
        logits, cache = module.apply({"params": params}, tokens, None, cache, length, length - 1)
        return on_every_device(module, sample(key, logits[:, 0], sampling)), cache
    count = -(-tokens.shape[1] // chunk)
    tokens = jnp.pad(tokens, ((0, 0), (0, count * chunk - tokens.shape[1])))

    def read(carry, i):
        cache, logits = carry
        start = i * chunk
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        part, held = hold_in_loop(part, params)
        within = jnp.clip(length - start, 0, chunk)
        last = jnp.clip(length - 1 - start, 0, chunk - 1)
        positions = (start + jnp.arange(chunk))[None]
        new, cache = module.apply({"params": held}, part, positions, cache, within, last)
        ends = (within > 0) & (length <= start + chunk)
        return (cache, jnp.where(ends[:, None], new[:, 0], logits)), None

    logits = jnp.zeros((tokens.shape[0], module.config.vocab_size), module.dtype)
    (cache, logits), _ = jax.lax.scan(read, (cache, logits), jnp.arange(count))
    return on_every_device(module, sample(key, logits, sampling)), cache


@partial(jax.jit, static_argnames=("module", "sampling"), donate_argnames="cache")
def decode(module: nn.Module, params, token, position, cache, key, sampling: Sampling):
    """Reads one token [B] at positions [B]; returns the next tokens [B] and the cache."""
    logits, cache = module.apply({"params": params}, token[:, None], position[:, None], cache)
    return on_every_device(module, sample(key, logits[:, 0], sampling)), cache


def generate(
    module: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    draft: Draft | None = None,
    tally: Tally | None = None,
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
      draft: writes tokens that the model then verifies, see `mcjax.speculate`. The likeliest
        tokens stay the same, up to the rounding of sums; drawn ones keep their distribution.
      tally: drafted and accepted tokens are added to it.

    Yields:
      int32 [B], the next token of every prompt; an ended one repeats its stop token.

    Raises:
      ValueError: for an empty prompt, one of tokens out of range, or one that is too long.
    """
    for block in generate_blocks(
        module,
        params,
        prompts,
        max_new_tokens,
        sampling=sampling,
        key=key,
        stop_tokens=stop_tokens,
        draft=draft,
        tally=tally,
    ):
        yield from block.T


def generate_blocks(
    module: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    draft: Draft | None = None,
    tally: Tally | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, yielding what each run of the model adds: int32 [B, N].

    N is 1 for the prefill and without a draft. With one it is how far the slowest prompt got.
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
    if sampling.temperature == 0 and draft is None:
        key = None  # nothing is drawn
    elif key is None:
        key = jax.random.key(0)
    cache = module.empty_cache(len(prompts), window)
    length = np.asarray(lengths, np.int32)
    written, cache = prefill(module, params, padded, length, cache, key, sampling)
    written = np.array(written)
    yield written[:, None]
    if draft is not None:
        rows = [[int(token)] for token in written]
        verify = partial(
            speculate.step,
            module,
            params,
            draft.module,
            draft.params,
            sampling=sampling,
            # No draft needs more tokens than there are to write.
            length=min(draft.length, max(max_new_tokens - 1, 1)),
        )
        yield from _verified(
            verify, rows, lengths, cache, key, max_new_tokens, stop_tokens, tally or Tally()
        )
        return
    for i in range(1, max_new_tokens):
        ended = np.isin(written, stop_tokens)
        if ended.all():
            return
        key = None if key is None else jax.random.fold_in(key, i)
        token, cache = decode(module, params, written, length + i - 1, cache, key, sampling)
        written = np.where(ended, written, token)
        yield written[:, None]


def _verified(
    verify: Callable[..., Any],
    rows: list[list[int]],
    lengths: Sequence[int],
    cache: Any,
    key: Any,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    tally: Tally,
) -> Iterator[np.ndarray]:
    """Goes on by verified drafts, each prompt at its own pace, from the first token of each."""

    def has_ended(row):
        return len(row) == max_new_tokens or row[-1] in stop_tokens

    ended = [has_ended(row) for row in rows]
    yielded = 1
    while not all(ended):
        key = jax.random.fold_in(key, yielded)
        # Prompts that have ended are verified again at the place where they ended, to no effect.
        token = np.array([row[-1] for row in rows], np.int32)
        position = np.array([n + len(row) - 1 for n, row in zip(lengths, rows, strict=True)])
        tokens, accepted, cache = verify(token, position.astype(np.int32), cache, key)
        drafted = tokens.shape[1] - 1
        for b, (new, count) in enumerate(
            zip(np.asarray(tokens), np.asarray(accepted), strict=True)
        ):
            before = len(rows[b])
            for token in new[: count + 1].tolist():
                if not has_ended(rows[b]):
                    rows[b].append(token)
            if not ended[b]:
                added, ended[b] = len(rows[b]) - before, has_ended(rows[b])
                # What was drafted beyond an end was of no use to anyone, so it does not count.
                tally.drafted += min(drafted, added) if ended[b] else drafted
                tally.accepted += min(int(count), added)
        slowest = [len(row) for row, end in zip(rows, ended, strict=True) if not end]
        reached = min(slowest) if slowest else max(map(len, rows))
        yield np.array(
            [[row[min(t, len(row) - 1)] for t in range(yielded, reached)] for row in rows],
            np.int32,
        )
        yielded = reached


def generate_text(
    path: str | Path,
    prompts: Sequence[str],
    *,
    budget: float | str | None = None,
    policy: str = "loss",
    bits: int | None = None,
    attention_bits: int | None = None,
    act_bits: int | None = None,
    cache_dtype: Any = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    write: Callable[[str], Any] | None = None,
    draft_bits: int | None = None,
    draft_length: int = 4,
    bos: str = "auto",
    chat: bool = False,
) -> dict[str, Any]:
    """Continues texts from an artifact or a Hugging Face folder.

    Args:
      path: an artifact; or a folder or a name on the hub, served dense and without pruning.
      prompts: texts, continued as one batch.
      budget: as in `mcjax.load`.
      policy: as there.
      bits: as in `mcjax.load`.
      attention_bits: as in `mcjax.load`.
      act_bits: as in `mcjax.load`.
      cache_dtype: as in `mcjax.load`.
      prune: as in `mcjax.load`.
      quantile: as in `mcjax.load`.
      max_new_tokens: at most so many.
      sampling: None takes the likeliest token.
      seed: of the sampling.
      stop: a continuation ends before the first of these texts, or a token that config.json or
        generation_config.json names as an end.
      write: called with each new piece of the first continuation as soon as it is sure.
      draft_bits: None, or the planes of every expert with which tokens are drafted, for all its
        planes to verify, see `mcjax.speculate`.
      draft_length: tokens that are drafted before each verification.
      bos: whether prompts begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      chat: each prompt is a user's message, which the model's chat template is put around.

    Returns:
      `texts`, the continuations; `new_tokens`, each one's number of tokens; `tokens_per_second`
      while decoding, compilation and prefill not counted; `average_bits`; `acceptance`, the share
      of the drafted tokens that was accepted, None if none were drafted.

    Raises:
      ValueError: for input that cannot be served.
    """
    path, draft, tally = local(path), None, Tally()
    if draft_bits is not None and not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path} is not an artifact, so --draft-bits does not apply; make one with "
            "`mcjax compress`"
        )
    model = serving.load(
        path,
        budget,
        policy=policy,
        bits=bits,
        attention_bits=attention_bits,
        act_bits=act_bits,
        cache_dtype=cache_dtype,
        prune=prune,
        quantile=quantile,
    )
    module, params, average = model.module, model.params, model.average_bits
    if draft_bits is not None:
        draft = self_draft(model, draft_bits, draft_length)
    tokenizer_path = Checkpoint(path).tokenizer_path
    tokenizer, vocab_size = open_tokenizer(tokenizer_path), module.config.vocab_size
    encoded = _encode(tokenizer, tokenizer_path.parent, prompts, chat)
    begin = beginning(tokenizer_path, vocab_size, bos)
    if begin is not None:
        encoded = [ids if ids[:1] == [begin] else [begin, *ids] for ids in encoded]
    sampling = replace(sampling or Sampling(), barred=unknown_ids(tokenizer, vocab_size))

    written: list[list[int]] = [[] for _ in prompts]
    texts, done, shown = [""] * len(prompts), [False] * len(prompts), 0
    started, timed = None, 0
    # Decoding after the last token of the prompt keeps its leading space.
    starts = [tokenizer.decode(ids[-1:]) for ids in encoded]
    ends = end_tokens(tokenizer_path.parent, module.config.eos_token_ids, vocab_size)
    blocks = generate_blocks(
        module,
        params,
        encoded,
        max_new_tokens,
        sampling=sampling,
        key=jax.random.key(seed),
        stop_tokens=ends,
        draft=draft,
        tally=tally,
    )
    for run, block in enumerate(blocks):
        if run == 1:  # both programs are compiled now
            started = time.perf_counter()
        elif run > 1:
            timed += block.shape[1]
        for new in block.T:
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
        if all(done):
            break
    if write is not None:
        write(texts[0][shown:])
    seconds = time.perf_counter() - started if started is not None else 0.0
    return {
        "texts": texts,
        "new_tokens": [len(ids) for ids in written],
        "tokens_per_second": len(prompts) * timed / seconds if timed else 0.0,
        "average_bits": average,
        "acceptance": tally.acceptance,
    }


def _encode(tokenizer, folder: Path, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids of every prompt, as it is or in the folder's chat template."""
    if chat:
        from mcjax.chat import chat_tokens

        return [chat_tokens(tokenizer, folder, prompt) for prompt in prompts]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty; give at least one token")
    return encoded
