"""Training any network once for every width: the weights that it multiplies train as codes.

What is trained is a tree like the network's own and, beside it, quantisers: a table for each width
of each weight, see `mcjax.qat`. The network itself is not touched; it is given other weights:

    quantizers = tree.once.init(params, watched, qat.QuantSpec(widths=(8, 4, 2), act_bits=None))

    def loss(params, quantizers, batch, bits):
        return ...function(tree.once.apply(params, quantizers, bits), batch)...

    planes = tree.once.freeze(params, quantizers)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from mcjax import qat
from mcjax.leaves import named, replaced, some
from mcjax.ops import Adapted
from mcjax.tree.kernel import Kernel, is_kernel
from mcjax.tree.view import Layout
from mcjax.tree.watched import Watched, check_tree


@partial(jax.tree_util.register_dataclass, data_fields=["tables"], meta_fields=["layout", "spec"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Quantizer:
    """What makes codes of one weight.

    Attributes:
      tables: for each width, "k", what trains, see `mcjax.qat.init_quantizer`.
      layout: the weight as matrices.
      spec: its widths and groups.
    """

    tables: dict[str, dict[str, jax.Array]]
    layout: Layout
    spec: qat.QuantSpec


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
      ValueError: if `watched` is of another tree, the spec rounds activations, its groups do not
        fit a weight, or no weight that matches can be planes.
    """
    if spec.act_bits is not None:
        raise ValueError(f"act_bits must be None here, where weights alone train, got {spec}")
    names, leaves, _ = named(params)
    check_tree(watched, names)
    found = {}
    for name, leaf in zip(names, leaves, strict=True):
        seen = watched[name]
        if not re.search(pattern, name) or seen.refusal(leaf) is not None:
            continue
        try:
            tables = qat.init_quantizer(seen.found.to_matrices(leaf), spec)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        found[name] = Quantizer(tables=tables, layout=seen.found, spec=spec)
    if not found:
        raise ValueError(
            f"no weight matching {pattern!r} can be planes: the tree has {some(names)}"
        )
    return found


def of_planes(planes: Any) -> Quantizers:
    """Quantisers that begin with the tables of planes, those of `mcjax.tree.shrink` for instance.

    The weights to train may be those that the planes were made of, or what these stand for. Planes
    of single widths have no other tables to train.

    Raises:
      ValueError: if no weight is planes, or one has adapters.
    """
    names, leaves, _ = named(planes, is_kernel)
    found = {}
    for name, leaf in zip(names, leaves, strict=True):
        if is_kernel(leaf):
            if isinstance(leaf.planes, Adapted):
                raise ValueError(f"{name} has adapters: take the tree without, or merge them")
            spec = qat.QuantSpec(
                widths=tuple(reversed(leaf.widths)),
                group_size=leaf.planes.group_size,
                act_bits=None,
                rotated=leaf.planes.rotated,
            )
            tables = qat.from_planes(leaf.planes)
            found[name] = Quantizer(tables=tables, layout=leaf.layout, spec=spec)
    if not found:
        raise ValueError(f"no weight is planes: the tree has {some(names)}")
    return found


def apply(params: Any, quantizers: Quantizers, bits: int) -> Any:
    """The network's weights as they will be served at a width, with gradients to both trees.

    Args:
      params: a tree of arrays.
      quantizers: from `init`.
      bits: one of their widths.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if `bits` is not one of the widths, or quantisers are of other weights.
    """

    def one(_, leaf, own):
        matrices = own.layout.to_matrices(leaf)
        return own.layout.to_weight(qat.fake_quant(matrices, own.tables, own.spec, bits))

    return replaced(params, quantizers, one)


def freeze(params: Any, quantizers: Quantizers) -> Any:
    """What was trained, as planes of all widths: a tree for `mcjax.tree.serving`.

    Args:
      params: a tree of arrays.
      quantizers: from `init`.
    """

    def one(_, leaf, own):
        planes = qat.freeze(own.layout.to_matrices(leaf), own.tables, own.spec)
        return Kernel(planes=planes, layout=own.layout, dtype=np.dtype(leaf.dtype))

    return replaced(params, quantizers, one)


def labels(params: Any, quantizers: Quantizers) -> tuple[Any, Quantizers]:
    """Of both trees what each array is: "weight", "other" or "table", for `optax.multi_transform`.

    Tables want a learning rate of their own, and weight decay is for weights alone.
    """
    plain = jax.tree.map(lambda _: "other", params)
    of_weights = replaced(plain, quantizers, lambda *_: "weight")
    return of_weights, jax.tree.map(lambda _: "table", quantizers)
