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

import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import parameters
from mcjax import tables as tables_lib
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, MixedPlanes, Planes
from mcjax.checkpoint import BY_EXPERT, MEASURED, ArtifactReader, save_tree, write_manifest
from mcjax.divergence import divergence as logits_divergence
from mcjax.hosts import everywhere
from mcjax.leaves import named, replaced, some
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.ops.fragments import values
from mcjax.tree.kernel import Kernel, holds_planes, is_kernel

Tuned = dict[str, dict[str, Any]]

RATES = {1: 8e-3, 2: 8e-3, 3: 4e-3, 4: 2e-3}
"""The greatest learning rate of each width's log2 steps with Adam, see `table_rates`. Of wider ones
the least."""


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
    """The names of a language model's last norm and of all that its layers have beside planes.

    Those are norms, routers, biases and the like.
    """
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


def with_tables(params: Any, tuned: Tuned) -> Any:
    """Parameters of a language model with what was tuned as their tables, differentiable in it.

    Each layer makes arrays of its planes when it is its turn, there and back, so that one is dense
    at a time; on a mesh each device makes those of its own planes.

    Args:
      params: as `init` was given, on a mesh where `mcjax.load` has put them.
      tuned: like what it gave.

    Returns:
      A tree for the same model without `act_bits`, which are for planes that do not train.

    Raises:
      ValueError: as `apply`, or if it is a tree of `mcjax.tree`, whose functions take arrays.
    """
    kernels = [
        name for name, leaf in zip(*named(params, is_kernel)[:2], strict=True) if is_kernel(leaf)
    ]
    if kernels:
        raise ValueError(f"{kernels[0]!r} is a kernel of mcjax.tree: use `apply`")
    return _each(params, tuned, _trained)


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


def most_rate(width: int) -> float:
    """A width's greatest learning rate, see `RATES`."""
    return RATES.get(width, min(RATES.values()))


def table_rates(rate: float, width: int) -> dict[str, float]:
    """The learning rates of a table, by which steps and offsets move a weight about as far.

    An octave of a step is ln 2 of a weight; an offset of 1 is a half span, of so many deviations of
    a Gaussian weight.
    """
    half_span = tables_lib.GAUSSIAN_STEP[width] * (2**width - 1) / 2
    return {"steps": rate, "offset": rate * math.log(2) / half_span}


def rates(tuned: Tuned) -> dict[str, Any]:
    """Learning rates that suit `tuned["tables"]`, a tree like it; let them rise, then fall."""

    def of_width(k):
        return table_rates(most_rate(int(k)), int(k))

    return {name: {k: of_width(k) for k in of} for name, of in tuned["tables"].items()}


def save(model: Any, tuned: Tuned, out: str | Path, about: Mapping[str, Any]) -> None:
    """Writes the artifact that a model is of, with what was tuned in place of the tables it reads.

    Planes and all other tables stay, so it serves every budget: this one as tuned, and others with
    the same tables wherever a weight has the same width. What parts cost is not measured anew. Of
    several processes all must ask, and the first writes.

    Args:
      model: a `mcjax.Model` of an artifact.
      tuned: of its tables alone, `init(model.params, ())`, or of some of them.
      out: the artifact to write; must not exist.
      about: what the manifest adds to its list "tuned" of how that was trained, JSON-ready.

    Raises:
      ValueError: if `out` exists, or `tuned` is of another tree or other widths, or has norms,
        routers or biases, which all widths share.
    """
    out = Path(out)
    if tuned["others"]:
        raise ValueError(
            f"norms, routers and biases were tuned too ({some(tuned['others'])}), which all widths "
            "share; tune with `init(params, ())`"
        )
    if jax.process_index() == 0 and out.exists():
        raise ValueError(f"{out} exists; remove it or choose another place")
    decoder, widths = model.module.decoder, model.widths
    names, written, _ = named(write(model.params, tuned), holds_planes)
    tables = {
        name: {k: everywhere(table) for k, table in _tables(name, weight).items()}
        for name, weight in zip(names, written, strict=True)
        if name in tuned["tables"]
    }
    if jax.process_index():
        return
    reader = ArtifactReader(model.path)
    changed: list[dict[str, dict[Any, np.ndarray]]] = [{} for _ in decoder.layers]
    for member in weights.members(decoder):
        for role in weights.roles(member.layer, decoder.width):
            held = tables.get("/".join(member.path + role.path))
            if held is None:
                continue
            own = parameters.widths_of(member.numbers, role, widths)
            row = parameters.arrange(own, model.spread(member) if role.routed else None).row
            for (r, *e), k in np.ndenumerate(own):
                rows = changed[member.numbers[r]].setdefault(f"{role.name}.table_{k}", {})
                rows[tuple(e)] = held[int(k)][row[r, *e]]
    with whole(out) as aside:
        shutil.copytree(reader.directory, aside, ignore=shutil.ignore_patterns("layers", MEASURED))
        sums = dict(reader.manifest["checksums"])
        for i, of_layer in enumerate(changed):
            leaves: Any = reader.read_all(f"layers/{i}")
            for name, rows in of_layer.items():
                leaves[name] = leaves[name].copy()
                for row, value in rows.items():
                    leaves[name][row] = value
            directory = aside / "layers" / str(i)
            sums[f"layers/{i}"] = save_tree(directory, leaves, BY_EXPERT)
        told = [*reader.manifest.get("tuned", ()), dict(about)]
        write_manifest(aside, {**reader.manifest, "checksums": sums, "tuned": told})


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
    logits = dense.apply({"params": with_tables(params, tuned)}, tokens)
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
    return values(_trained(weight, tables), jnp.float32)


def _trained(weight: Any, tables: Mapping[str, Any]) -> Planes:
    return _replaced(weight, lambda stack: tables[str(stack.bits)])


def _with_tables(weight: Any, tables: Mapping[str, Any]) -> Any:
    if isinstance(weight, Kernel):
        return replace(weight, planes=_with_tables(weight.planes, tables))
    return _replaced(
        weight, lambda stack: tables_lib.from_parameters(tables[str(stack.bits)], stack.bits)
    )


def _replaced(weight: Planes, table: Callable[[BitPlanes], Any]) -> Planes:
    """Planes whose stacks have other tables of their width."""
    stacks = [replace(s, tables=(*s.tables[:-1], table(s))) for s in _stacks(weight)]
    return replace(weight, stacks=tuple(stacks)) if isinstance(weight, MixedPlanes) else stacks[0]
