"""Tables, norms and biases trained against the dense model; planes stay as they are.

Each width has tables of its own, so they can be trained for what that width gets wrong, layer upon
layer, and no other width notices. What trains is a tree of few numbers, two to four for every group
of weights, all of them floating point; optax does the rest. For a language model:

    tuned = tune.init(model.params, tune.small(model.module.decoder))
    loss = partial(tune.divergence, model.module, model.params)
    value, gradient = jax.value_and_grad(loss)(tuned, tokens, dense_logits)

and for any other network, with planes from `mcjax.tree.shrink`:

    tuned = tune.init(planes)
    loss = lambda tuned, batch: distance(function(tune.apply(planes, tuned), batch), ...)

(The same numbers are what EfficientQAT, arXiv 2407.11062, trains end to end, one width at a time.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.divergence import divergence as logits_divergence
from mcjax.leaves import named, replaced, some
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.tree.kernel import Kernel, holds_planes

Tuned = dict[str, dict[str, Any]]


def init(params: Any, others: Collection[str] | None = None) -> Tuned:
    """What trains, as it is before.

    Args:
      params: a tree with planes, a loaded model's or what `mcjax.tree.shrink` gives.
      others: the names of arrays that train too, such as those of `small`; None for every array of
        floating-point numbers, batch statistics too if they are in the tree.

    Returns:
      `tables`, for every weight that is planes, by its name, a `{"steps", "offset"}` for its width
      or, by experts, its widths, "k", see `mcjax.tables.to_parameters`; and `others` by their
      names, float32. Of planes of several widths it is the widest, so slice them first.

    Raises:
      ValueError: if no weight is planes, one has adapters, or a name of `others` is no array's.
    """
    names, leaves, _ = named(params, holds_planes)
    held = dict(zip(names, leaves, strict=True))
    tables = {
        name: {str(k): tables_lib.to_parameters(t) for k, t in _tables(name, leaf).items()}
        for name, leaf in held.items()
        if holds_planes(leaf)
    }
    if not tables:
        raise ValueError("all weights are dense, not planes; there are no tables to tune")
    arrays = {name: leaf for name, leaf in held.items() if name not in tables}
    if others is None:
        others = [n for n, a in arrays.items() if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
    missing = sorted(set(others) - set(arrays))
    if missing:
        raise ValueError(f"{missing[0]!r} is no array: the tree has {some(arrays)}")
    return {
        "tables": tables,
        "others": {name: jnp.asarray(arrays[name], jnp.float32) for name in others},
    }


def small(decoder: Decoder) -> list[str]:
    """The names of a language model's norms, routers and biases."""
    found = ["norm"]
    for member in weights.members(decoder):
        found += [
            "/".join(member.path + role.path)
            for role in weights.roles(member.layer, decoder.width)
            if role.tap is None
        ]
    return found


def apply(params: Any, tuned: Tuned) -> Any:
    """Parameters that compute with what was tuned, every weight dense, differentiable in `tuned`.

    Weights are made anew where they are wanted again, so that no bit is kept for a gradient.

    Args:
      params: as `init` was given.
      tuned: like what it gave.

    Returns:
      A tree of arrays of the types that they had, for the same function; for a language model
      without `act_bits`, which are for planes.

    Raises:
      ValueError: if `tuned` is of another tree or of other widths.
    """
    return _each(params, tuned, _dense)


def write(params: Any, tuned: Tuned) -> Any:
    """Parameters with what was tuned in their own tables, rounded to what these can hold.

    Args:
      params: as `init` was given.
      tuned: like what it gave.

    Returns:
      A tree with the same planes, and of their tables those that were tuned; what it computes is
      what `apply` does.
    """
    return _each(params, tuned, _with_tables)


def _each(params: Any, tuned: Tuned, of_planes: Any) -> Any:
    def of_tables(name, leaf, tables):
        like = {str(k): tables_lib.to_parameters(t) for k, t in _tables(name, leaf).items()}
        if jax.tree.map(jnp.shape, like) != jax.tree.map(jnp.shape, tables):
            raise ValueError(
                f"what was tuned of {name} is for widths {', '.join(tables)} or another weight: "
                f"this one has widths {', '.join(like)}"
            )
        return of_planes(leaf, tables)

    made = replaced(params, tuned["tables"], of_tables, holds_planes)
    return replaced(
        made,
        tuned["others"],
        lambda _, leaf, value: value.astype(jnp.result_type(leaf)),
        holds_planes,
    )


def divergence(
    module: Any, params: Any, tuned: Tuned, tokens: jax.Array, target: jax.Array
) -> jax.Array:
    """Mean Kullback-Leibler divergence of the tuned model from another one, in nats a token.

    Args:
      module: the language model.
      params: as `init` was given.
      tuned: like what it gave.
      tokens: int [B, T].
      target: float [B, T, vocab], the other one's logits.
    """
    dense = module.clone(act_bits=None)
    logits = dense.apply({"params": apply(params, tuned)}, tokens)
    return logits_divergence(target, logits)


def _stacks(leaf: Any) -> Sequence[BitPlanes]:
    """The stacks of a weight that is planes, each of a width of its own."""
    if isinstance(leaf, Kernel):
        return _stacks(leaf.planes)
    if isinstance(leaf, MixedPlanes):
        return leaf.stacks
    if isinstance(leaf, BitPlanes):
        return (leaf,)
    raise ValueError("a weight has adapters: tune tables without them, or merge them")


def _tables(name: str, leaf: Any) -> dict[int, jax.Array]:
    """The table of each stack's widest width, by the width."""
    try:
        return {stack.bits: stack.tables[-1] for stack in _stacks(leaf)}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _dense(weight: Any, tables: Mapping[str, Any]) -> jax.Array:
    if isinstance(weight, Kernel):
        return weight.layout.to_weight(_dense(weight.planes, tables)).astype(weight.dtype)

    @jax.checkpoint
    def values(stack, table):
        return stack.values(*tables_lib.decode_parameters(table, stack.bits))

    made = [values(stack, tables[str(stack.bits)]) for stack in _stacks(weight)]
    if isinstance(weight, BitPlanes):
        return made[0]
    starts = jnp.asarray(np.cumsum([0] + [len(stack) for stack in made])[:-1])
    return jnp.concatenate(made)[starts[weight.stack] + weight.slot]


def _with_tables(weight: Any, tables: Mapping[str, Any]) -> Any:
    if isinstance(weight, Kernel):
        return replace(weight, planes=_with_tables(weight.planes, tables))
    stacks = []
    for stack in _stacks(weight):
        table = tables_lib.from_parameters(tables[str(stack.bits)], stack.bits)
        stacks.append(replace(stack, tables=(*stack.tables[:-1], table)))
    return replace(weight, stacks=tuple(stacks)) if isinstance(weight, MixedPlanes) else stacks[0]
