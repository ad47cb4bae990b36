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

from mcjax.hub import read_json

BOS = ("auto", "always", "never")
"""Whether texts begin with the beginning-of-sequence token: as the tokenizer says, or not."""


def open_tokenizer(path: Path) -> Any:
    """A tokenizer.json as a `tokenizers.Tokenizer` that neither cuts texts nor pads them.

    Raises:
      ValueError: if it is unreadable.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def beginning(tokenizer_path: Path, bos: str = "auto") -> int | None:
    """The token that texts begin with, None for none.

    Args:
      tokenizer_path: a tokenizer.json; tokenizer_config.json and config.json are looked for beside.
      bos: "auto" asks the tokenizer: its post-processor, then `add_bos_token` of
        tokenizer_config.json; "always" takes the beginning-of-sequence token of either file.

    Raises:
      ValueError: if `bos` is unknown, or "always" finds no token.
    """
    if bos not in BOS:
        raise ValueError(f"--bos must be one of {', '.join(BOS)}, got {bos!r}")
    if bos == "never":
        return None
    tokenizer = open_tokenizer(tokenizer_path)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    if whole[: len(plain)] != plain:
        return whole[0]
    files = [tokenizer_path.parent / n for n in ("tokenizer_config.json", "config.json")]
    values, config = (read_json(f) if f.is_file() else {} for f in files)
    if bos == "auto" and not values.get("add_bos_token"):
        return None
    named = values.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    token = tokenizer.token_to_id(named) if isinstance(named, str) else config.get("bos_token_id")
    if isinstance(token, int):
        return token
    if bos == "auto":
        return None
    raise ValueError(
        f"--bos always: neither bos_token in {files[0]} nor bos_token_id in {files[1]} is known"
    )


def encode_file(tokenizer_path: Path, text_path: str | Path, vocab_size: int) -> np.ndarray:
    """Tokens int32 [N] of a whole text file, without special tokens.

    Raises:
      ValueError: if the text is missing, not UTF-8 or empty, or the tokenizer is unreadable or
        larger than the model's vocabulary.
    """
    try:
        text = Path(text_path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {text_path}: {error.strerror}") from None
    tokenizer = open_tokenizer(tokenizer_path)
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if tokens.size == 0:
        raise ValueError(f"{text_path} holds no tokens")
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"{tokenizer_path} gives token {tokens.max()}, the model knows {vocab_size}: "
            "the tokenizer does not belong to this model"
        )
    return tokens


def windows(
    tokens: np.ndarray, length: int, what: str = "text", first: int | None = None
) -> np.ndarray:
    """Cuts tokens [N] into consecutive windows [W, length], dropping the tail.

    With `first`, each window is that token and `length - 1` of the text.

    Raises:
      ValueError: if there is not one whole window, or a window has fewer than two tokens.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, got --seq-len {length}")
    own = length if first is None else length - 1
    count = len(tokens) // own
    if count == 0:
        raise ValueError(
            f"the {what} has {len(tokens)} tokens, fewer than one window of {length}; "
            "give more text or a smaller --seq-len"
        )
    cut = tokens[: count * own].reshape(count, own)
    if first is None:
        return cut
    return np.concatenate([np.full((count, 1), first, cut.dtype), cut], axis=1)


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
