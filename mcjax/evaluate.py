"""Perplexity of a Hugging Face folder or an artifact at a precision."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mcjax import serving, text
from mcjax.checkpoint import MANIFEST
from mcjax.convert import HuggingFaceFolder
from mcjax.models.mixtral import Mixtral


def evaluate(
    path: str | Path,
    text_path: str | Path,
    *,
    budget: float | None = None,
    bits: int | None = None,
    seq_len: int = 512,
    max_tokens: int | None = None,
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Perplexity on a text file.

    Args:
      path: a Hugging Face folder, or an artifact.
      text_path: tokenised whole and cut into consecutive windows; the tail is dropped.
      budget: average bits per expert weight, for an artifact.
      bits: one width for every expert, for an artifact.
      seq_len: tokens in a window.
      max_tokens: use only the first windows, up to so many tokens.
      progress: wraps the iteration over batches, called with (items, description=...).

    Returns:
      `perplexity`, `tokens` (predicted ones), `average_bits`, `effective_bits`, `bytes_read`,
      `experts_pruned`, `tokens_per_second`.

    Raises:
      ValueError: for input that cannot be evaluated.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        model = serving.load(path, budget, bits=bits)
        module, params = model.module, model.params
        tokenizer_path, config = path / "tokenizer.json", module.config
        facts = {
            "average_bits": model.average_bits,
            "effective_bits": model.effective_bits,
            "bytes_read": model.bytes_read,
        }
    else:
        if budget is not None or bits is not None:
            raise ValueError(
                f"{path} is not an artifact, so --budget and --bits do not apply; "
                "make one with `mcjax compress`"
            )
        folder = HuggingFaceFolder(path)
        tokenizer_path, config = folder.tokenizer_path, folder.config
        module, params = Mixtral(config), folder.read()
        facts = _dense_facts(params)
    windows = _windows(tokenizer_path, text_path, config, seq_len, max_tokens)
    start = time.perf_counter()
    value = text.perplexity(
        module.apply, params, windows, progress=lambda items: progress(items, description="eval")
    )
    seconds = time.perf_counter() - start
    return {
        "perplexity": value,
        "tokens": windows.shape[0] * (windows.shape[1] - 1),
        **facts,
        "experts_pruned": 0.0,
        "tokens_per_second": windows.size / seconds,
    }


def _windows(tokenizer_path, text_path, config, seq_len, max_tokens) -> np.ndarray:
    tokens = text.encode_file(tokenizer_path, text_path, config.vocab_size)
    if max_tokens is not None:
        if max_tokens < seq_len:
            raise ValueError(f"--max-tokens {max_tokens} is less than one window of {seq_len}")
        tokens = tokens[:max_tokens]
    return text.windows(tokens, seq_len)


def _dense_facts(params: Any) -> dict[str, Any]:
    experts = [v["moe"]["experts"] for k, v in params.items() if k.startswith("layer_")]
    leaves = jax.tree.leaves(experts)
    bits = 8 * sum(a.nbytes for a in leaves) / sum(math.prod(a.shape) for a in leaves)
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    return {"average_bits": bits, "effective_bits": bits, "bytes_read": total}
