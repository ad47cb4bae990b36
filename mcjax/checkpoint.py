"""The artifact: one Orbax checkpoint a layer, from which any allocation reads only its own bytes.

    OUT/manifest.json      format version, configuration, provenance, statistics, checksums
    OUT/tokenizer.json
    OUT/rest/              Orbax: embedding, norm, head
    OUT/layers/3/          Orbax: norms, router, attention and experts of layer 3

A weight's planes and tables are leaves of their own, `moe.experts.gate.plane_0` or `.table_2`,
chunked by expert; TensorStore underneath then reads single chunks. Every chunk that is read is
checked against a CRC-32 in the manifest, and the manifest against its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mcjax.bitplane import BitPlanes, MixedPlanes, draft_widths
from mcjax.hub import read_json
from mcjax.odp import PruningStatistics

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
INTERCEPT = "moe.intercept"
EXPERT_WEIGHTS = ("gate", "up", "down")
ATTENTION_WEIGHTS = ("qkv", "o")


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
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(directory.absolute(), leaves, save_args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds for one cause
            # Writes still under way end after Orbax's event loop, each printing a traceback.
            time.sleep(0.5)
            raise OSError(f"cannot write {directory}: {_first_line(error)}") from error
    return checksums


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
      expert_bytes_read: those of them that are expert weights and their tables.
    """

    def __init__(self, directory: str | Path, kind: str | None = None):
        self.directory = Path(directory).absolute()
        self.manifest = read_manifest(self.directory, kind)
        self.bytes_read = 0
        self.expert_bytes_read = 0
        self._open: dict[tuple[str, str], Any] = {}

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
            if leaf.startswith("moe.experts."):
                self.expert_bytes_read += value.nbytes
        return values

    def _start(self, checkpoint: str, leaf: str, row: int | None):
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
        store = self._open[key].result()
        return (store if row is None else store[row]).read()

    @property
    def _context(self):
        import tensorstore as ts

        if not hasattr(self, "_shared_context"):
            self._shared_context = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})
        return self._shared_context


def verify(reader: ArtifactReader) -> int:
    """Reads every chunk of an artifact against its checksum; returns the uncompressed bytes.

    Raises:
      ValueError: naming the first chunk that is damaged.
    """
    for checkpoint, leaves in reader.manifest["checksums"].items():
        for leaf, sums in leaves.items():
            split = leaf.startswith("moe.experts.")
            reader.read((checkpoint, leaf, row if split else None) for row in range(len(sums)))
    return reader.bytes_read


def read_rest(reader: ArtifactReader) -> dict[str, Any]:
    """Parameters outside the layers."""
    return _read_dense(reader, "rest", list(reader.manifest["checksums"]["rest"]))


