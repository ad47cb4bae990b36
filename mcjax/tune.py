"""Tables, norms and routers trained against the dense model; planes stay as they are.

Each width has tables of its own, so they can be trained for what that width gets wrong, layer upon
layer, and no other width notices. What trains is a tree of few numbers, two to four for every group
of weights; optax does the rest:

    tuned = tune.init(model.module.decoder, model.params)
    loss = partial(tune.divergence, model.module, model.params)
    value, gradient = jax.value_and_grad(loss)(tuned, tokens, dense_logits)

(The same numbers are what EfficientQAT, arXiv 2407.11062, trains end to end, one width at a time.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tables as tables_lib
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models import weights
from mcjax.models.decoder import Decoder

Tuned = dict[str, dict[str, Any]]


def init(decoder: Decoder, params: Any) -> Tuned:
    """What trains, as it is before.

    Args:
      decoder: the model's description.
      params: a loaded model's, with planes.

    Returns:
      `tables`, for every weight that is planes, by its dotted path, one `{"steps", "offset"}` for
      each of its stacks, see `mcjax.tables.to_parameters`; and `others`, norms, routers and biases
      by theirs, float32.

    Raises:
      ValueError: if no weight is planes.
    """
    tables, others = {}, {}
    for name, weight in _leaves(params):
        if isinstance(weight, BitPlanes | MixedPlanes):
            tables[name] = [
                tables_lib.to_parameters(stack.tables[-1], stack.bits) for stack in _stacks(weight)
            ]
    if not tables:
        raise ValueError("the model has dense weights, not planes; there are no tables to tune")
    for name in _small(decoder):
        others[name] = jnp.asarray(weights.get(params, tuple(name.split("."))), jnp.float32)
    return {"tables": tables, "others": others}


def apply(params: Any, tuned: Tuned) -> Any:
    """Parameters that compute with what was tuned, every weight dense, differentiable in `tuned`.

    Weights are made anew where they are wanted again, so that no bit is kept for a gradient.

    Args:
      params: as `init` was given.
      tuned: like what it gave.

    Returns:
      A tree of arrays for the same module without `act_bits`, which are for planes.
    """
    made = jax.tree.map(lambda a: a, params)
    for name, weight in _leaves(params):
        path = tuple(name.split("."))
        if name in tuned["others"]:
            weights.put(made, path, tuned["others"][name])
        elif name in tuned["tables"]:
            weights.put(made, path, _dense(weight, tuned["tables"][name]))
    return made


def write(params: Any, tuned: Tuned) -> Any:
    """Parameters with what was tuned in their own tables, rounded to what these can hold.

    Args:
      params: as `init` was given.
      tuned: like what it gave.

    Returns:
      A tree with the same planes; what it computes is what `apply` does.
    """
    made = jax.tree.map(lambda a: a, params)
    for name, weight in _leaves(params):
        path = tuple(name.split("."))
        if name in tuned["others"]:
            weights.put(made, path, tuned["others"][name].astype(weight.dtype))
        elif name in tuned["tables"]:
            weights.put(made, path, _with_tables(weight, tuned["tables"][name]))
    return made


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
    expected = jax.nn.log_softmax(target.astype(jnp.float32))
    got = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - got), axis=-1))


def _small(decoder: Decoder) -> list[str]:
    """Dotted paths of norms, routers and biases, stacked over the layers of their segment."""
    names = ["norm"]
    for member in weights.members(decoder):
        names += [
            ".".join(member.path + role.path)
            for role in weights.roles(member.layer, decoder.width)
            if role.tap is None
        ]
    return names


def _leaves(params: Any) -> list[tuple[str, Any]]:
    """Weights by their dotted paths."""
    found = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda w: isinstance(w, BitPlanes | MixedPlanes)
    )
    return [(".".join(str(key.key) for key in path), leaf) for path, leaf in found]


def _stacks(weight: BitPlanes | MixedPlanes) -> Sequence[BitPlanes]:
    return weight.stacks if isinstance(weight, MixedPlanes) else (weight,)


def _dense(weight: BitPlanes | MixedPlanes, tables: Sequence[Any]) -> jax.Array:
    @jax.checkpoint
    def values(stack, table):
        return stack.values(*tables_lib.decode_parameters(table, stack.bits))

    made = [values(s, t) for s, t in zip(_stacks(weight), tables, strict=True)]
    if isinstance(weight, BitPlanes):
        return made[0]
    starts = jnp.asarray(np.cumsum([0] + [len(stack) for stack in made])[:-1])
    return jnp.concatenate(made)[starts[weight.stack] + weight.slot]


def _with_tables(weight: BitPlanes | MixedPlanes, tables: Sequence[Any]) -> Any:
    stacks = [
        replace(stack, tables=(*stack.tables[:-1], tables_lib.from_parameters(table, stack.bits)))
        for stack, table in zip(_stacks(weight), tables, strict=True)
    ]
    return replace(weight, stacks=tuple(stacks)) if isinstance(weight, MixedPlanes) else stacks[0]
