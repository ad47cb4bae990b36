"""The artifact: one Orbax checkpoint a layer, from which any allocation reads only its own bytes.

    OUT/manifest.json      format version, config.json, provenance, statistics, checksums
    OUT/tokenizer.json
    OUT/rest/              Orbax: embedding, norm, head
    OUT/layers/3/          Orbax: every weight of layer 3, by its role's dotted name

A weight's planes and tables are leaves of their own, `block.experts.gate.plane_0` or `.table_2`,
those of experts chunked by expert; TensorStore underneath then reads single chunks. Every chunk
that is read is checked against a CRC-32 in the manifest, and the manifest against its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mcjax.bitplane import BitPlanes
from mcjax.hub import read_json
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.families import describe
from mcjax.ops import layout

FORMAT_VERSION = 7
CACHED = 1 << 22
"""Bytes that a reader keeps of what it has read: indices are read again, chunks are not."""

MANIFEST = "manifest.json"

MEASURED = "measured.jsonl"
"""Beside an artifact's data: what `mcjax eval` has measured on it, one JSON object a line."""

INTERCEPT = (*weights.BLOCK, "intercept")
BY_EXPERT = tuple(".".join((*weights.EXPERTS, name, "")) for name in ("gate", "up", "down"))
"""How the names of leaves begin that are chunked along their first axis, experts."""


def save_tree(directory: Path, tree: Mapping[str, Any], chunked: Iterable[str]) -> dict[str, list]:
    """Writes arrays and `BitPlanes` as one Orbax checkpoint.

    Args:
      directory: where to; must not exist.
      tree: nested dicts.
      chunked: prefixes of leaves that are chunked along their first axis.

    Returns:
      CRC-32 checksums of every leaf: one for each row of its first axis where chunked, else one.

    Raises:
      OSError: if it cannot be written, for lack of space for instance.
    """
    import orbax.checkpoint as ocp

    leaves = flatten(tree)
    chunked = tuple(chunked)
    arguments, checksums = {}, {}
    for name, leaf in leaves.items():
        split = name.startswith(chunked) if chunked else False
        rows = list(leaf) if split else [leaf]
        checksums[name] = [crc32(row) for row in rows]
        arguments[name] = (
            ocp.SaveArgs(chunk_byte_size=rows[0].nbytes, shard_axes=(0,))
            if split
            else ocp.SaveArgs()
        )
    with contextlib.redirect_stderr(io.StringIO()), _quiet("absl"):
        try:
            # Of several processes this one alone: none waits for the others.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            )
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(directory.absolute(), leaves, save_args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds for one cause
            # Writes still under way end after Orbax's event loop, each printing a traceback.
            time.sleep(0.5)
            raise OSError(f"cannot write {directory}: {_first_line(error)}") from error
    return checksums


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Has a logger say nothing: Orbax warns of every chunk that is small."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Nested dicts of arrays and `BitPlanes` to flat names, planes and tables apart."""
    leaves: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            leaves |= flatten(value, name + ".")
        elif isinstance(value, BitPlanes):
            planes = np.moveaxis(np.asarray(value.planes), -4, 0)
            leaves |= {f"{name}.plane_{p}": np.ascontiguousarray(b) for p, b in enumerate(planes)}
            leaves |= {
                f"{name}.table_{k}": np.asarray(t)
                for k, t in zip(value.widths, value.tables, strict=True)
            }
        else:
            leaves[name] = np.asarray(value)
    return leaves


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest with its own checksum as the last line."""
    body = json.dumps({"format_version": FORMAT_VERSION, **manifest}, separators=(",", ":"))
    crc = f"{zlib.crc32(body.encode()):08x}"
    (directory / MANIFEST).write_text(f'{{"crc32":"{crc}","manifest":{body}}}\n')


def read_manifest(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """Reads and verifies the manifest.

    Args:
      directory: the artifact.
      kind: what it must be, "model" or "tree"; None for either.

    Raises:
      ValueError: if it is not an artifact, damaged, or of another format version or kind.
    """
    if not directory.is_dir() or not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} is not an mcjax artifact: it has no {MANIFEST}")
    outer = read_json(directory / MANIFEST)
    manifest = outer.get("manifest")
    if not isinstance(manifest, dict):
        raise ValueError(f"{directory / MANIFEST} is damaged: no manifest inside")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has format version {version}, this mcjax reads {FORMAT_VERSION}; "
            "compress the model again or use the mcjax that wrote it"
        )
    body = json.dumps(manifest, separators=(",", ":"))
    if f"{zlib.crc32(body.encode()):08x}" != outer.get("crc32"):
        raise ValueError(f"{directory / MANIFEST} is damaged: its checksum does not match")
    found = manifest.get("kind", "model")
    if kind not in (None, found):
        reader = {"model": "mcjax.load", "tree": "mcjax.tree.load"}[found]
        raise ValueError(f"{directory} holds a {found}, not a {kind}; read it with {reader}")
    return manifest


class ArtifactReader:
    """Reads chosen chunks of an artifact, verifying each.

    Attributes:
      manifest: the verified manifest.
      bytes_read: uncompressed bytes of all chunks read so far.
      expert_bytes_read: those of them that are weights, with their tables, that budgets are about.
    """

    def __init__(self, directory: str | Path, kind: str | None = None):
        self.directory = Path(directory).absolute()
        self.manifest = read_manifest(self.directory, kind)
        self.bytes_read = 0
        self.expert_bytes_read = 0
        self._open: dict[tuple[str, str], Any] = {}

    @cached_property
    def decoder(self) -> Decoder:
        """The model that a model's artifact holds."""
        return describe(self.manifest["config"])[1]

    @cached_property
    def _shared_out(self) -> tuple[str, ...]:
        if self.manifest.get("kind", "model") != "model":
            return BY_EXPERT
        return tuple(
            f"{role.name}."
            for layer in set(self.decoder.layers)
            for role in weights.budgeted(self.decoder, layer)
        )

    def read(self, requests: Iterable[tuple[str, str, int | None]]) -> list[np.ndarray]:
        """Reads chunks, all at once.

        Args:
          requests: (checkpoint, leaf, row): the checkpoint's folder below the artifact, the
            leaf's name, and the row of a chunked leaf, or None for the whole of an unchunked one.

        Returns:
          One array for each request.

        Raises:
          ValueError: if a chunk is missing, unreadable or does not match its checksum.
        """
        requests = list(requests)
        try:
            pending = [self._start(*request) for request in requests]
            values = [np.asarray(future.result()) for future in pending]
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.directory} is damaged: {_first_line(error)}") from None
        for (checkpoint, leaf, row), value in zip(requests, values, strict=True):
            expected = self.manifest["checksums"][checkpoint][leaf][row or 0]
            if crc32(value) != expected:
                where = leaf if row is None else f"{leaf} of expert {row}"
                raise ValueError(
                    f"{self.directory} is damaged: {checkpoint}/{where} does not match its checksum"
                )
            self.bytes_read += value.nbytes
            if leaf.startswith(self._shared_out):
                self.expert_bytes_read += value.nbytes
        return values

    def read_all(self, checkpoint: str) -> dict[str, np.ndarray]:
        """Reads every leaf of a checkpoint, by name."""
        leaves = {}
        for leaf, sums in self.manifest["checksums"][checkpoint].items():
            split = leaf.startswith(BY_EXPERT)
            rows = self.read((checkpoint, leaf, row if split else None) for row in range(len(sums)))
            leaves[leaf] = np.stack(rows) if split else rows[0]
        return leaves

    def dtype(self, checkpoint: str, leaf: str) -> Any:
        """The type of a leaf.

        Raises:
          ValueError: if it is missing or unreadable.
        """
        try:
            return self._store(checkpoint, leaf).result().dtype.numpy_dtype
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.directory} is damaged: {_first_line(error)}") from None

    def _start(self, checkpoint: str, leaf: str, row: int | None):
        store = self._store(checkpoint, leaf).result()
        return (store if row is None else store[row]).read()

    def _store(self, checkpoint: str, leaf: str):
        import tensorstore as ts

        if leaf not in self.manifest["checksums"].get(checkpoint, {}):
            raise ValueError(f"{checkpoint} has no {leaf}")
        key = (checkpoint, leaf)
        if key not in self._open:
            base = self.directory / checkpoint
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{leaf}/"},
            }
            self._open[key] = ts.open(spec, open=True, read=True, context=self._context)
        return self._open[key]

    @property
    def _context(self):
        import tensorstore as ts

        if not hasattr(self, "_shared_context"):
            self._shared_context = ts.Context({"cache_pool": {"total_bytes_limit": CACHED}})
        return self._shared_context


