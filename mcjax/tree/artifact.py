"""A tree on disk: an Orbax checkpoint of single planes and tables, of which a width reads its own.

It is the artifact of `mcjax compress`, with a manifest that says how planes lie in their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import checkpoint
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.leaves import named, some
from mcjax.models.weights import put
from mcjax.ops import Adapted
from mcjax.tree.kernel import Kernel, holds_planes
from mcjax.tree.view import Layout

KIND = "tree"


def save(path: str | Path, tree: Any, note: Any = None) -> None:
    """Writes a tree of arrays and planes as an artifact, whole or not at all.

    Args:
      path: must not exist.
      tree: of arrays, `Kernel`s and `BitPlanes`: nested dicts, lists, dataclasses, NNX states,
        whatever JAX knows as a tree.
      note: JSON-ready, kept in the manifest.

    Raises:
      ValueError: if `path` exists, its folder does not, two leaves have one name, or a weight has
        adapters, which `mcjax.lora.save` keeps.
      OSError: if it cannot be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another place")
    names, leaves, _ = named(tree, holds_planes)
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise ValueError(f"two leaves are named {twice!r}")
    geometry, held = {}, {}
    for shown, name, leaf in zip(names, map(_stored, names), leaves, strict=True):
        held[name] = planes = leaf.planes if isinstance(leaf, Kernel) else leaf
        if isinstance(planes, Adapted):
            raise ValueError(f"{shown} has adapters: save the tree without, and these by lora.save")
        if isinstance(planes, MixedPlanes):
            raise ValueError(f"{shown} has matrices of several widths, which are not kept")
        if isinstance(planes, BitPlanes):
            geometry[name] = {
                "d_in": planes.d_in,
                "group_size": planes.group_size,
                "widths": list(planes.widths),
                "rotated": planes.rotated,
            }
        if isinstance(leaf, Kernel):
            layout = dataclasses.asdict(leaf.layout) | {"dtype": np.dtype(leaf.dtype).name}
            geometry[name]["layout"] = layout
    with whole(path) as aside:
        aside.mkdir()
        sums = checkpoint.save_tree(aside / KIND, held, ())
        manifest = {"kind": KIND, "geometry": geometry, "checksums": {KIND: sums}, "note": note}
        checkpoint.write_manifest(aside, manifest)


def load(path: str | Path, bits: int | Mapping[str, int] | None = None, like: Any = None) -> Any:
    """Reads an artifact that `save` wrote.

    Args:
      path: the artifact.
      bits: the width to serve every weight at, or each one's by its name, see
        `mcjax.tree.allocate`; only its planes and table are read. None reads all.
      like: a tree of the structure that comes back, such as the network's own or the shapes of
        `jax.eval_shape`; None gives nested dicts.

    Returns:
      The tree.

    Raises:
      ValueError: if it is damaged, of another kind or of another tree than `like`, or a weight has
        no such width.
    """
    reader = checkpoint.ArtifactReader(path, KIND)
    geometry = reader.manifest["geometry"]
    stored = list(reader.manifest["checksums"][KIND])
    dense = [n for n in stored if n.rsplit(".", 1)[0] not in geometry]
    values = reader.read((KIND, name, None) for name in dense)
    leaves: dict[str, Any] = {n: jnp.asarray(v) for n, v in zip(dense, values, strict=True)}
    if isinstance(bits, Mapping) and set(map(_stored, bits)) != set(geometry):
        other = map(_name, sorted(set(map(_stored, bits)) ^ set(geometry)))
        raise ValueError(f"widths of other weights: they differ in {some(other)}")
    for name, shape in geometry.items():
        widths = tuple(shape["widths"])
        wanted = bits[_name(name)] if isinstance(bits, Mapping) else bits
        if wanted is not None and wanted not in widths:
            raise ValueError(f"bits {wanted} is not one of {_name(name)}'s widths {widths}")
        chosen = widths if wanted is None else (wanted,)
        planes = checkpoint.read_planes(
            reader, KIND, name, chosen, shape["d_in"], shape["group_size"], shape["rotated"]
        )
        leaves[name] = _kernel(planes, shape["layout"]) if "layout" in shape else planes
    if like is None:
        tree: dict[str, Any] = {}
        for name, leaf in leaves.items():
            put(tree, tuple(map(unquote, name.split("."))), leaf)
        return tree
    names, _, structure = named(like, holds_planes)
    if set(map(_stored, names)) != set(leaves):
        other = map(_name, sorted(set(map(_stored, names)) ^ set(leaves)))
        raise ValueError(f"{path} holds another tree than `like`: they differ in {some(other)}")
    return jax.tree.unflatten(structure, [leaves[_stored(name)] for name in names])


def _stored(name: str) -> str:
    """A leaf's name on disk: keys joined by dots."""
    return quote(name, safe="/ ").replace(".", "%2E").replace("/", ".")


def _name(stored: str) -> str:
    """The inverse of `_stored`."""
    return unquote(stored.replace(".", "/"))


def _kernel(planes: BitPlanes, kept: Mapping[str, Any]) -> Kernel:
    return Kernel(planes=planes, layout=Layout.of_json(kept), dtype=jnp.dtype(kept["dtype"]))
