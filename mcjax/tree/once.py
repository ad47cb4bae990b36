"""Training any network once for every width: the weights that it multiplies train as codes.

What is trained is a tree like the network's own and, beside it, quantisers: a table for each width
of each weight, see `mcjax.qat`. The network itself is not touched; it is given other weights:

    spec = qat.QuantSpec(widths=(8, 4, 2), act_bits=None)
    quantizers = tree.once.init(params, watched, spec)

    def loss(params, quantizers, batch, bits):
        return ...function(tree.once.apply(params, quantizers, spec, bits), batch)...

    planes = tree.once.freeze(params, quantizers, spec)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mcjax import qat
from mcjax.leaves import named
from mcjax.tree.kernel import Kernel, is_kernel
from mcjax.tree.view import Layout
from mcjax.tree.watched import Watched


@partial(jax.tree_util.register_dataclass, data_fields=["tables"], meta_fields=["layout"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Quantizer:
    """What makes codes of one weight.

    Attributes:
      tables: for each width, "k", what trains, see `mcjax.qat.init_quantizer`.
      layout: the weight as matrices.
    """

    tables: dict[str, dict[str, jax.Array]]
    layout: Layout


Quantizers = dict[str, Quantizer]
"""By the names of weights."""


def init(
    params: Any, watched: Mapping[str, Watched], spec: qat.QuantSpec, pattern: str = ""
) -> Quantizers:
    """Quantisers of weights that something multiplies, with tables that suit their spread.

    Args:
      params: a tree of arrays.
      watched: from `mcjax.tree.watch`.
      spec: widths and groups; its `act_bits` must be None, since activations stay as they are.
      pattern: regular expression, searched in names; other weights train as they are.

    Raises:
      ValueError: if `watched` is of another tree, the spec rounds activations, or no weight that
        matches is multiplied.
    """
    if spec.act_bits is not None:
        raise ValueError(f"act_bits must be None here, where weights alone train, got {spec}")
    names, leaves, _ = named(params)
    if list(watched) != names:
        other = sorted(set(watched) ^ set(names))[:4]
        raise ValueError(f"what was watched is another tree: they differ in {other}")
    found = {}
    for name, leaf in zip(names, leaves, strict=True):
        layout, uses = watched[name].layout, watched[name].uses
        if layout is None or uses or not re.search(pattern, name):
            continue
        tables = qat.init_quantizer(layout.to_matrices(leaf), spec)
        found[name] = Quantizer(tables=tables, layout=layout)
    if not found:
        raise ValueError(f"no weight matching {pattern!r} was seen to be multiplied")
    return found


def of_planes(planes: Any) -> Quantizers:
    """Quantisers that begin with the tables of planes, those of `mcjax.tree.shrink` for instance.

    For a spec of the same widths, groups and rotation; the weights may be those that the planes
    were made of, or what they stand for.
    """
    names, leaves, _ = named(planes, is_kernel)
    return {
        name: Quantizer(tables=qat.from_planes(leaf.planes), layout=leaf.layout)
        for name, leaf in zip(names, leaves, strict=True)
        if is_kernel(leaf)
    }


def apply(params: Any, quantizers: Quantizers, spec: qat.QuantSpec, bits: int) -> Any:
    """The network's weights as they will be served at a width, with gradients to both trees.

    Args:
      params: a tree of arrays.
      quantizers: from `init`.
      spec: as given there.
      bits: one of its widths.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if `bits` is not one of the widths, or quantisers are of other weights.
    """

    def one(leaf, quantizer):
        matrices = quantizer.layout.to_matrices(leaf)
        return quantizer.layout.to_weight(qat.fake_quant(matrices, quantizer.tables, spec, bits))

    return _each(params, quantizers, one)


def freeze(params: Any, quantizers: Quantizers, spec: qat.QuantSpec) -> Any:
    """What was trained, as planes of all widths: a tree for `mcjax.tree.serving`.

    Args:
      params: a tree of arrays.
      quantizers: from `init`.
      spec: as given there.
    """

    def one(leaf, quantizer):
        planes = qat.freeze(quantizer.layout.to_matrices(leaf), quantizer.tables, spec)
        return Kernel(planes=planes, layout=quantizer.layout, dtype=np.dtype(leaf.dtype))

    return _each(params, quantizers, one)


def _each(params: Any, quantizers: Quantizers, function: Callable[[Any, Quantizer], Any]) -> Any:
    names, leaves, structure = named(params)
    missing = sorted(set(quantizers) - set(names))
    if missing:
        raise ValueError(f"quantisers are of other weights: there is no {missing[0]!r}")
    made = [
        function(leaf, quantizers[name]) if name in quantizers else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, made)
