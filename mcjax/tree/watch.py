"""What a function's weights multiply: their layouts, and Gram matrices of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mcjax.tree.program import Visitor, run
from mcjax.tree.view import Layout, View, whole


class Watched(NamedTuple):
    """What was seen of one weight.

    Attributes:
      layout: the weight as matrices, None if nothing multiplies it as such.
      gram: float32 [*batch, d_in, d_in], the sum of x x' over its inputs x.
      uses: how else it is used: names of primitives.
    """

    layout: Layout | None
    gram: jax.Array | None
    uses: tuple[str, ...]


def rows_of(x: jax.Array, contracted: Any, batched: Any, view: View, layout: Layout) -> jax.Array:
    """What a product multiplies a weight with, as rows [*batch, N, d_in]."""
    free = [n for n in range(x.ndim) if n not in (*contracted, *batched)]
    batch = [atom.size for atom in layout.batch[len(view.loops) :]]
    rows = jnp.transpose(x, [*batched, *free, *contracted])
    return rows.reshape(*batch, -1, layout.matrices[-2])


def axes_of(view: View, eqn: Any, first: bool):
    """Contracted and batched axes of the weight, ascending in its memory, and of the other."""
    contracted, batched = eqn.params["dimension_numbers"]
    mine, theirs = (0, 1) if first else (1, 0)
    pairs = sorted(
        zip(contracted[mine], contracted[theirs], strict=True),
        key=lambda pair: [-atom.stride for atom in view.axes[pair[0]]],
    )
    inside, of_other = ([pair[n] for pair in pairs] for n in (0, 1))
    return (inside, batched[mine]), (of_other, batched[theirs])


class Watch(Visitor):
    """Sums Gram matrices.

    Attributes:
      seen: layouts by name, shared with the visitors of bodies.
      uses: names of primitives by name, likewise.
    """

    def __init__(self, seen: dict | None = None, uses: dict | None = None):
        super().__init__()
        self.seen: dict[str, Layout] = {} if seen is None else seen
        self.uses: dict[str, set[str]] = {} if uses is None else uses

    def inside(self) -> Watch:
        """See `Visitor`."""
        return Watch(self.seen, self.uses)

    def otherwise(self, view: View, use: str) -> None:
        """See `Visitor`."""
        self.uses.setdefault(view.name, set()).add(use)

    def unfold(self, view: View):
        """See `Visitor`."""
        atoms = view.axes[0]

        def one(step):
            return view.then(view.axes[1:], lambda _: step, loops=(*view.loops, *atoms))

        return view.dense(), one

    def product(self, view: View, eqn: Any, other: jax.Array, first: bool) -> None:
        """See `Visitor`."""
        if eqn.primitive.name == "dot_general":
            if view.flipped or jnp.iscomplexobj(other):
                return self.otherwise(view, "a flipped or complex product")
            (inside, batch), (contracted, batched) = axes_of(view, eqn, first)
            layout = view.layout(batch, inside)
            rows = rows_of(other, contracted, batched, view, layout)
        else:
            found = patches(view, eqn, other)
            if found is None:
                return self.otherwise(view, eqn.primitive.name)
            layout, rows = found
        if self.seen.setdefault(view.name, layout) != layout:
            return self.otherwise(view, "products of another layout")
        rows = rows.astype(jnp.float32)
        gram = jnp.einsum("...nd,...ne->...de", rows, rows, precision="highest")
        return self.add({view.name: gram})


def patches(view: View, eqn: Any, x: jax.Array) -> tuple[Layout, jax.Array] | None:
    """A convolution's kernel as matrices, and its inputs as rows [groups, N, d_in]."""
    given = eqn.params
    if given["batch_group_count"] != 1:
        return None
    numbers, groups = given["dimension_numbers"], given["feature_group_count"]
    out, channel, *spatial = numbers.rhs_spec
    shape = list(view.shape)
    sizes = [shape[n] for n in spatial]
    flipped = [n for n, axis in enumerate(spatial) if view.flipped & set(view.axes[axis])]
    shape[out : out + 1] = [groups, shape[out] // groups]
    apart = view.reshaped(shape)
    turned = {atom for n in spatial for atom in view.axes[n]}
    if apart is None or view.flipped - turned:
        return None
    channel, *spatial = (n + (n > out) for n in (channel, *spatial))
    layout = apart.layout([out] if groups > 1 else [], [channel, *spatial])
    x = jnp.transpose(x, numbers.lhs_spec)
    cut = lax.conv_general_dilated_patches(
        x,
        sizes,
        given["window_strides"],
        given["padding"],
        lhs_dilation=given["lhs_dilation"],
        rhs_dilation=given["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    cut = cut.reshape(len(x), groups, -1, *sizes, int(np.prod(cut.shape[2:])))
    cut = jnp.flip(cut, [3 + n for n in flipped])
    rows = jnp.moveaxis(cut.reshape(len(x), groups, -1, cut.shape[-1]), (1, 0, 3), (0, 1, 2))
    rows = rows.reshape(groups, -1, rows.shape[-1])
    return layout, rows if groups > 1 else rows[0]


def watch(
    function: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Watched]:
    """What each weight multiplies over some batches.

    Args:
      function: of params and a batch, any that JAX can trace.
      params: a tree of arrays.
      batches: of data, trees of arrays. Each shape compiles once.
      progress: wraps the iteration over batches, called with (items, description=...).

    Returns:
      `Watched` of every leaf by its path, such as "encoder/layer_0/kernel".

    Raises:
      ValueError: if there is no batch.
    """
    names, leaves, structure = flat(params)
    seen: dict[str, Layout] = {}
    uses: dict[str, set[str]] = {}

    @jax.jit
    def of_batch(leaves, batch):
        visitor = Watch(seen, uses)
        program = jax.make_jaxpr(
            lambda leaves, batch: function(jax.tree.unflatten(structure, leaves), batch)
        )(leaves, batch)
        views = [
            whole(name, leaf, partial(jnp.asarray, leaf))
            for name, leaf in zip(names, leaves, strict=True)
        ]
        run(program, [*views, *jax.tree.leaves(batch)], visitor)
        return visitor.found

    total, count = Visitor(), 0
    for batch in progress(batches, description="watching"):
        total.add(of_batch(leaves, batch))
        count += 1
    if not count:
        raise ValueError("there is no batch to watch the function on")
    return {
        name: Watched(seen.get(name), total.found.get(name), tuple(sorted(uses.get(name, ()))))
        for name in names
    }


def flat(tree: Any, is_leaf: Any = None) -> tuple[list[str], list[Any], Any]:
    """Names of leaves, joined by "/", the leaves, and the tree's structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return names, [leaf for _, leaf in pairs], structure
