"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Gives a place to write a file or folder at, which becomes `path` if all goes well.

    It is beside `path`, of the same suffix, and gone afterwards in any case. A file at `path` is
    replaced, a folder only if it is empty.

    Raises:
      ValueError: if the folder that `path` is to be in is missing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder, so {path} cannot be written")
    aside = path.with_name(f".{path.name}.partial{path.suffix}")
    _remove(aside)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
