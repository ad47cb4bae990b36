"""A weight on its way through a program: which of its axes is where.

A weight is cast, transposed, reshaped and cut into layers before anything multiplies it. A `View`
follows that. Each axis of it is some *atoms*: so many entries of the weight, a stride apart in the
weight's own memory. What multiplies the view then says which atoms are input features, which are
output features, and which only enumerate matrices: its `Layout`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Atom(NamedTuple):
    """Some entries of a weight in a row.

    Attributes:
      stride: how far apart they are, in entries of the weight.
      size: how many.
    """

    stride: int
    size: int


Atoms = tuple[Atom, ...]


def merged(atoms: Iterable[Atom]) -> Atoms:
    """The same entries in the same order as few atoms."""
    made: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        if made and made[-1].stride == atom.stride * atom.size:
            atom = Atom(atom.stride, atom.size * made.pop().size)
        made.append(atom)
    return tuple(made)


def count(atoms: Iterable[Atom]) -> int:
    """How many entries some atoms have together."""
    return math.prod(atom.size for atom in atoms)


def arranged(array: jax.Array, have: Sequence[Atom], want: Sequence[Atoms]) -> jax.Array:
    """An array whose entries are in the order of some atoms, with the axes that are wanted.

    Args:
      array: of any shape.
      have: atoms, the last of which moves fastest.
      want: those of each axis of the result, the same entries.
    """
    wanted = [atom for axis in want for atom in axis]
    edges = {edge for s, n in (*have, *wanted) for edge in (s, s * n)}

    def fine(atoms):
        """As atoms that the other side has too."""
        for stride, size in atoms:
            top = stride * size
            cuts = sorted((e for e in edges if stride <= e <= top), reverse=True)
            for upper, lower in itertools.pairwise(cuts):
                yield Atom(lower, upper // lower)

    mine, theirs = list(fine(have)), list(fine(wanted))
    apart = jnp.reshape(array, [atom.size for atom in mine])
    order = [mine.index(atom) for atom in theirs]
    return jnp.transpose(apart, order).reshape([count(axis) for axis in want])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A weight as matrices.

    Attributes:
      shape: of the weight.
      batch: atoms that enumerate matrices, one an axis.
      inside: atoms of input features, in the order that these have in a matrix.
      outside: atoms of output features.
    """

    shape: tuple[int, ...]
    batch: Atoms
    inside: Atoms
    outside: Atoms

    @property
    def matrices(self) -> tuple[int, ...]:
        """The shape [*batch, d_in, d_out]."""
        return tuple(map(count, self.axes()))

    def axes(self) -> tuple[Atoms, ...]:
        """The atoms of each axis of the matrices."""
        return (*((atom,) for atom in self.batch), self.inside, self.outside)

    def to_matrices(self, weight: jax.Array) -> jax.Array:
        """A weight as [*batch, d_in, d_out]."""
        return arranged(weight, _lying(self.shape), self.axes())

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> Layout:
        """The inverse of `dataclasses.asdict` and a passage through JSON."""
        atoms = {
            name: tuple(Atom(*pair) for pair in kept[name])
            for name in ("batch", "inside", "outside")
        }
        return cls(shape=tuple(kept["shape"]), **atoms)

    def to_weight(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `to_matrices`."""
        have = (*self.batch, *self.inside, *self.outside)
        return arranged(matrices, have, [(atom,) for atom in _lying(self.shape)])


def _lying(shape: Sequence[int]) -> Atoms:
    """The atoms of an array's axes."""
    return tuple(Atom(math.prod(shape[n + 1 :]), size) for n, size in enumerate(shape))


@dataclass(frozen=True, kw_only=True)
class View:
    """A weight, or a part of it, as a program sees it.

    Attributes:
      name: of the weight.
      whole: the weight's own shape.
      axes: the atoms of each axis of the view.
      dtype: of the view.
      dense: gives the view as an array.
      held: what products may use instead, of the part that loops leave.
      loops: atoms that loops around run over, from the outermost.
      flipped: atoms whose entries are in reverse.
    """

    name: str
    whole: tuple[int, ...]
    axes: tuple[Atoms, ...]
    dtype: Any
    dense: Callable[[], jax.Array]
    held: Any = None
    loops: Atoms = ()
    flipped: frozenset[Atom] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        return tuple(map(count, self.axes))

    def then(self, axes: Iterable[Atoms], function: Callable, **changes: Any) -> View:
        """The view after an operation that only moves its entries."""
        dense = self.dense
        return replace(self, axes=tuple(axes), dense=lambda: function(dense()), **changes)

    def layout(self, batch: Sequence[int], inside: Sequence[int]) -> Layout:
        """What it is to a product that enumerates the axes `batch` and contracts `inside`."""

        def atoms(axes):
            return merged(atom for n in axes for atom in self.axes[n])

        others = [n for n in range(len(self.axes)) if n not in (*batch, *inside)]
        return Layout(
            shape=self.whole,
            batch=self.loops + atoms(batch),
            inside=atoms(inside),
            outside=atoms(others),
        )

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The view of another shape; None if an axis would be parts of several."""
        if 0 in self.shape:
            return None
        left = [atom for atoms in self.axes for atom in atoms]
        axes = []
        for size in shape:
            own: list[Atom] = []
            while count(own) < size:
                rest, over = divmod(size, count(own))
                if over or not left:
                    return None
                atom = left.pop(0)
                if atom.size > rest:
                    if atom.size % rest or atom in self.flipped:
                        return None
                    inner = atom.size // rest
                    left.insert(0, Atom(atom.stride, inner))
                    atom = Atom(atom.stride * inner, rest)
                own.append(atom)
            if count(own) != size:
                return None
            axes.append(tuple(own))
        return self.then(axes, lambda w: jnp.reshape(w, shape))


def whole(name: str, like: Any, dense: Callable[[], jax.Array], held: Any = None) -> View:
    """The view that a program begins with, of a weight of some shape and dtype."""
    shape = tuple(like.shape)
    axes = tuple((atom,) for atom in _lying(shape))
    return View(name=name, whole=shape, axes=axes, dtype=like.dtype, dense=dense, held=held)
