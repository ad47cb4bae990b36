"""Text to token windows, what a folder says of its tokens, and tokens to perplexity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mcjax.checkpoint import MANIFEST, read_manifest
from mcjax.documents import read_documents
from mcjax.hub import read_json

BOS = ("auto", "always", "never")
"""Whether texts begin with the beginning-of-sequence token: auto is as the tokenizer says."""


def open_tokenizer(path: Path) -> Any:
    """Opens a tokenizer.json as a `tokenizers.Tokenizer` that neither truncates nor pads.

    Raises:
      ValueError: if it is not readable as one.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def beginning(tokenizer_path: Path, vocab_size: int, bos: str = "auto") -> int | None:
    """Finds the token that texts begin with.

    Args:
      tokenizer_path: a tokenizer.json; tokenizer_config.json and config.json (in an artifact the
        manifest) are looked for beside.
      vocab_size: of the model.
      bos: one of `BOS`. With "auto" tokenizer_config.json's `add_bos_token` says whether there is
        one, or in its absence what the tokenizer itself puts before a text.

    Returns:
      Its id, or None if texts begin with none.

    Raises:
      ValueError: if a token is asked for and not known, or the model does not know it.
    """
    if bos not in BOS:
        raise ValueError(f"--bos must be one of {', '.join(BOS)}, got {bos!r}")
    if bos == "never":
        return None
    tokenizer = open_tokenizer(tokenizer_path)
    added = _added_before(tokenizer)
    adds = tokenizer_settings(tokenizer_path.parent).get("add_bos_token")
    if bos == "auto" and not (bool(added) if adds is None else adds):
        return None
    if len(added) > 1:
        raise ValueError(
            f"{tokenizer_path} begins texts with {len(added)} tokens of its own, where one is "
            "supported; give --bos never to do without them"
        )
    token = added[0] if added else _named_bos(tokenizer, tokenizer_path.parent)
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"the beginning-of-sequence token {token} of {tokenizer_path.parent} is not one of "
            f"the model's {vocab_size}"
        )
    return token


def _added_before(tokenizer) -> list[int]:
    """The tokens that the tokenizer's post-processor puts before a text."""
    text = "a"
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text).ids
    for before in range(len(whole) - len(plain) + 1):
        if whole[before : before + len(plain)] == plain:
            return whole[:before]
    return []


def _named_bos(tokenizer, folder: Path) -> int:
    name = special_tokens(folder).get("bos_token")
    token = None if name is None else tokenizer.token_to_id(name)
    if token is None and (folder / MANIFEST).is_file():
        token = read_manifest(folder)["config"].get("bos_token_id")
    elif token is None and (folder / "config.json").is_file():
        token = read_json(folder / "config.json").get("bos_token_id")
    if not isinstance(token, int) or isinstance(token, bool):
        raise ValueError(
            f"{folder} names no beginning-of-sequence token, neither as bos_token in "
            "tokenizer_config.json nor as bos_token_id in config.json; give --bos never"
        )
    return token


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Reads a folder's tokenizer_config.json; empty if there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def special_tokens(folder: Path) -> dict[str, str]:
    """Reads the named tokens of a folder's tokenizer_config.json: `bos_token`, `eos_token`, ..."""
    named = {}
    for name, value in tokenizer_settings(folder).items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            named[name] = value
    return named


def end_tokens(folder: Path, known: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Adds the `eos_token_id`s of a folder's generation_config.json to those already known.

    Raises:
      ValueError: if one of them is not a token of the model.
    """
    path = folder / "generation_config.json"
    given = read_json(path).get("eos_token_id") if path.is_file() else None
    more = [] if given is None else given if isinstance(given, list) else [given]
    for token in more:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ValueError(f"{path}: eos_token_id must be 0 to {vocab_size - 1}, got {token!r}")
    return tuple(dict.fromkeys((*known, *more)))


def unknown_ids(tokenizer: Any, vocab_size: int) -> tuple[tuple[int, int], ...]:
    """Finds the model's ids that a tokenizer has no token for, as ranges [start, stop)."""
    ids = np.array(sorted({-1, vocab_size, *tokenizer.get_vocab().values()}))
    ids = ids[ids <= vocab_size].tolist()
    return tuple((a + 1, b) for a, b in itertools.pairwise(ids) if b > a + 1)


def check_length(seq_len: int, positions: int) -> None:
    """Refuses windows that are longer than a model has positions for.

    Raises:
      ValueError: with both numbers.
    """
    if seq_len > positions:
        raise ValueError(
            f"--seq-len {seq_len} is more than the model's {positions} positions "
            "(max_position_embeddings); give a smaller --seq-len"
        )


def encode_file(
    tokenizer_path: Path, text_path: str | Path, vocab_size: int, ends: Sequence[int] = ()
) -> np.ndarray:
    """Tokens int32 [N] of a whole text, its documents kept apart by an end-of-sequence token.

    Args:
      tokenizer_path: a tokenizer.json; tokenizer_config.json is looked for beside.
      text_path: as `mcjax.documents.read_documents` reads it.
      vocab_size: of the model.
      ends: tokens that end a text, of which the first is used unless the tokenizer names another.

    Raises:
      ValueError: if the text cannot be read or is empty, or the tokenizer is unreadable or larger
        than the model's vocabulary.
    """
    documents = read_documents(text_path)
    tokenizer = open_tokenizer(tokenizer_path)
    end = tokenizer.token_to_id(special_tokens(tokenizer_path.parent).get("eos_token", ""))
    between = [*ends[:1]] if end is None else [end]
    encoded = tokenizer.encode_batch(documents, add_special_tokens=False)
    parts = (ids for one in encoded for ids in (between, one.ids))
    tokens = np.fromiter(itertools.chain(*itertools.islice(parts, 1, None)), np.int32)
    if tokens.size == 0:
        raise ValueError(f"{text_path} holds no tokens")
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"{tokenizer_path} gives token {tokens.max()}, the model knows {vocab_size}: "
            "the tokenizer does not belong to this model"
        )
    return tokens


def windows(
    tokens: np.ndarray, length: int, what: str = "text", begin: int | None = None
) -> np.ndarray:
    """Cuts tokens [N] into consecutive windows [count, length], dropping the tail.

    Args:
      tokens: of the whole text.
      length: of a window.
      what: the text's name in errors.
      begin: a token that every window begins with, before `length - 1` of the text; or None.

    Raises:
      ValueError: if there is not one whole window, or a window has fewer than two tokens.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, got --seq-len {length}")
    own = length if begin is None else length - 1
    count = len(tokens) // own
    if count == 0:
        raise ValueError(
            f"the {what} has {len(tokens)} tokens, fewer than one window of {own}; "
            "give more text or a smaller --seq-len"
        )
    cut = tokens[: count * own].reshape(count, own)
    return cut if begin is None else np.pad(cut, ((0, 0), (1, 0)), constant_values=begin)


def spread(windows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` windows, evenly spread over all of them."""
    if count < 1:
        raise ValueError(f"--samples must be at least 1, got {count}")
    if count >= len(windows):
        return windows
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]


@partial(jax.jit, static_argnums=0)
def _likelihood_and_skips(module, params, tokens):
    logits, seen = module.apply({"params": params}, tokens, mutable=["keep"])
    logits = logits[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    masks = jax.tree.leaves(seen)
    count = sum(m.size for m in masks)
    skipped = sum(jnp.sum(~m, dtype=jnp.float32) for m in masks) / max(count, 1)
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
