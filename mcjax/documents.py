"""Texts as documents: from files, plain or JSON lines, compressed or not, and from data sets."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

DATASET = re.compile(r"(?P<name>[^:]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?")
"""A data set: OWNER/NAME on the hub or a folder, either followed by :CONFIG or :CONFIG:SPLIT."""

ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")

LINES = (".jsonl", ".json")
"""How files of JSON lines end."""

CHARACTERS = 1 << 24
"""How much is taken of a data set, from its beginning."""


def read_documents(source: str | Path) -> list[str]:
    """Reads a text.

    Args:
      source: a UTF-8 file, which is one document, or one that ends in .jsonl or .json, each of
        whose lines is an object with a `text`; either may be compressed, ending in .gz. Or a data
        set, see `DATASET`, read by the `datasets` library: the field `text` of its first documents,
        of the split "train" unless another is named.

    Returns:
      Its documents, of which none is empty.

    Raises:
      ValueError: if it cannot be read, with where and why.
    """
    path = Path(source)
    named = DATASET.fullmatch(str(source))
    if not path.is_file() and named is not None and _is_dataset(named["name"]):
        documents = _of_dataset(**named.groupdict())
    else:
        text, lines = _text(path), Path(path.name.removesuffix(".gz")).suffix in LINES
        documents = list(_of_lines(path, text)) if lines else [text]
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{source} holds no text")
    return documents


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _of_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{path}, line {number}, has no text field of a string; it has {has}")
        yield entry["text"]


def _is_dataset(name: str) -> bool:
    return Path(name).is_dir() or ON_THE_HUB.fullmatch(name) is not None


def _of_dataset(name: str, config: str | None, split: str | None) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name} is no file here; to read it as a data set on the hub, install datasets"
        ) from None
    from huggingface_hub import constants

    # Streaming reads no more than is wanted, but not from the library's cache.
    streaming = Path(name).is_dir() or not constants.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=streaming
        )
        return list(_beginning(name, rows))
    except ValueError as error:
        raise ValueError(f"cannot read {name}: {error}") from None
    except Exception as error:  # of the many libraries below it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} is no file here, and no data set to be had: {reason}") from None


def _beginning(name: str, rows) -> Iterator[str]:
    left = CHARACTERS
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"its rows have no text field of a string; they have {sorted(row)}")
        yield row["text"]
        left -= len(row["text"])
        if left <= 0:
            return
