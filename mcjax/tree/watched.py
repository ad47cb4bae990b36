"""What a function's weights multiply: their layouts, and Gram matrices of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mcjax.leaves import named, some
from mcjax.tree.products import axes_of, patches, rows_of
from mcjax.tree.program import Visitor, run
from mcjax.tree.qwix import is_qwix
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

    def refusal(self, leaf: Any) -> str | None:
        """Why this weight cannot be planes or have factors; None if it can."""
        if self.layout is None:
            return f"used by {', '.join(self.uses)}, no product" if self.uses else "not used"
        if self.uses:
            return f"used by {', '.join(self.uses)} too, not only by products"
        if not leaf.size:
            return "it is empty"
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return f"its type is {leaf.dtype}"
        return None

    @property
    def found(self) -> Layout:
        """The layout of a weight that something multiplies."""
        if self.layout is None:
            raise ValueError("nothing multiplies this weight")
        return self.layout


def check_tree(watched: Mapping[str, Watched], names: Sequence[str]) -> None:
    """Raises ValueError unless what was watched is the tree of these leaves."""
    if list(watched) != list(names):
        other = some(sorted(set(watched) ^ set(names)))
        raise ValueError(f"what was watched is another tree: they differ in {other}")


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
      ValueError: if there is no batch, a weight meets NaN or infinite inputs, or a leaf is
        quantised by qwix.
    """
    refused = [n for n, leaf in zip(*named(params, is_qwix)[:2], strict=True) if is_qwix(leaf)]
    if refused:
        raise ValueError(
            f"{refused[0]} is quantised by qwix: take mcjax.tree.from_qwix(params), and the "
            "function of the network as it was"
        )
    names, leaves, structure = named(params)
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
    finite = jax.device_get({n: jnp.isfinite(g).all() for n, g in total.found.items()})
    if unusable := [name for name in names if not finite.get(name, True)]:
        raise ValueError(
            f"{unusable[0]} multiplies NaN or infinite values, as {len(unusable)} of "
            f"{len(finite)} weights do: look at the batches, or at what the function makes of them"
        )
    return {
        name: Watched(seen.get(name), total.found.get(name), tuple(sorted(uses.get(name, ()))))
        for name in names
    }
