"""Any parameter tree as bit planes: quantise by path rules, freeze what once-QAT trained, save.

A kernel [..., d_out] becomes planes of logical shape [d_in, d_out], all axes between batch axes and
the last being input features. The artifact is the one of `mcjax compress`: an Orbax checkpoint of
single planes and tables, of which `load` reads those that a width needs, and a manifest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import checkpoint, qat
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.quantize import quantize

KIND = "tree"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the leaves whose path matches.

    Attributes:
      pattern: regular expression, searched in the path, "layer_0/dense/kernel" for instance.
      bits: number of planes, or None to leave the leaf as it is.
      widths: widths that get a table, ascending to `bits`; None for all.
      group_size: as in `mcjax.quantize`.
      batch_axes: leading axes that are independent matrices, as experts are.
    """

    pattern: str
    bits: int | None = 4
    widths: tuple[int, ...] | None = None
    group_size: int | None = None
    batch_axes: int = 0


KERNELS = (Rule(pattern=r"(^|/)kernel$"),)
"""Every leaf named `kernel`, at up to 4 bits: Flax's dense and convolution layers."""


class Leaf(NamedTuple):
    """What became of one leaf.

    Attributes:
      path: names joined by "/".
      shape: of the original array.
      bits: planes, or None where it was left.
      effective_bits: stored bits a weight.
      why: the reason where it was left.
    """

    path: str
    shape: tuple[int, ...]
    bits: int | None
    effective_bits: float
    why: str = ""


class Report(NamedTuple):
    """What was and was not quantised.

    Attributes:
      leaves: one `Leaf` each.
    """

    leaves: tuple[Leaf, ...]

    @property
    def coverage(self) -> float:
        """Share of all numbers in the tree that are planes now."""
        total = sum(math.prod(leaf.shape) for leaf in self.leaves)
        return sum(math.prod(x.shape) for x in self.leaves if x.bits is not None) / total

    @property
    def effective_bits(self) -> float:
        """Stored bits a number, over the whole tree."""
        total = sum(math.prod(leaf.shape) for leaf in self.leaves)
        return sum(math.prod(x.shape) * x.effective_bits for x in self.leaves) / total

    def __str__(self) -> str:
        lines = [
            f"{leaf.path} {leaf.shape}: "
            + (f"{leaf.bits} planes" if leaf.bits is not None else f"left, {leaf.why}")
            for leaf in self.leaves
        ]
        return "\n".join([*lines, f"{100 * self.coverage:.1f} % of all weights are planes"])