def read_layer(
    reader: ArtifactReader,
    i: int,
    allocation: tuple[int, ...],
    attention_bits: int,
    loaded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters of one layer at the given widths.

    Args:
      reader: of the artifact.
      i: the layer.
      allocation: width of each expert.
      attention_bits: width of the attention's weights.
      loaded: the same layer at other widths; whatever it already holds is not read again.

    Returns:
      Nested dicts for `mcjax.models.mixtral.Layer`, experts as `MixedPlanes`.
    """
    checkpoint = f"layers/{i}"
    names = list(reader.manifest["checksums"][checkpoint])
    geometry = reader.manifest["geometry"]
    if loaded is None:
        dense = [n for n in names if ".plane_" not in n and ".table_" not in n and n != INTERCEPT]
        params = _read_dense(reader, checkpoint, dense)
        params["attention"] = {}
        for name in ATTENTION_WEIGHTS:
            leaf = f"attention.{name}"
            params["attention"][name] = read_planes(
                reader, checkpoint, leaf, (attention_bits,), **geometry[leaf]
            )
    else:
        params = {**loaded, "moe": {**loaded["moe"]}}
    held = None if loaded is None else loaded["moe"]["experts"]
    params["moe"] = {
        **params["moe"],
        "experts": {
            name: _read_experts(
                reader,
                checkpoint,
                f"moe.experts.{name}",
                allocation,
                geometry,
                None if held is None else held[name],
            )
            for name in EXPERT_WEIGHTS
        },
    }
    return params


def read_draft_tables(
    reader: ArtifactReader, i: int, experts: Mapping[str, MixedPlanes], draft: int
) -> dict[str, MixedPlanes]:
    """Experts of one layer that can be cut to `draft` bits as well.

    Args:
      reader: of the artifact.
      i: the layer.
      experts: its weights as `read_layer` gives them, by name.
      draft: the width whose tables are read, for experts that are wider.

    Returns:
      The same planes, not copies of them, and beside each wider expert's table that of `draft`.
    """
    result = {}
    for name, held in experts.items():
        leaf = f"moe.experts.{name}.table_{draft}"
        stacks = []
        for stack in held.stacks:
            if stack.bits > draft:
                mine = [e for e, k in enumerate(held.allocation) if k == stack.bits]
                table = np.stack(reader.read((f"layers/{i}", leaf, e) for e in mine))
                stack = replace(
                    stack,
                    tables=(jax.numpy.asarray(table), stack.tables[-1]),
                    widths=draft_widths(stack.bits, draft),
                )
            stacks.append(stack)
        result[name] = MixedPlanes(stacks=tuple(stacks), allocation=held.allocation)
    return result


def read_planes(
    reader: ArtifactReader,
    checkpoint: str,
    leaf: str,
    widths: tuple[int, ...],
    d_in: int,
    group_size: int,
) -> BitPlanes:
    """One weight that is not chunked: the planes of the widest width and a table for each."""
    parts = [f"{leaf}.plane_{p}" for p in range(widths[-1])]
    parts += [f"{leaf}.table_{k}" for k in widths]
    values = reader.read((checkpoint, part, None) for part in parts)
    return BitPlanes(
        planes=jax.numpy.asarray(np.stack(values[: widths[-1]], axis=-4)),
        tables=tuple(jax.numpy.asarray(table) for table in values[widths[-1] :]),
        widths=widths,
        d_in=d_in,
        group_size=group_size,
    )


def read_pruning(reader: ArtifactReader) -> list[PruningStatistics]:
    """What `mcjax.odp` needs of every layer."""
    kept = reader.manifest["statistics"]
    layers = range(len(kept["ratio"]))
    intercepts = reader.read((f"layers/{i}", INTERCEPT, None) for i in layers)
    return [
        PruningStatistics(np.array(ratio), np.array(slope), intercept)
        for ratio, slope, intercept in zip(kept["ratio"], kept["slope"], intercepts, strict=True)
    ]


def _read_experts(reader, checkpoint, leaf, allocation, geometry, held) -> MixedPlanes:
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if held is not None:
        for expert, (stack, slot) in enumerate(held.location):
            source = held.stacks[stack]
            kept[expert] = np.asarray(source.planes[slot]), np.asarray(source.tables[0][slot])
    requests: list[tuple[str, str, int | None]] = []
    places: list[tuple[int, Any]] = []
    experts: list[dict[Any, Any]] = [{} for _ in allocation]
    for expert, width in enumerate(allocation):
        planes, table = kept.get(expert, ((), None))
        for p in range(width):
            if p < len(planes):
                experts[expert][p] = planes[p]
            else:
                requests.append((checkpoint, f"{leaf}.plane_{p}", expert))
                places.append((expert, p))
        if len(planes) == width:
            experts[expert]["table"] = table
        else:
            requests.append((checkpoint, f"{leaf}.table_{width}", expert))
            places.append((expert, "table"))
    for (expert, part), value in zip(places, reader.read(requests), strict=True):
        experts[expert][part] = value
    stacks = []
    for width in sorted(set(allocation)):
        mine = [e for e, k in zip(experts, allocation, strict=True) if k == width]
        stacks.append(
            BitPlanes(
                planes=jax.numpy.asarray(
                    np.stack([np.stack([e[p] for p in range(width)]) for e in mine])
                ),
                tables=(jax.numpy.asarray(np.stack([e["table"] for e in mine])),),
                widths=(width,),
                **geometry[leaf],
            )
        )
    return MixedPlanes(stacks=tuple(stacks), allocation=tuple(allocation))


def _read_dense(reader: ArtifactReader, checkpoint: str, names: list[str]) -> dict[str, Any]:
    values = reader.read((checkpoint, name, None) for name in names)
    return unflatten({n: jax.numpy.asarray(v) for n, v in zip(names, values, strict=True)})


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
