"""A tree's weights as planes: which of them, what became of each, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.leaves import named, some
from mcjax.quantize import quantize
from mcjax.tree.kernel import Kernel
from mcjax.tree.watched import Watched, check_tree


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to do with the weights whose path matches.

    Attributes:
      pattern: regular expression, searched in the path, "layer_0/dense/kernel" for instance.
      bits: number of planes, or None to leave the weight as it is.
      widths: widths that get a table, ascending to `bits`; None for all.
      group_size: as in `mcjax.quantize`.
      rotated: as in `mcjax.quantize`.
      least: weights of fewer numbers are left as they are.
    """

    pattern: str = ""
    bits: int | None = 4
    widths: tuple[int, ...] | None = None
    group_size: int | None = None
    rotated: bool = False
    least: int = 0


ALL = (Rule(),)
"""Every weight that something multiplies, at up to 4 bits."""


class Leaf(NamedTuple):
    """What became of one leaf.

    Attributes:
      path: names joined by "/".
      shape: of the original array.
      matrices: [*batch, d_in, d_out], as which it was quantised; None where it was left.
      bits: planes, or None.
      effective_bits: stored bits a number.
      errors: relative error at each width under its Gram matrix, sqrt(tr(E'GE) / tr(W'GW)).
      why: the reason where it was left.
    """

    path: str
    shape: tuple[int, ...]
    matrices: tuple[int, ...] | None
    bits: int | None
    effective_bits: float
    errors: tuple[float, ...] = ()
    why: str = ""


class Report(NamedTuple):
    """What was and was not quantised.

    Attributes:
      leaves: one `Leaf` each.
    """

    leaves: tuple[Leaf, ...]

    @property
    def coverage(self) -> float:
        """Share of all numbers in the tree that are planes now."""
        held = sum(math.prod(leaf.shape) for leaf in self.leaves if leaf.bits is not None)
        return held / max(1, self._total)

    @property
    def effective_bits(self) -> float:
        """Stored bits a number, over the whole tree."""
        bits = sum(math.prod(leaf.shape) * leaf.effective_bits for leaf in self.leaves)
        return bits / max(1, self._total)

    @property
    def _total(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    def __str__(self) -> str:
        lines = []
        for leaf in self.leaves:
            if leaf.bits is None:
                lines.append(f"{leaf.path} {leaf.shape}: left, {leaf.why}")
            else:
                errors = ", ".join(f"{error:.3f}" for error in leaf.errors)
                lines.append(
                    f"{leaf.path} {leaf.shape}: {leaf.bits} planes as {leaf.matrices}, "
                    f"errors {errors}"
                )
        return "\n".join([*lines, f"{100 * self.coverage:.1f} % of all numbers are planes"])


def shrink(
    params: Any, watched: Mapping[str, Watched], rules: Sequence[Rule] = ALL
) -> tuple[Any, Report]:
    """Quantises the weights of a tree.

    Args:
      params: a tree of arrays.
      watched: from `mcjax.tree.watch`: what multiplies each, and with which inputs.
      rules: the first whose pattern matches a path decides; what no rule matches stays.

    Returns:
      The tree with `Kernel`s in place of weights, and a report of every leaf.

    Raises:
      ValueError: if the tree is empty, a rule matches nothing, `watched` is of another tree, or a
        weight holds what cannot be quantised.
    """
    names, leaves, structure = named(params)
    if not names:
        raise ValueError("the tree holds no arrays")
    check_tree(watched, names)
    idle = set(range(len(rules)))
    made, report = [], []
    for name, leaf in zip(names, leaves, strict=True):
        number = next((n for n, r in enumerate(rules) if re.search(r.pattern, name)), None)
        idle.discard(-1 if number is None else number)
        rule = None if number is None else rules[number]
        result = _one(name, jnp.asarray(leaf), watched[name], rule)
        if isinstance(result, str):
            bits = 8 * jnp.asarray(leaf).nbytes / max(1, leaf.size)
            report.append(Leaf(name, tuple(leaf.shape), None, None, bits, why=result))
            made.append(leaf)
            continue
        kernel, errors = result
        shape = kernel.planes.shape
        effective = 8 * kernel.nbytes / math.prod(leaf.shape)
        report.append(Leaf(name, leaf.shape, shape, kernel.bits, effective, errors))
        made.append(kernel)
    if idle:
        raise ValueError(
            f"rules {[rules[n].pattern for n in sorted(idle)]} decide no leaf: the tree has "
            f"{some(names)}"
        )
    return jax.tree.unflatten(structure, made), Report(tuple(report))


def _one(name: str, leaf: jax.Array, seen: Watched, rule: Rule | None):
    """A weight's `Kernel` and its errors, or why it stays."""
    if rule is None:
        return "no rule matches"
    if rule.bits is None:
        return f"rule {rule.pattern!r}"
    why = seen.refusal(leaf)
    if why is not None:
        return why
    if leaf.size < rule.least:
        return f"{leaf.size} numbers, fewer than {rule.least}"
    matrices = seen.found.to_matrices(leaf)
    try:
        planes = quantize(
            matrices,
            rule.bits,
            rule.group_size,
            seen.gram,
            widths=rule.widths,
            rotated=rule.rotated,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if planes.nbytes >= leaf.nbytes:
        return f"{planes.nbytes} bytes as planes, {leaf.nbytes} as it is"
    kernel = Kernel(planes=planes, layout=seen.found, dtype=np.dtype(leaf.dtype))
    return kernel, _errors(matrices, planes, seen.gram)


def _errors(matrices, planes, gram) -> tuple[float, ...]:
    matrices = matrices.astype(jnp.float32)
    blind = gram is None or not gram.any()

    def size(change):
        inputs = change if blind else jnp.einsum("...de,...eo->...do", gram, change)
        return jnp.maximum(jnp.sum(change * inputs), 0)

    each = [size(matrices - planes.at_width(k).dequantize()) for k in planes.widths]
    return tuple(float(jnp.sqrt(e / jnp.maximum(size(matrices), 1e-30))) for e in each)
