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
from mcjax.leaves import named, replaced, some
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.ops import Adapted
from mcjax.tree.kernel import Kernel, holds_planes
from mcjax.tree.view import Layout
from mcjax.tree.watched import Watched, check_tree


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
"""By the names of weights, such as "encoder/layer_0/kernel"."""


def init(
    key: jax.Array,
    params: Any,
    *,
    rank: int = 8,
    pattern: str = "",
    watched: Mapping[str, Watched] | None = None,
    decoder: Decoder | None = None,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Adapters that change nothing yet: A is drawn, with variance 1 / d_in, and B is zero.

    Weights that are planes have adapters: a loaded model's, or those that `mcjax.tree.shrink` made.
    Of arrays one must know which are multiplied, and how.

    Args:
      key: for A.
      params: a tree.
      rank: of the change of every matrix.
      pattern: regular expression, searched in names; only weights that match have adapters.
      watched: from `mcjax.tree.watch`, of what multiplies arrays.
      decoder: of a language model, for those of its weights that are arrays.
      dtype: of the factors.

    Raises:
      ValueError: if the rank is less than 1, `watched` is of another tree, a weight has adapters
        already, or no weight that matches can have one.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    names, leaves, _ = named(params, holds_planes)
    if watched is not None:
        check_tree(watched, names)
    multiplied = set() if decoder is None else _multiplied(decoder)
    found: Adapters = {}
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if not re.search(pattern, name):
            continue
        _refuse_adapted(name, leaf)
        if isinstance(leaf, Kernel):
            shape, layout = leaf.planes.shape, leaf.layout
        elif holds_planes(leaf) or name in multiplied:
            shape, layout = leaf.shape, None
        elif watched is not None and watched[name].refusal(leaf) is None:
            layout = watched[name].found
            shape = layout.matrices
        else:
            continue
        *batch, d_in, d_out = shape
        draw = jax.random.normal(jax.random.fold_in(key, number), (*batch, d_in, rank), dtype)
        b = jnp.zeros((*batch, rank, d_out), dtype)
        found[name] = Adapter(a=draw * d_in**-0.5, b=b, layout=layout)
    if not found:
        also = " or multiplied" if watched is not None or decoder is not None else ""
        raise ValueError(
            f"no weight matching {pattern!r} is planes{also}: the tree has {some(names)}"
        )
    return found


def _multiplied(decoder: Decoder) -> set[str]:
    """The names of a language model's weights that planes can take."""
    return {
        "/".join(member.path + role.path)
        for member in weights.members(decoder)
        for role in weights.roles(member.layer, decoder.width)
        if role.tap is not None
    }


def apply(params: Any, adapters: Adapters) -> Any:
    """The tree with its adapters, for whatever computes with the tree: differentiable in them.

    Planes are multiplied as they are and the factors apart, see `mcjax.ops.Adapted`. An array is
    too if it is one of a language model's; one of another network has their product added.

    Args:
      params: a tree that has the weights that the adapters are named for, at any width.
      adapters: like what `init` gave.

    Raises:
      ValueError: if a weight is missing, of another shape, or has adapters already.
    """

    def of_one(leaf, adapter):
        if isinstance(leaf, Kernel):
            return replace(leaf, planes=_adapted(leaf.planes, adapter))
        if adapter.layout is not None:
            return _changed(leaf, adapter, adapter.layout)
        return _adapted(leaf, adapter)

    return _each(params, adapters, of_one)


def merge(params: Any, adapters: Adapters) -> Any:
    """The tree with every adapted weight as one array, ``W + A B``.

    Args:
      params: as in `apply`.
      adapters: as in `apply`.

    Returns:
      A tree of which these weights are arrays of their own shape and dtype, float32 if they were
      planes of a language model; what it computes is what `apply` does, to rounding. A language
      model computes with it without `act_bits`, which are for planes.

    Raises:
      ValueError: as in `apply`.
    """

    def of_one(leaf, adapter):
        if adapter.layout is not None:
            dense = leaf.dequantize() if isinstance(leaf, Kernel) else leaf
            return _changed(dense, adapter, adapter.layout)
        kept = jnp.float32 if holds_planes(leaf) else leaf.dtype
        return _adapted(leaf, adapter).dequantize(kept)

    return _each(params, adapters, of_one)


def _each(params: Any, adapters: Adapters, function: Any) -> Any:
    def one(name, leaf, adapter):
        _refuse_adapted(name, leaf)
        wanted = adapter.matrices if adapter.layout is None else adapter.layout.shape
        if tuple(leaf.shape) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)}, its adapter is for {wanted}: it was made "
                "for another network"
            )
        array = not holds_planes(leaf)
        layout = adapter.layout if array else getattr(leaf, "layout", None)
        if layout != adapter.layout:
            raise ValueError(
                f"{name} is multiplied as {layout}, its adapter is for {adapter.layout}: it was "
                "made for another network"
            )
        return function(leaf, adapter)

    return replaced(params, adapters, one, holds_planes)


def _refuse_adapted(name: str, leaf: Any) -> None:
    if isinstance(leaf, Adapted) or isinstance(getattr(leaf, "planes", None), Adapted):
        raise ValueError(f"{name} has adapters already: merge them, or take the tree without")


def _adapted(weight: Any, adapter: Adapter) -> Adapted:
    return Adapted(weight=weight, a=adapter.a, b=adapter.b)


def _changed(weight: jax.Array, adapter: Adapter, layout: Layout) -> jax.Array:
    """An array in which matrices lie that the factors change."""
    a, b = (factor.astype(jnp.float32) for factor in (adapter.a, adapter.b))
    change = layout.to_weight(jnp.matmul(a, b, precision="highest"))
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)


def save(path: str | Path, adapters: Adapters) -> None:
    """Writes adapters as one .safetensors file, whole or not at all; a file there is replaced.

    Raises:
      ValueError: if the folder that it is to be in is missing.
    """
    from safetensors.numpy import save_file

    tensors = {
        f"{name}.{factor}": np.ascontiguousarray(getattr(adapter, factor))
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
