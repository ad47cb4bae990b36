"""A budget shared out over the weights of any network, by what each costs at each width.

What a weight costs is measured where it matters, at the end: the network runs with that weight
alone at a width, and what it gives is compared with what it gave before (ours; for language models
see `mcjax.allocate`). That costs add up is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import programme
from mcjax.leaves import named, some
from mcjax.tree.kernel import Kernel, is_kernel


def squared_change(before: Any, after: Any) -> jax.Array:
    """``|after - before|^2 / |before|^2`` over all arrays of floating-point numbers together.

    Raises:
      ValueError: if there are none.
    """
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    floats = [(b, a) for b, a in pairs if jnp.issubdtype(b.dtype, jnp.inexact)]
    if not floats:
        raise ValueError("the function gives no floating-point numbers; give a distance of its own")

    def size(a):
        return jnp.sum(jnp.square(jnp.abs(a)))

    def wide(a):
        return a.astype(jnp.promote_types(a.dtype, jnp.float32))

    change = sum(size(wide(a) - wide(b)) for b, a in floats)
    return jnp.asarray(change / jnp.maximum(sum(size(wide(b)) for b, _ in floats), 1e-30))


def costs(
    function: Callable[..., Any],
    params: Any,
    planes: Any,
    batches: Iterable[Any],
    distance: Callable[[Any, Any], jax.Array] = squared_change,
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, np.ndarray]:
    """What each weight costs alone at each of its widths.

    Args:
      function: of params and a batch, as `mcjax.tree.watch` took it.
      params: the tree of arrays.
      planes: from `mcjax.tree.shrink`, all widths.
      batches: of data; as many runs of each as there are widths of all weights.
      distance: (what the function gave, what it gives now) -> a number, averaged over batches:
        `mcjax.tree.divergence` for logits.
      progress: wraps the iteration over weights, called with (items, description=...).

    Returns:
      By the names of weights float64 [widths], ascending width.

    Raises:
      ValueError: if no weight is planes, they are those of another tree, there is no batch, or a
        distance is not finite.
    """
    names, leaves, structure = named(params)
    batches, kernels = list(batches), _kernels(planes)
    if not batches:
        raise ValueError("there is no batch to measure costs on")
    missing = sorted(set(kernels) - set(names))
    if missing:
        raise ValueError(f"planes are of another tree: params has no {missing[0]}")

    @jax.jit
    def measure(leaves, batch, before):
        return distance(before, function(jax.tree.unflatten(structure, leaves), batch))

    usual = jax.jit(lambda leaves, batch: function(jax.tree.unflatten(structure, leaves), batch))
    before = [usual(leaves, batch) for batch in batches]
    found = {}
    for name in progress(kernels, description="costs"):
        place = names.index(name)
        found[name] = np.array(
            [
                np.mean(
                    [
                        measure([*leaves[:place], dense, *leaves[place + 1 :]], batch, was)
                        for batch, was in zip(batches, before, strict=True)
                    ],
                    dtype=np.float64,
                )
                for dense in (kernels[name].slice(k).dequantize() for k in kernels[name].widths)
            ]
        )
        _check(name, kernels[name], found[name])
    return found


def allocate(planes: Any, costs: Mapping[str, np.ndarray], budget: float | str) -> dict[str, int]:
    """The width of every weight, so that together they cost least and fit.

    Args:
      planes: from `mcjax.tree.shrink`, all widths.
      costs: from `costs`, or anybody's: by the names of weights [widths].
      budget: average bits of the weights that are planes, tables not counted; or bytes of the whole
        tree, such as "1.5MB".

    Returns:
      Widths by name, for `mcjax.tree.slice_tree`.

    Raises:
      ValueError: if the budget cannot be met, no weight is planes, or costs are of other weights or
        widths or not finite.
    """
    kernels = _kernels(planes)
    if set(costs) != set(kernels):
        other = some(sorted(set(costs) ^ set(kernels)))
        raise ValueError(f"costs are of other weights: they differ in {other}")
    for name, kernel in kernels.items():
        _check(name, kernel, np.asarray(costs[name]))
    wanted = programme.parse(budget)
    in_bytes = isinstance(wanted, programme.Bytes)
    widths = sorted({k for kernel in kernels.values() for k in kernel.widths})
    cost = np.full((len(kernels), len(widths)), math.inf)
    size = np.zeros((len(kernels), len(widths)), np.int64)
    for row, (name, kernel) in enumerate(kernels.items()):
        for place, k in enumerate(kernel.widths):
            column = widths.index(k)
            cost[row, column] = np.asarray(costs[name])[place]
            size[row, column] = _bytes(kernel, k) if in_bytes else k * math.prod(kernel.shape)
    others = [leaf for leaf in jax.tree.leaves(planes, is_leaf=is_kernel) if not is_kernel(leaf)]
    chosen = programme.solve(
        cost,
        size,
        wanted,
        widths=widths,
        count=sum(math.prod(kernel.shape) for kernel in kernels.values()),
        fixed=sum(leaf.nbytes for leaf in others if hasattr(leaf, "nbytes")),
    )
    return {name: widths[k] for name, k in zip(kernels, chosen, strict=True)}


def _kernels(planes: Any) -> dict[str, Kernel]:
    """The weights that are planes, by name."""
    names, leaves, _ = named(planes, is_kernel)
    kernels = {name: leaf for name, leaf in zip(names, leaves, strict=True) if is_kernel(leaf)}
    if not kernels:
        raise ValueError("no weight of the tree is planes")
    return kernels


def _check(name: str, kernel: Kernel, cost: np.ndarray) -> None:
    if cost.shape != (len(kernel.widths),) or not np.isfinite(cost).all():
        raise ValueError(
            f"{name} has widths {kernel.widths}, and their costs must be as many finite numbers; "
            f"got {cost.tolist()}"
        )


def _bytes(kernel: Kernel, width: int) -> int:
    """Planes and table at a width."""
    return jax.eval_shape(lambda held: held.slice(width), kernel).nbytes
