"""Low-rank adapters of weights that stay as they are (LoRA, arXiv 2106.09685).

A weight W, planes of any width or an array, becomes ``W + A B`` with A [..., d_in, rank] and B
[..., rank, d_out], of which there is one pair for every matrix of a stack: every layer, every
expert. A and B are all that trains, with optax or anything else that takes a tree:

    adapters = lora.init(key, model.params, rank=8)

    def loss(adapters, tokens):
        logits = model.module.apply({"params": lora.apply(model.params, adapters)}, tokens)
        ...

Adapters belong to names of weights and not to a width: those of one fit every other, and the
weights that the planes were made of.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.leaves import named
from mcjax.ops import Adapted
from mcjax.tree.kernel import Kernel
from mcjax.tree.view import Layout
from mcjax.tree.watched import Watched


@partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["layout"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Adapter:
    """The factors of one weight.

    Attributes:
      a: float [*batch, d_in, rank].
      b: float [*batch, rank, d_out].
      layout: where the matrices [*batch, d_in, d_out] lie in a weight of another shape; None if
        that is its shape.
    """

    a: jax.Array
    b: jax.Array
    layout: Layout | None = None

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape [*batch, d_in, d_out]."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    def __repr__(self) -> str:
        return f"Adapter(matrices={self.matrices}, rank={self.a.shape[-1]})"


Adapters = dict[str, Adapter]
"""By the names of weights, such as "segment_0/layer_0/mixer/o"."""


def init(
    key: jax.Array,
    params: Any,
    *,
    rank: int = 8,
    pattern: str = "",
    watched: Mapping[str, Watched] | None = None,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Adapters that change nothing yet: A is drawn, with variance 1 / d_in, and B is zero.

    Args:
      key: for A.
      params: a tree with planes: a loaded model's, or what `mcjax.tree.shrink` gives.
      rank: of the change of every matrix.
      pattern: regular expression, searched in names; only weights that match have adapters.
      watched: from `mcjax.tree.watch`, for arrays that something multiplies to have adapters too.
      dtype: of the factors.

    Raises:
      ValueError: if the rank is less than 1, or no weight that matches can have an adapter.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    names, leaves, _ = named(params, _is_weight)
    found: Adapters = {}
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if not re.search(pattern, name):
            continue
        shape, layout = _matrices(leaf, None if watched is None else watched.get(name))
        if shape is None:
            continue
        *batch, d_in, d_out = shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (*batch, d_in, rank), dtype)
        b = jnp.zeros((*batch, rank, d_out), dtype)
        found[name] = Adapter(a=draw * d_in**-0.5, b=b, layout=layout)
    if not found:
        raise ValueError(
            f"no weight matching {pattern!r} is planes"
            + ("" if watched is None else " or was seen to be multiplied")
            + f"; there are {', '.join(names[:4])}, ..."
        )
    return found


def _matrices(leaf: Any, seen: Watched | None) -> tuple[tuple[int, ...] | None, Layout | None]:
    """What has factors of its own in a weight, and where it lies; None if nothing has."""
    if isinstance(leaf, Kernel):
        return leaf.planes.shape, leaf.layout
    if isinstance(leaf, BitPlanes | MixedPlanes):
        return leaf.shape, None
    if seen is None or seen.layout is None or seen.uses:
        return None, None
    return seen.layout.matrices, seen.layout


def apply(params: Any, adapters: Adapters) -> Any:
    """The tree with its adapters, for whatever computes with the tree: differentiable in them.

    Planes are multiplied as they are and the factors apart, see `mcjax.ops.Adapted`. An array is
    too if it is one of a language model's; one of another network has their product added.

    Args:
      params: a tree that has the weights that the adapters are named for, at any width.
      adapters: like what `init` gave.

    Raises:
      ValueError: if a weight is missing or of another shape.
    """

    def of_one(leaf, adapter):
        if isinstance(leaf, Kernel):
            return replace(leaf, planes=_adapted(leaf.planes, adapter))
        if adapter.layout is not None:
            return _changed(leaf, adapter)
        return _adapted(leaf, adapter)

    return _each(params, adapters, of_one)


def merge(params: Any, adapters: Adapters) -> Any:
    """The tree with every adapted weight as one array, ``W + A B``.

    Args:
      params: as in `apply`.
      adapters: as in `apply`.

    Returns:
      A tree of which these weights are arrays of their own shape and dtype, float32 if they were
      planes of a language model; what it computes is what `apply` does, to rounding.

    Raises:
      ValueError: if a weight is missing or of another shape.
    """

    def of_one(leaf, adapter):
        if adapter.layout is not None:
            dense = leaf.dequantize() if isinstance(leaf, Kernel) else leaf
            return _changed(dense, adapter)
        kept = jnp.float32 if isinstance(leaf, BitPlanes | MixedPlanes) else leaf.dtype
        return _adapted(leaf, adapter).dequantize(kept)

    return _each(params, adapters, of_one)


def _each(params: Any, adapters: Adapters, function: Any) -> Any:
    names, leaves, structure = named(params, _is_weight)
    missing = sorted(set(adapters) - set(names))
    if missing:
        raise ValueError(
            f"there is no weight {missing[0]!r}; there are {', '.join(names[:4])}, ..."
        )
    made = list(leaves)
    for n, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if name not in adapters:
            continue
        adapter = adapters[name]
        wanted = adapter.matrices if adapter.layout is None else adapter.layout.shape
        other = isinstance(leaf, Kernel) and leaf.layout != adapter.layout
        if tuple(leaf.shape) != wanted or other:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)}, its adapter is for {wanted}: it was made "
                "for another network"
            )
        made[n] = function(leaf, adapter)
    return jax.tree.unflatten(structure, made)


def _adapted(weight: Any, adapter: Adapter) -> Adapted:
    return Adapted(weight=weight, a=adapter.a, b=adapter.b)


def _changed(weight: jax.Array, adapter: Adapter) -> jax.Array:
    """An array of another shape, its matrices changed."""
    change = jnp.matmul(adapter.a, adapter.b, precision="highest")
    layout = adapter.layout
    moved = change if layout is None else layout.to_weight(change)
    return (weight + moved).astype(weight.dtype)


def save(path: str | Path, adapters: Adapters) -> None:
    """Writes adapters as one .safetensors file, whole or not at all; a file there is replaced.

    Raises:
      ValueError: if the folder that it is to be in is missing.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"{name}.{factor}": np.asarray(getattr(adapter, factor))
        for name, adapter in adapters.items()
        for factor in ("a", "b")
    }
    layouts = {
        name: dataclasses.asdict(adapter.layout)
        for name, adapter in adapters.items()
        if adapter.layout is not None
    }
    with whole(path) as aside:
        save_file(tensors, aside, metadata={"mcjax_layouts": json.dumps(layouts)})


def load(path: str | Path) -> Adapters:
    """Reads what `save` wrote.

    Raises:
      ValueError: if it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            kept = (file.metadata() or {}).get("mcjax_layouts")
            tensors = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file, or damaged: {error}") from None
    if kept is None:
        raise ValueError(f"{path} holds no adapters of mcjax")
    layouts = {name: Layout.of_json(layout) for name, layout in json.loads(kept).items()}
    names = dict.fromkeys(name.rsplit(".", 1)[0] for name in tensors)
    return {
        name: Adapter(a=tensors[f"{name}.a"], b=tensors[f"{name}.b"], layout=layouts.get(name))
        for name in names
    }


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, BitPlanes | MixedPlanes | Kernel)