def quantize_tree(
    params: Mapping[str, Any],
    rules: Sequence[Rule] = KERNELS,
    grams: Mapping[str, jax.Array] | None = None,
) -> tuple[dict[str, Any], Report]:
    """Quantises the weights of a parameter tree.

    Args:
      params: nested dicts of arrays, as Flax makes them.
      rules: the first whose pattern matches a path decides; leaves that no rule matches stay.
      grams: for some paths the Gram matrix [..., d_in, d_in] of the layer's inputs, see
        `mcjax.quantize`.

    Returns:
      The tree with `BitPlanes` in place of the chosen leaves, and a report of every leaf.

    Raises:
      ValueError: if a rule matches nothing, a matched leaf is not a weight, or a Gram matrix is of
        an unknown path or another shape.
    """
    grams = dict(grams or {})
    used, leaves = set(), []

    def visit(path, node):
        if isinstance(node, Mapping):
            return {key: visit((*path, key), child) for key, child in node.items()}
        name = "/".join(path)
        matches = [i for i, rule in enumerate(rules) if re.search(rule.pattern, name)]
        used.update(matches[:1])
        rule = rules[matches[0]] if matches else None
        if rule is None or rule.bits is None:
            why = "no rule matches" if rule is None else f"rule {rule.pattern!r}"
            size = 8 * np.dtype(node.dtype).itemsize
            leaves.append(Leaf(name, tuple(node.shape), None, size, why))
            return node
        if node.ndim - rule.batch_axes < 2:
            raise ValueError(
                f"rule {rule.pattern!r} matches {name}, whose shape {node.shape} with "
                f"{rule.batch_axes} batch axes is not a weight"
            )
        matrix = _as_matrix(node, rule.batch_axes)
        try:
            planes = quantize(
                matrix, rule.bits, rule.group_size, grams.pop(name, None), widths=rule.widths
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        leaves.append(Leaf(name, tuple(node.shape), rule.bits, planes.effective_bits))
        return planes

    tree = visit((), params)
    if grams:
        raise ValueError(f"grams name {sorted(grams)}, which no rule quantises")
    idle = [rule.pattern for i, rule in enumerate(rules) if i not in used]
    if idle:
        some = ", ".join(leaf.path for leaf in leaves[:4])
        raise ValueError(f"rules {idle} match no leaf; there are {some}, ...")
    return tree, Report(tuple(leaves))


def freeze_tree(params: Mapping[str, Any], spec: qat.QuantSpec) -> dict[str, Any]:
    """What once-QAT trained, as planes: for layers whose spec is `frozen`.

    Args:
      params: of modules made of `mcjax.models.layers` with this spec.
      spec: the one they were trained with.

    Returns:
      The tree with each `kernel` as `BitPlanes` of all widths and without its `quantizer`.
    """
    tree = {}
    for key, node in params.items():
        if not isinstance(node, Mapping):
            tree[key] = node
        elif "quantizer" in node and "kernel" in node:
            rest = {k: v for k, v in node.items() if k not in ("quantizer", "kernel")}
            matrix = _as_matrix(node["kernel"], 0)
            tree[key] = {**rest, "kernel": qat.freeze(matrix, node["quantizer"], spec)}
        else:
            tree[key] = freeze_tree(node, spec)
    return tree


def slice_tree(tree: Any, bits: int) -> Any:
    """Every `BitPlanes` of a tree at one width."""
    return jax.tree.map(
        lambda leaf: leaf.slice(bits) if _is_planes(leaf) else leaf, tree, is_leaf=_is_planes
    )


def dequantize_tree(tree: Any, like: Any) -> Any:
    """Planes back to arrays.

    Args:
      tree: from `quantize_tree`, sliced or not.
      like: the original tree, or its shapes, whose shapes and dtypes the arrays get.
    """

    def one(leaf, old):
        return leaf.dequantize(old.dtype).reshape(old.shape) if _is_planes(leaf) else leaf

    return jax.tree.map(one, tree, like, is_leaf=_is_planes)


def save(path: str | Path, tree: Mapping[str, Any], note: Any = None) -> None:
    """Writes a tree of arrays and planes as an artifact, whole or not at all.

    Args:
      path: must not exist.
      tree: nested dicts; keys without dots.
      note: JSON-ready, kept in the manifest.

    Raises:
      ValueError: if `path` exists, its folder does not, or a key holds a dot.
      OSError: if it cannot be written.
    """
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another place")
    geometry = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_planes):
        names = [str(key.key) for key in keys]
        dotted = [name for name in names if "." in name]
        if dotted:
            raise ValueError(f"keys must not hold dots, got {dotted[0]!r}")
        if _is_planes(leaf):
            geometry[".".join(names)] = {
                "d_in": leaf.d_in,
                "group_size": leaf.group_size,
                "widths": list(leaf.widths),
                "rotated": leaf.rotated,
            }
    with whole(path) as aside:
        aside.mkdir()
        sums = checkpoint.save_tree(aside / KIND, tree, ())
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
        flat[name] = checkpoint.read_planes(
            reader, KIND, name, chosen, shape["d_in"], shape["group_size"], shape["rotated"]
        )
    return checkpoint.unflatten(flat)


def _as_matrix(kernel: jax.Array, batch_axes: int) -> jax.Array:
    batch = kernel.shape[:batch_axes]
    return jnp.asarray(kernel).reshape(*batch, -1, kernel.shape[-1])


def _is_planes(leaf: Any) -> bool:
    return isinstance(leaf, BitPlanes)
