"""A budget shared out: each part's choice, so that together they cost least and fit.

    minimise   sum_ik L_ik x_ik
    subject to sum_k x_ik = 1 for every part i,  sum_ik S_ik x_ik <= budget,  x binary

with L_ik what part i costs at its choice k, and S_ik its size there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mcjax.notes import note

SLIGHT = 0.02
"""Of what bits dealt out evenly cost: a smaller gain over that is told of."""

EXACT_UNITS = 512
"""Larger programmes are solved to within `GAP` of the optimum."""

GAP = 1e-5

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}


class Bytes(NamedTuple):
    """A budget in bytes."""

    limit: int


def parse(budget: str | float) -> float | Bytes:
    """A budget as it is written: average bits, "2.5", or bytes, "4.2GB" or "4GiB".

    Raises:
      ValueError: if it is neither.
    """
    try:
        return float(budget)
    except ValueError:
        text = str(budget).lower()
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text)
    if found is None or found[2] not in _UNITS:
        raise ValueError(
            f"budget {budget!r} is neither average bits, such as 2.5, nor bytes, such as 4.2GB "
            "(4.2e9) or 4GiB"
        )
    return Bytes(math.floor(float(found[1]) * _UNITS[found[2]] + 1e-6))


def solve(
    cost: np.ndarray,
    size: np.ndarray,
    budget: float | Bytes,
    *,
    widths: Sequence[int],
    count: int,
    fixed: int,
) -> np.ndarray:
    """Shares a budget out, and notes if that is hardly better than dealing it out evenly.

    Args:
      cost: float [N, W] of N parts at W widths, infinite where one is not stored.
      size: int [N, W], in bits, or in bytes if the budget is.
      budget: average bits or bytes.
      widths: the W widths.
      count: weights of all parts together.
      fixed: bytes of a budget in bytes that go to something else.

    Returns:
      int [N], each part's choice.

    Raises:
      ValueError: if the budget is less than the least or, in bits, more than the most there is.
    """
    possible = np.where(np.isfinite(cost), size, size.max(axis=1, keepdims=True))
    low = int(possible.min(axis=1).sum())
    high = int(np.where(np.isfinite(cost), size, 0).max(axis=1).sum())
    if isinstance(budget, Bytes):
        total = budget.limit - fixed
        if total < low:
            raise ValueError(
                f"a budget of {budget.limit} bytes is not feasible: what is stored is served from "
                f"{fixed + low} to {fixed + high} bytes"
            )
    else:
        if not low <= budget * count * (1 + 1e-12) <= high * (1 + 1e-9):
            raise ValueError(
                f"budget {budget} is not feasible: widths {tuple(widths)} allow "
                f"{low / count:g} to {high / count:g} bits on average"
                + (f"; if it is bytes, write {budget:.0f}B" if budget > 64 else "")
            )
        total = min(high, math.floor(budget * count * (1 + 1e-12)))
    chosen = share_out(cost, size, total)
    tell_if_slight(cost, size, chosen)
    return chosen


def share_out(cost: np.ndarray, size: np.ndarray, total: int) -> np.ndarray:
    """The choices of least cost that fit (cvxpy with HiGHS), and what then still fits.

    Args:
      cost: float [N, W], infinite where there is no such choice.
      size: int [N, W].
      total: the most that sizes may add up to.

    Returns:
      int [N], the choice of each.
    """
    import cvxpy as cp

    usable = np.isfinite(cost)
    least = np.where(usable, cost, np.inf).min(axis=1, keepdims=True)
    gain = np.where(usable, cost - least, 0)
    spread = max(float(gain.max()), 1e-30)
    unit = max(1, int(np.gcd.reduce(size[usable])))
    x = cp.Variable(cost.shape, boolean=True)
    constraints = [
        cp.sum(x, axis=1) == 1,
        cp.sum(cp.multiply(size / unit, x)) <= total // unit,
        x <= usable.astype(float),
    ]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(gain / spread * 1e4, x))), constraints)
    gap = 0.0 if len(cost) <= EXACT_UNITS else GAP
    options = {"output_flag": False, "mip_rel_gap": gap, "mip_abs_gap": 0.0}
    problem.solve(solver=cp.HIGHS, highs_options=options)
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) or x.value is None:
        raise ValueError(f"no choice of {len(cost)} parts within {total}: {problem.status}")
    return filled(cost, size, total, np.argmax(np.where(usable, x.value, -1), axis=1))


def filled(cost, size, total, chosen) -> np.ndarray:
    """Choices with what room is left given to larger ones, of most gain for their size first.

    If a solver's tolerance left them too large, smaller ones of least loss for their size first.
    """
    chosen, rows = chosen.copy(), np.arange(len(cost))
    room = total - int(size[rows, chosen].sum())
    while room < 0:
        less = size[rows, chosen][:, None] - size
        loss = np.where(np.isfinite(cost), cost, np.inf) - cost[rows, chosen][:, None]
        rate = np.where(less > 0, loss / np.maximum(less, 1), np.inf)
        i, k = np.unravel_index(np.argmin(rate), rate.shape)
        room += int(less[i, k])
        chosen[i] = k
    while True:
        more = size - size[rows, chosen][:, None]
        fits = np.isfinite(cost) & (more > 0) & (more <= room)
        if not fits.any():
            return chosen
        gain = cost[rows, chosen][:, None] - np.where(fits, cost, 0)
        rate = np.where(fits & (gain >= 0), gain / np.maximum(more, 1), -np.inf)
        if not np.isfinite(rate).any():
            return chosen
        i, k = np.unravel_index(np.argmax(rate), rate.shape)
        room -= int(more[i, k])
        chosen[i] = k


def tell_if_slight(cost: np.ndarray, size: np.ndarray, chosen: np.ndarray) -> None:
    """Notes that bits dealt out evenly would be about as good."""
    rows, stored = np.arange(len(cost)), np.isfinite(cost)
    even, mine = even_cost(cost, size, int(size[rows, chosen].sum())), cost[rows, chosen].sum()
    place = np.arange(cost.shape[1])
    free = all(
        (stored & beyond).any() for beyond in (place < chosen[:, None], place > chosen[:, None])
    )
    if free and (1 - SLIGHT) * even < mine < math.inf:
        note(
            f"sharing bits out by loss is predicted to gain {100 * max(0, 1 - mine / even):.1f} % "
            "over dealing them out evenly: that is about as good here"
        )


def even_cost(cost: np.ndarray, size: np.ndarray, total: int) -> float:
    """What it costs to give all parts one width, or some, whichever they are, the next.

    Infinite where that cannot be done in so little or so much.
    """
    usable = np.isfinite(cost).all(axis=0)
    sizes, costs = size[:, usable].sum(axis=0), cost[:, usable].sum(axis=0)
    if not usable.any():
        return math.inf
    return float(np.interp(total, sizes, costs, left=math.inf, right=math.inf))
