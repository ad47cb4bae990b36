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

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.divergence import divergence as logits_divergence
from mcjax.leaves import named
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.tree.kernel import Kernel

Tuned = dict[str, dict[str, Any]]


def init(params: Any, others: Collection[str] | None = None) -> Tuned:
    """What trains, as it is before.

    Args:
      params: a tree with planes, a loaded model's or what `mcjax.tree.shrink` gives.
      others: the names of arrays that train too, such as those of `small`; None for every array of
        floating-point numbers.

    Returns:
      `tables`, for every weight that is planes, by its name, one `{"steps", "offset"}` for each of
      its stacks, see `mcjax.tables.to_parameters`, of its widest width; and `others` by their
      names, float32.

    Raises:
      ValueError: if no weight is planes, or a name of `others` is no array's.
    """
    names, leaves, _ = named(params, _is_planes)
    held = dict(zip(names, leaves, strict=True))
    tables = {
        name: [tables_lib.to_parameters(s.tables[-1], s.bits) for s in _stacks(leaf)]
        for name, leaf in held.items()
        if _is_planes(leaf)
    }
    if not tables:
        raise ValueError("all weights are dense, not planes; there are no tables to tune")
    arrays = {name: leaf for name, leaf in held.items() if name not in tables}
    if others is None:
        others = [n for n, a in arrays.items() if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
    missing = sorted(set(others) - set(arrays))
    if missing:
        raise ValueError(
            f"{missing[0]!r} is no array; there are {', '.join(list(arrays)[:4])}, ..."
        )
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
      A tree of arrays for the same function, for a language model without `act_bits`, which are for
      planes.
    """
    return _each(params, tuned, _dense, lambda leaf, value: value)


def write(params: Any, tuned: Tuned) -> Any:
    """Parameters with what was tuned in their own tables, rounded to what these can hold.

    Args:
      params: as `init` was given.
      tuned: like what it gave.

    Returns:
      A tree with the same planes, and of their tables those that were tuned; what it computes is
      what `apply` does.
    """
    return _each(params, tuned, _with_tables, lambda leaf, value: value.astype(leaf.dtype))


def _each(params: Any, tuned: Tuned, of_planes: Any, of_others: Any) -> Any:
    names, leaves, structure = named(params, _is_planes)

    def one(name, leaf):
        if name in tuned["tables"]:
            return of_planes(leaf, tuned["tables"][name])
        return of_others(leaf, tuned["others"][name]) if name in tuned["others"] else leaf

    return jax.tree.unflatten(structure, [one(*pair) for pair in zip(names, leaves, strict=True)])


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


def _is_planes(leaf: Any) -> bool:
    return isinstance(leaf, BitPlanes | MixedPlanes | Kernel)


def _stacks(weight: Any) -> Sequence[BitPlanes]:
    if isinstance(weight, Kernel):
        return _stacks(weight.planes)
    return weight.stacks if isinstance(weight, MixedPlanes) else (weight,)


def _dense(weight: Any, tables: Sequence[Any]) -> jax.Array:
    if isinstance(weight, Kernel):
        return weight.layout.to_weight(_dense(weight.planes, tables)).astype(weight.dtype)

    @jax.checkpoint
    def values(stack, table):
        return stack.values(*tables_lib.decode_parameters(table, stack.bits))

    made = [values(s, t) for s, t in zip(_stacks(weight), tables, strict=True)]
    if isinstance(weight, BitPlanes):
        return made[0]
    starts = jnp.asarray(np.cumsum([0] + [len(stack) for stack in made])[:-1])
    return jnp.concatenate(made)[starts[weight.stack] + weight.slot]


def _with_tables(weight: Any, tables: Sequence[Any]) -> Any:
    if isinstance(weight, Kernel):
        return replace(weight, planes=_with_tables(weight.planes, tables))
    stacks = [
        replace(stack, tables=(*stack.tables[:-1], tables_lib.from_parameters(table, stack.bits)))
        for stack, table in zip(_stacks(weight), tables, strict=True)
    ]
    return replace(weight, stacks=tuple(stacks)) if isinstance(weight, MixedPlanes) else stacks[0]
