"""A tree on disk: an Orbax checkpoint of single planes and tables, of which a width reads its own.

It is the artifact of `mcjax compress`, with a manifest that says how planes lie in their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import checkpoint
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.tree.kernel import Kernel
from mcjax.tree.view import Atom, Layout

KIND = "tree"


def save(path: str | Path, tree: Mapping[str, Any], note: Any = None) -> None:
    """Writes a tree of arrays and planes as an artifact, whole or not at all.

    Args:
      path: must not exist.
      tree: nested dicts of arrays, `Kernel`s and `BitPlanes`; keys are strings without dots.
      note: JSON-ready, kept in the manifest.

    Raises:
      ValueError: if `path` exists, its folder does not, or a key holds a dot.
      OSError: if it cannot be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another place")
    geometry, held = {}, jax.tree.map(_planes_of, tree, is_leaf=_is_planes)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_planes):
        if not all(isinstance(getattr(key, "key", None), str) for key in keys):
            raise ValueError(
                f"only nested dicts with string keys can be saved, got {jax.tree_util.keystr(keys)}"
            )
        names = [key.key for key in keys]
        dotted = [name for name in names if "." in name]
        if dotted:
            raise ValueError(f"keys must not hold dots, got {dotted[0]!r}")
        if _is_planes(leaf):
            planes = _planes_of(leaf)
            geometry[".".join(names)] = {
                "d_in": planes.d_in,
                "group_size": planes.group_size,
                "widths": list(planes.widths),
                "rotated": planes.rotated,
            }
        if isinstance(leaf, Kernel):
            layout = dataclasses.asdict(leaf.layout) | {"dtype": np.dtype(leaf.dtype).name}
            geometry[".".join(names)]["layout"] = layout
    with whole(path) as aside:
        aside.mkdir()
        sums = checkpoint.save_tree(aside / KIND, held, ())
        manifest = {"kind": KIND, "geometry": geometry, "checksums": {KIND: sums}, "note": note}
        checkpoint.write_manifest(aside, manifest)


def load(path: str | Path, bits: int | None = None) -> dict[str, Any]:
    """Reads an artifact that `save` wrote.

    Args:
      path: the artifact.
      bits: the width to serve every weight at, reading only its planes and table; None for all.

    Returns:
      The tree.

    Raises:
      ValueError: if it is damaged or of another kind, or a weight has no such width.
    """
    reader = checkpoint.ArtifactReader(path, KIND)
    geometry = reader.manifest["geometry"]
    names = list(reader.manifest["checksums"][KIND])
    dense = [n for n in names if n.rsplit(".", 1)[0] not in geometry]
    values = reader.read((KIND, name, None) for name in dense)
    flat: dict[str, Any] = {n: jnp.asarray(v) for n, v in zip(dense, values, strict=True)}
    for name, shape in geometry.items():
        widths = tuple(shape["widths"])
        if bits is not None and bits not in widths:
            raise ValueError(f"bits {bits} is not one of {name}'s widths {widths}")
        chosen = widths if bits is None else (bits,)
        planes = checkpoint.read_planes(
            reader, KIND, name, chosen, shape["d_in"], shape["group_size"], shape["rotated"]
        )
        flat[name] = _kernel(planes, shape["layout"]) if "layout" in shape else planes
    return checkpoint.unflatten(flat)


def _kernel(planes: BitPlanes, kept: Mapping[str, Any]) -> Kernel:
    atoms = {
        name: tuple(Atom(*pair) for pair in kept[name]) for name in ("batch", "inside", "outside")
    }
    layout = Layout(shape=tuple(kept["shape"]), **atoms)
    return Kernel(planes=planes, layout=layout, dtype=jnp.dtype(kept["dtype"]))


def _planes_of(leaf: Any) -> Any:
    return leaf.planes if isinstance(leaf, Kernel) else leaf


def _is_planes(leaf: Any) -> bool:
    return isinstance(leaf, BitPlanes | Kernel)
