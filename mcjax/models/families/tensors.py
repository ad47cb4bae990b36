"""From tensors of a checkpoint to weights by role, and back.

A `Rule` says which tensors make which weights. Rules are few kinds, each made by a function here;
a family's page lists them for a layer, and reader, completeness check and writer walk the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = list[np.ndarray]


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


def reshaped(path: str, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> Rule:
    """A tensor that differs in axes of one."""
    return Rule(
        (path,),
        (name,),
        lambda tensors: [tensors[0].reshape(ours)],
        lambda weights: [np.asarray(weights[0]).reshape(theirs)],
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


def gated(path: str, prefix: str) -> list[Rule]:
    """A gated network's three projections; `prefix` may hold `{e}`."""
    return [linear(f"{path}.{n}", f"{prefix}.{n}_proj") for n in ("gate", "up", "down")]


def experts(prefix: str) -> tuple[list[Rule], list[Rule]]:
    """Experts each with tensors of their own, or fused into two tensors, as transformers 5 can."""
    at = f"{prefix}.experts"
    together = [
        fused("block.experts.gate", "block.experts.up", f"{at}.gate_up_proj", -2, True),
        Rule(
            ("block.experts.down",),
            (f"{at}.down_proj",),
            lambda tensors: [np.swapaxes(tensors[0], -1, -2)],
            lambda weights: [np.swapaxes(weights[0], -1, -2)],
        ),
    ]
    return gated("block.experts", at + ".{e}"), together