def verify(reader: ArtifactReader) -> int:
    """Reads every chunk of an artifact against its checksum; returns the uncompressed bytes.

    Raises:
      ValueError: naming the first chunk that is damaged.
    """
    for checkpoint, leaves in reader.manifest["checksums"].items():
        for leaf, sums in leaves.items():
            split = leaf.startswith(BY_EXPERT)
            reader.read((checkpoint, leaf, row if split else None) for row in range(len(sums)))
    return reader.bytes_read


def read_planes(
    reader: ArtifactReader,
    checkpoint: str,
    leaf: str,
    widths: tuple[int, ...],
    d_in: int,
    group_size: int,
    rotated: bool,
) -> BitPlanes:
    """One weight that is not chunked: the planes of the widest width and a table for each."""
    parts = [f"{leaf}.plane_{p}" for p in range(widths[-1])]
    parts += [f"{leaf}.table_{k}" for k in widths]
    values = reader.read((checkpoint, part, None) for part in parts)
    return BitPlanes(
        planes=layout.put(np.stack(values[: widths[-1]], axis=-4)),
        tables=tuple(map(layout.put, values[widths[-1] :])),
        widths=widths,
        d_in=d_in,
        group_size=group_size,
        rotated=rotated,
    )


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Flat names, parts joined by dots, to nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def crc32(value: np.ndarray) -> int:
    """Checksum of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
