"""Perplexity of a Hugging Face folder or an artifact at a precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import odp, serving, text
from mcjax.calibrate import capture, pruning_statistics
from mcjax.checkpoint import MANIFEST
from mcjax.convert import HuggingFaceFolder
from mcjax.hub import Checkpoint
from mcjax.models.config import MixtralConfig
from mcjax.models.mixtral import Mixtral, layer


def evaluate(
    path: str | Path,
    text_path: str | Path,
    *,
    budget: float | None = None,
    bits: int | None = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
    calibration: str | Path | None = None,
    act_bits: int | None = None,
    bos: str = "auto",
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Perplexity on a text file.

    Args:
      path: a Hugging Face folder, or an artifact.
      text_path: tokenised whole and cut into consecutive windows; the tail is dropped. A token
        that texts begin with takes the first place of each window.
      budget: average bits per expert weight, for an artifact.
      bits: one width for every expert, for an artifact.
      seq_len: tokens in a window.
      max_tokens: use only the first windows, up to so many tokens.
      prune: the policy by which `mcjax.odp` skips experts, "affine" or "paper"; None skips none.
      quantile: share of the lower-ranked experts that is skipped on calibration text.
      calibration: a text file, for pruning in a Hugging Face folder; artifacts carry their own.
      act_bits: rounds activations to 8 or 16 bits before products with an artifact's planes.
      bos: whether texts begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      progress: wraps the iteration over batches, called with (items, description=...).

    Returns:
      `perplexity`, `tokens` (predicted ones), `average_bits`, `effective_bits`, `bytes_read`,
      `experts_pruned`, `tokens_per_second`.

    Raises:
      ValueError: for input that cannot be evaluated.
    """
    path = Path(path)
    if calibration is not None and prune is None:
        raise ValueError("--calibration is for pruning: give --odp too, or leave it out")
    artifact = (path / MANIFEST).is_file()
    if calibration is not None and artifact:
        raise ValueError(f"{path} carries its calibration; --calibration is for MODEL folders")
    if prune is not None and not artifact:
        if not (budget is bits is act_bits is None):
            raise ValueError(
                f"{path} is not an artifact, so --budget, --bits and --act-bits do not apply; "
                "make one with `mcjax compress`"
            )
        module, params, facts = _pruned_folder(path, calibration, seq_len, prune, quantile, bos)
    else:
        model = serving.load(
            path, budget, bits=bits, act_bits=act_bits, prune=prune, quantile=quantile
        )
        module, params = model.module, model.params
        facts = {
            "average_bits": model.average_bits,
            "effective_bits": model.effective_bits,
            "bytes_read": model.bytes_read,
        }
    tokenizer_path, config = Checkpoint(path).tokenizer_path, module.config
    windows = _windows(tokenizer_path, text_path, config, seq_len, max_tokens, bos)
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


def _pruned_folder(path, calibration, seq_len, prune, quantile, bos):
    """A folder's module with pruning, its parameters, and what they are in bits and bytes."""
    folder = HuggingFaceFolder(path)
    config, params = folder.config, folder.read()
    facts = _dense_facts(params)
    if calibration is None:
        raise ValueError(
            f"--odp on the folder {path} needs --calibration TEXT to choose thresholds by"
        )
    text.check_length(seq_len, config.max_position_embeddings)
    tokens = text.encode_file(folder.tokenizer_path, calibration, config.vocab_size)
    begin = text.beginning(folder.tokenizer_path, config.vocab_size, bos)
    some = text.spread(text.windows(tokens, seq_len, "calibration text", begin), 128)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    statistics = dense_pruning_statistics(config, params, some)
    params = serving.with_pruning(params, statistics, prune, quantile)
    return Mixtral(config, prune=prune), params, facts


def dense_pruning_statistics(
    config: MixtralConfig, params: Any, windows: np.ndarray, batch_tokens: int = 4096
) -> list[odp.PruningStatistics]:
    """`mcjax.odp`'s statistics of every layer of a dense model, from windows int [N, T]."""
    batch = max(1, min(len(windows), batch_tokens // windows.shape[1]))
    x = [params["embedding"][windows[s : s + batch]] for s in range(0, len(windows), batch)]
    statistics = []
    run = jax.jit(partial(capture, layer(config, None, 0)))
    for i in range(config.num_hidden_layers):
        own = params[f"layer_{i}"]
        captured = [run(own, hidden) for hidden in x]
        x = [hidden for hidden, _ in captured]
        inputs = (seen["moe_input"].reshape(-1, config.hidden_size) for _, seen in captured)
        statistics.append(pruning_statistics(config, own["moe"], inputs))
    return statistics


def _windows(tokenizer_path, text_path, config, seq_len, max_tokens, bos) -> np.ndarray:
    text.check_length(seq_len, config.max_position_embeddings)
    begin = text.beginning(tokenizer_path, config.vocab_size, bos)
    tokens = text.encode_file(tokenizer_path, text_path, config.vocab_size)
    if max_tokens is not None:
        if max_tokens < seq_len - (begin is not None):
            raise ValueError(f"--max-tokens {max_tokens} is less than one window of {seq_len}")
        tokens = tokens[:max_tokens]
    return text.windows(tokens, seq_len, begin=begin)


def _dense_facts(params: Any) -> dict[str, Any]:
    experts = [v["moe"]["experts"] for k, v in params.items() if k.startswith("layer_")]
    leaves = jax.tree.leaves(experts)
    bits = 8 * sum(a.nbytes for a in leaves) / sum(math.prod(a.shape) for a in leaves)
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    return {"average_bits": bits, "effective_bits": bits, "bytes_read": total}
