"""From tensors of a checkpoint to weights by role, and back.

A `Rule` says which tensors make which weights. Rules are few kinds, each made by a function here;
a family's page lists them for a layer, and reader, completeness check and writer walk the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = list[np.ndarray]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")
"""Names of a gated network's projections: gate, up, down."""


@dataclass(frozen=True)
class Rule:
    """Tensors that make weights.

    Attributes:
      paths: of the weights, dotted.
      names: of the tensors; one with `{e}` stands for a tensor an expert, stacked.
      read: tensors to weights.
      write: weights to tensors.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    read: Callable[[Arrays], Arrays]
    write: Callable[[Arrays], Arrays]


def keep(path: str, name: str) -> Rule:
    """A tensor that is the weight."""
    return Rule((path,), (name,), list, list)


def plus_one(path: str, name: str) -> Rule:
    """A norm's scale stored less one; kept in float32, where nothing is lost."""
    return Rule(
        (path,),
        (name,),
        lambda tensors: [tensors[0].astype(np.float32) + 1],
        lambda weights: [np.asarray(weights[0], np.float32) - 1],
    )


def linear(path: str, *names: str, sizes: Sequence[int] = ()) -> Rule:
    """Tensors [..., d_out, d_in] that are one weight [..., d_in, d_out], side by side.

    Args:
      path: of the weight.
      *names: of the tensors, each with `.weight` to come.
      sizes: output features of each, where there are several.
    """

    def read(tensors):
        return [np.concatenate([np.swapaxes(t, -1, -2) for t in tensors], axis=-1)]

    def write(weights):
        parts = np.split(weights[0], np.cumsum(sizes)[:-1], axis=-1) if sizes else weights
        return [np.swapaxes(p, -1, -2) for p in parts]

    return Rule((path,), tuple(f"{name}.weight" for name in names), read, write)


def vectors(path: str, *names: str, sizes: Sequence[int] = ()) -> Rule:
    """Tensors [d] that are one vector, end to end."""
    return Rule(
        (path,),
        names,
        lambda tensors: [np.concatenate(tensors)],
        lambda weights: np.split(weights[0], np.cumsum(sizes)[:-1]) if sizes else weights,
    )


def squeezed(path: str, name: str, axis: int = 1) -> Rule:
    """A tensor with an axis of one that the weight has not."""
    return Rule(
        (path,),
        (name,),
        lambda tensors: [np.squeeze(tensors[0], axis)],
        lambda weights: [np.expand_dims(weights[0], axis)],
    )


def fused(first: str, second: str, name: str, axis: int, transpose: bool) -> Rule:
    """A tensor that holds two weights, one after the other along `axis`."""

    def turn(x):
        return np.swapaxes(x, -1, -2) if transpose else x

    return Rule(
        (first, second),
        (name,),
        lambda tensors: [turn(half) for half in np.split(tensors[0], 2, axis=axis)],
        lambda weights: [np.concatenate([turn(w) for w in weights], axis=axis)],
    )


def interleaved(first: str, second: str, name: str) -> Rule:
    """A tensor whose last axis alternates between two weights."""
    return Rule(
        (first, second),
        (name,),
        lambda tensors: [tensors[0][..., ::2], tensors[0][..., 1::2]],
        lambda weights: [np.stack(weights, axis=-1).reshape(*weights[0].shape[:-1], -1)],
    )


def gated(path: str, prefix: str, names: Sequence[str] = PROJECTIONS) -> list[Rule]:
    """A gated network's three projections; `prefix` may hold `{e}`."""
    ours = ("gate", "up", "down")
    return [linear(f"{path}.{o}", f"{prefix}.{n}") for o, n in zip(ours, names, strict=True)]


def gated_biases(path: str, prefix: str) -> list[Rule]:
    """The biases of a gated network's three projections."""
    return [keep(f"{path}.{n}_bias", f"{prefix}.{n}_proj.bias") for n in ("gate", "up", "down")]


def by_head(path: str, heads: int, *parts: tuple[str, Sequence[int]]) -> Rule:
    """Tensors of heads one after the other that are one weight, of whose heads each has all parts.

    Args:
      path: of the weight [D, heads * the sum of all sizes].
      heads: how many.
      *parts: for each tensor its name and the features of a head of everything in it, in order.
    """
    every = [size for _, sizes in parts for size in sizes]

    def read(tensors):
        pieces = []
        for tensor, (_, sizes) in zip(tensors, parts, strict=True):
            ends = np.cumsum([heads * size for size in sizes])[:-1]
            pieces += [p.T.reshape(p.shape[1], heads, -1) for p in np.split(tensor, ends)]
        return [np.concatenate(pieces, axis=-1).reshape(pieces[0].shape[0], -1)]

    def write(weights):
        weight = np.asarray(weights[0]).reshape(len(weights[0]), heads, -1)
        pieces = iter(np.split(weight, np.cumsum(every)[:-1], axis=-1))
        flat = lambda: next(pieces).reshape(len(weight), -1).T  # noqa: E731
        return [np.concatenate([flat() for _ in sizes]) for _, sizes in parts]

    return Rule((path,), tuple(f"{name}.weight" for name, _ in parts), read, write)


def two_in_one(path: str, first: str, last: str) -> list[Rule]:
    """A gated network's gate and up in one tensor [..., 2 F, D], and down [..., D, F]."""
    return [
        fused(f"{path}.gate", f"{path}.up", first, -2, True),
        Rule(
            (f"{path}.down",),
            (last,),
            lambda tensors: [np.swapaxes(tensors[0], -1, -2)],
            lambda weights: [np.swapaxes(weights[0], -1, -2)],
        ),
    ]


def experts(prefix: str, names: Sequence[str] = PROJECTIONS) -> tuple[list[Rule], list[Rule]]:
    """Experts each with tensors of their own, or fused into two tensors, as transformers 5 can."""
    at = f"{prefix}.experts"
    together = two_in_one("block.experts", f"{at}.gate_up_proj", f"{at}.down_proj")
    return gated("block.experts", at + ".{e}", names), together
