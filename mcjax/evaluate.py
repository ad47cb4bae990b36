"""Perplexity of a Hugging Face folder or an artifact at a precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import odp, serving, text
from mcjax.calibrate import observe, pruning_statistics
from mcjax.hub import Checkpoint, Folder, local
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.language_model import embed


def evaluate(
    path: str | Path,
    text_path: str | Path,
    *,
    budget: float | str | None = None,
    policy: str = "loss",
    bits: int | None = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
    calibration: str | Path | None = None,
    act_bits: int | None = None,
    attention_bits: int | None = None,
    bos: str = "auto",
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Perplexity on a text file.

    Args:
      path: an artifact, a Hugging Face folder, or a name on the hub, see `mcjax.hub.local`.
      text_path: a text, see `mcjax.documents.read_documents`, tokenised whole and cut into
        consecutive windows; the tail is dropped. A token that texts begin with takes the first
        place of each window.
      budget: as in `mcjax.load`, for an artifact.
      policy: as there.
      bits: one width for every expert, for an artifact.
      seq_len: tokens in a window.
      max_tokens: use only the first windows, up to so many tokens.
      prune: the policy by which `mcjax.odp` skips experts, "affine" or "paper"; None skips none.
      quantile: share of the lower-ranked experts that is skipped on calibration text.
      calibration: a text, for pruning in a Hugging Face folder; artifacts carry their own.
      act_bits: rounds activations to 8 or 16 bits before products with an artifact's planes.
      attention_bits: as in `mcjax.load`, for an artifact.
      bos: whether texts begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      progress: wraps the iteration over batches, called with (items, description=...).

    Returns:
      `perplexity`, `tokens` (predicted ones), `average_bits`, `effective_bits`, `bytes_read`,
      `cache_bytes` (what writing a text of `seq_len` tokens takes beside these),
      `experts_pruned`, `tokens_per_second`.

    Raises:
      ValueError: for input that cannot be evaluated.
    """
    path = local(path)
    if calibration is not None and prune is None:
        raise ValueError("--calibration is for pruning: give --odp too, or leave it out")
    # Before any weight is read, so that a text or a length that will not do is refused at once.
    source = serving.open_source(path)
    artifact = not isinstance(source, Folder)
    if calibration is not None and artifact:
        raise ValueError(f"{path} carries its calibration; --calibration is for MODEL folders")
    if calibration is None and prune is not None and not artifact:
        raise ValueError(
            f"--odp on the folder {path} needs --calibration TEXT to choose thresholds by"
        )
    tokenizer_path = Checkpoint(path).tokenizer_path
    windows = _windows(tokenizer_path, text_path, source.decoder, seq_len, max_tokens, bos)
    model = serving.load(
        path,
        budget,
        policy=policy,
        bits=bits,
        attention_bits=attention_bits,
        act_bits=act_bits,
        prune=prune if artifact else None,
        quantile=quantile,
    )
    module, params = model.module, model.params
    if prune is not None and not artifact:
        params = _calibrated(model, tokenizer_path, calibration, seq_len, prune, quantile, bos)
    facts = {
        "average_bits": model.average_bits,
        "effective_bits": model.effective_bits,
        "bytes_read": model.bytes_read,
        "cache_bytes": module.cache_bytes(1, seq_len),
    }
    start = time.perf_counter()
    value, skipped = text.perplexity(
        module, params, windows, progress=lambda items: progress(items, description="eval")
    )
    seconds = time.perf_counter() - start
    return {
        "perplexity": value,
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
        **facts,
        "experts_pruned": skipped,
        "tokens_per_second": windows.size / seconds,
    }


def _calibrated(model, tokenizer, calibration, seq_len, prune, quantile, bos) -> Any:
    """A dense model's parameters with pruning, by statistics of a calibration text."""
    decoder = model.module.decoder
    ends = decoder.eos_token_ids
    tokens = text.encode_file(tokenizer, calibration, decoder.vocab_size, ends)
    begin = text.beginning(tokenizer, decoder.vocab_size, bos)
    some = text.spread(text.windows(tokens, seq_len, "calibration text", begin), 128)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params)
    statistics = dense_pruning_statistics(decoder, params, some)
    return serving.with_pruning(decoder, params, statistics, prune, quantile)


def dense_pruning_statistics(
    decoder: Decoder, params: Any, windows: np.ndarray, batch_tokens: int = 4096
) -> list[odp.PruningStatistics]:
    """`mcjax.odp`'s statistics of every layer of experts, from windows int [N, T]."""
    batch = max(1, min(len(windows), batch_tokens // windows.shape[1]))
    starts = range(0, len(windows), batch)
    x: Any = [embed(decoder, params, windows[s : s + batch], jnp.float32) for s in starts]
    statistics = []
    for i, layer in enumerate(decoder.layers):
        own = weights.of_layer(decoder, params, i)
        run = partial(observe, layer, decoder.width, decoder.norm_eps, own)
        x, _, seen = zip(*map(run, x), strict=True)
        if isinstance(layer.block, Routed):
            statistics.append(
                pruning_statistics(layer.block, weights.get(own, weights.EXPERTS), seen)
            )
    return statistics


def _windows(tokenizer_path, text_path, decoder, seq_len, max_tokens, bos) -> np.ndarray:
    text.check_length(seq_len, decoder.max_position_embeddings)
    begin = text.beginning(tokenizer_path, decoder.vocab_size, bos)
    ends = decoder.eos_token_ids
    tokens = text.encode_file(tokenizer_path, text_path, decoder.vocab_size, ends)
    if max_tokens is not None:
        if max_tokens < seq_len - (begin is not None):
            raise ValueError(f"--max-tokens {max_tokens} is less than one window of {seq_len}")
        tokens = tokens[:max_tokens]
    return text.windows(tokens, seq_len, begin=begin)
