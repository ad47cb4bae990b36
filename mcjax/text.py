"""Text to token windows, and tokens to perplexity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def encode_file(tokenizer_path: Path, text_path: str | Path, vocab_size: int) -> np.ndarray:
    """Tokens int32 [N] of a whole text file, without special tokens.

    Raises:
      ValueError: if the text is missing, not UTF-8 or empty, or the tokenizer is unreadable or
        larger than the model's vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        text = Path(text_path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {text_path}: {error.strerror}") from None
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{tokenizer_path} is not a tokenizer: {error}") from None
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if tokens.size == 0:
        raise ValueError(f"{text_path} holds no tokens")
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"{tokenizer_path} gives token {tokens.max()}, the model knows {vocab_size}: "
            "the tokenizer does not belong to this model"
        )
    return tokens


def windows(tokens: np.ndarray, length: int, what: str = "text") -> np.ndarray:
    """Cuts tokens [N] into consecutive windows [N // length, length], dropping the tail.

    Raises:
      ValueError: if there is not one whole window, or a window has fewer than two tokens.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, got --seq-len {length}")
    count = len(tokens) // length
    if count == 0:
        raise ValueError(
            f"the {what} has {len(tokens)} tokens, fewer than one window of {length}; "
            "give more text or a smaller --seq-len"
        )
    return tokens[: count * length].reshape(count, length)


def spread(windows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` windows, evenly spread over all of them."""
    if count < 1:
        raise ValueError(f"--samples must be at least 1, got {count}")
    if count >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


@partial(jax.jit, static_argnums=0)
def negative_log_likelihood(module: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Sum over windows [B, T] of each token's negative log-likelihood given those before it."""
    return _likelihood_and_skips(module, params, tokens)[0]


@partial(jax.jit, static_argnums=0)
def _likelihood_and_skips(module, params, tokens):
    logits, seen = module.apply({"params": params}, tokens, mutable=["odp"])
    logits = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    masks = jax.tree.leaves(seen)
    skipped = jnp.mean(jnp.stack([jnp.mean(~m, dtype=jnp.float32) for m in masks])) if masks else 0
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - chosen), skipped


def perplexity(
    module: nn.Module,
    params: Any,
    windows: np.ndarray,
    batch_tokens: int = 4096,
    progress: Callable = lambda items: items,
) -> tuple[float, float]:
    """Exp of the mean negative log-likelihood over all windows.

    Args:
      module: a language model, from tokens [B, T] to logits [B, T, vocab].
      params: its parameters.
      windows: int [N, T].
      batch_tokens: about how many tokens are computed at once.
      progress: wraps the iteration over batches.

    Returns:
      The perplexity, and the share of routed experts that its pruning policy skipped.
    """
    count, length = windows.shape
    batch = max(1, min(count, batch_tokens // length))
    total = skipped = 0.0
    for start in progress(range(0, count, batch)):
        some = windows[start : start + batch]
        loss, skips = _likelihood_and_skips(module, params, some)
        total += float(loss)
        skipped += float(skips) * len(some)
    return float(np.exp(total / (count * (length - 1)))), skipped / count
