"""Functions of trees that hold planes: their products are those of `mcjax.dot`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.leaves import named
from mcjax.models.weights import split_stacks
from mcjax.ops import Adapted, dot
from mcjax.tree.kernel import is_kernel
from mcjax.tree.products import axes_of, rows_of
from mcjax.tree.program import Visitor, run
from mcjax.tree.view import Layout, View, arranged, whole


class Held(NamedTuple):
    """What stands for a view: planes of the matrices that loops leave, and the whole's layout."""

    planes: BitPlanes | MixedPlanes | Adapted
    layout: Layout


class Serve(Visitor):
    """Multiplies by planes.

    Attributes:
      act_bits: as in `mcjax.dot`.
    """

    def __init__(self, act_bits: int | None):
        super().__init__()
        self.act_bits = act_bits

    def unfold(self, view: View):
        """See `Visitor`."""
        held, depth = view.held, len(view.loops)
        if held is None or view.flipped or held.layout.batch[depth : depth + 1] != view.axes[0]:
            return None
        layout = held.layout
        have = (*layout.batch[depth + 1 :], *layout.inside, *layout.outside)
        # Where a step has one matrix, it looks its own up: a slice of planes would be a copy.
        last = depth + 1 == len(layout.batch)
        over, together = split_stacks(held.planes) if last else (held.planes, lambda step: step)

        def one(step):
            planes = together(step)
            loops = (*view.loops, *view.axes[0])

            def dense():
                return arranged(planes.dequantize(view.dtype), have, view.axes[1:])

            return replace(
                view, axes=view.axes[1:], dense=dense, held=Held(planes, layout), loops=loops
            )

        return over, one

    def product(self, view: View, eqn: Any, other: jax.Array, first: bool) -> Any:
        """See `Visitor`."""
        if view.held is None or view.flipped or eqn.primitive.name != "dot_general":
            return None
        (inside, batch), (of_other, batched) = axes_of(view, eqn, first)
        layout = view.layout(batch, inside)
        if layout != view.held.layout:
            return None
        rows = rows_of(other, of_other, batched, view, layout)
        out = eqn.outvars[0].aval.dtype
        rows = rows.astype(jnp.promote_types(rows.dtype, out))  # in which sums are kept
        planes = view.held.planes
        multiply: Any = partial(dot, act_bits=self.act_bits)
        for _ in range(rows.ndim - 2):
            multiply = jax.vmap(multiply)
        y = multiply(rows, planes)
        theirs = [n for n in range(other.ndim) if n not in (*of_other, *batched)]
        mine = [n for n in range(len(view.axes)) if n not in (*batch, *inside)]
        sizes = [other.shape[n] for n in (*batched, *theirs)] + [view.shape[n] for n in mine]
        y = y.reshape(sizes).astype(out)
        if first:  # batch, then what is left of the first operand
            own = range(len(sizes) - len(mine), len(sizes))
            y = jnp.moveaxis(y, own, range(len(batched), len(batched) + len(mine)))
        return y


def serving(function: Callable[..., Any], act_bits: int | None = None) -> Callable[..., Any]:
    """The function with planes multiplied as planes.

    Args:
      function: of a tree of weights and whatever else, any that JAX can trace.
      act_bits: as in `mcjax.dot`.

    Returns:
      A function of the same arguments, whose tree may hold `Kernel`s. It composes with every
      transformation, and is as differentiable in its other arguments and in the arrays of the tree
      as the function is, but for derivatives of the function's own (`jax.custom_vjp`) of parts that
      a weight goes into.
    """

    @wraps(function)
    def served(params, *arguments, **options):
        names, leaves, structure = named(params, is_leaf=is_kernel)
        like = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_kernel(leaf) else leaf
            for leaf in leaves
        ]

        def of_leaves(leaves):
            return function(jax.tree.unflatten(structure, leaves), *arguments, **options)

        program, out = jax.make_jaxpr(of_leaves, return_shape=True)(like)
        values = [
            whole(name, leaf, leaf.dequantize, Held(leaf.planes, leaf.layout))
            if is_kernel(leaf)
            else leaf
            for name, leaf in zip(names, leaves, strict=True)
        ]
        outs = run(program, values, Serve(act_bits))
        return jax.tree.unflatten(jax.tree.structure(out), outs)

    return served
