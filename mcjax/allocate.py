"""Which weight gets how many bits: one programme over all that differs.

A *part* of a layer is its weights that multiply the same input, such as `gate` and `up`, or `down`,
or `qkv`; each routed expert has its own. An artifact tells what each part at each width k costs,
L_ik nats a token of divergence from the model as it was, see `mcjax.probe`. Widths then

    minimise   sum_ik L_ik x_ik
    subject to sum_k x_ik = 1 for every part i,  sum_ik S_ik x_ik <= budget,  x binary

with S_ik a part's size. A budget that is a number counts planes of what budgets are about (see
`mcjax.models.weights.budgeted`); one in bytes counts planes and tables of every part, and all else
that serving reads. That costs add up is an approximation; that they are measured at the end of the
model is what lets a layer's attention and another's experts be compared (ours). The published rule
is `mcjax.pmq`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mcjax import pmq, tables
from mcjax.bitplane import padded, resolve_group_size
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.weights import Role
from mcjax.notes import note

POLICIES = ("loss", "paper")

SLIGHT = 0.02
"""Of what bits dealt out evenly cost: a smaller gain over that is told of."""

EXACT_UNITS = 512
"""Larger programmes are solved to within `GAP` of the optimum."""

GAP = 1e-5

_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_UNITS |= {"kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}

Widths = Mapping[tuple[int, str], np.ndarray]
"""Each part's width by its layer and tap: int [E] for routed experts', else int []."""


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


class Part(NamedTuple):
    """What has a width of its own, but for the index of an expert.

    Attributes:
      layer: its number.
      tap: what its weights multiply.
      roles: its weights.
      widths: that are stored, ascending.
      budgeted: whether budgets in bits are about it.
    """

    layer: int
    tap: str
    roles: tuple[Role, ...]
    widths: tuple[int, ...]
    budgeted: bool

    @property
    def experts(self) -> int | None:
        """How many it has, None if it is not of routed experts."""
        return self.roles[0].shape[0] if self.roles[0].routed else None

    def weights(self) -> int:
        """How many weights it has, those of one expert."""
        return sum(math.prod(role.shape[-2:]) for role in self.roles)

    def bytes(self, width: int, group_size: int | None) -> int:
        """Planes and table at a width, those of one expert."""
        total = 0
        for role in self.roles:
            d_in, d_out = padded(role.shape[-2]), role.shape[-1]
            groups = d_in // resolve_group_size(role.shape[-2], group_size)
            total += d_out * (width * d_in // 8 + tables.num_rows(width) * groups)
        return total


def parts(decoder: Decoder, manifest: Mapping[str, Any]) -> list[Part]:
    """Every part of an artifact's layers."""
    found = []
    for i, layer in enumerate(decoder.layers):
        shared_out = {role.path for role in weights.budgeted(decoder, layer)}
        for tap, roles in weights.by_tap(layer, decoder.width).items():
            budgeted = roles[0].path in shared_out
            stored = manifest["statistics"]["bits"] if budgeted else manifest["attention_widths"]
            found.append(Part(i, tap, roles, tuple(stored), budgeted))
    return found


def of_experts(
    decoder: Decoder, manifest: Mapping[str, Any], allocation: Any, others: int
) -> dict[tuple[int, str], np.ndarray]:
    """Widths of what a budget is about, and one for all other parts.

    Args:
      decoder: the model.
      manifest: of its artifact.
      allocation: int [L, E], or [L, E, 2] for an expert's `gate` and `up`, and its `down`.
      others: the width of all else.
    """
    chosen = np.asarray(allocation)
    chosen = chosen[..., None] if chosen.ndim == 2 else chosen
    numbers, seen = weights.budgeted_layers(decoder), dict.fromkeys(range(len(decoder.layers)), 0)
    widths = {}
    for part in parts(decoder, manifest):
        value: Any = np.array(others)
        if part.budgeted:
            value = chosen[numbers.index(part.layer), :, min(seen[part.layer], chosen.shape[2] - 1)]
            value = value if part.experts else value[0]
            seen[part.layer] += 1
        widths[part.layer, part.tap] = value
    return widths


def to_experts(decoder: Decoder, widths: Widths) -> np.ndarray:
    """The inverse of `of_experts`: int [L, E], or [L, E, 2] where an expert's widths differ."""
    rows = []
    for i in weights.budgeted_layers(decoder):
        taps = dict.fromkeys(role.tap for role in weights.budgeted(decoder, decoder.layers[i]))
        rows.append(np.stack([np.atleast_1d(widths[i, str(tap)]) for tap in taps], axis=-1))
    both = np.stack(rows)
    return both[..., 0] if (both == both[..., :1]).all() else both


def allocate(
    decoder: Decoder,
    manifest: Mapping[str, Any],
    budget: float | Bytes,
    others: int,
    reserved: int = 0,
) -> dict[tuple[int, str], np.ndarray]:
    """Shares a budget out by what each part costs at each width.

    Args:
      decoder: the model.
      manifest: of its artifact.
      budget: average bits of what budgets are about, tables not counted, or bytes of all.
      others: the width of what a budget in bits is not about.
      reserved: bytes of a budget in bytes that go to something else.

    Raises:
      ValueError: if the budget is less than the least or more than the most that is stored.
    """
    every = parts(decoder, manifest)
    in_bytes = isinstance(budget, Bytes)
    mine = [part for part in every if in_bytes or part.budgeted]
    stored = sorted({k for part in mine for k in part.widths})
    cost, size = (np.concatenate(a) for a in _programme(mine, manifest, stored, in_bytes))
    possible = np.where(np.isfinite(cost), size, size.max(axis=1, keepdims=True))
    low = int(possible.min(axis=1).sum())
    high = int(np.where(np.isfinite(cost), size, 0).max(axis=1).sum())
    if isinstance(budget, Bytes):
        fixed = manifest["statistics"]["plain_bytes"] + reserved
        total = budget.limit - fixed
        if total < low:
            raise ValueError(
                f"a budget of {budget.limit} bytes is not feasible: this artifact is served from "
                f"{fixed + low} to {fixed + high} bytes"
            )
    else:
        count = sum(part.weights() * (part.experts or 1) for part in mine)
        if not low <= budget * count * (1 + 1e-12) <= high * (1 + 1e-9):
            raise ValueError(
                f"budget {budget} is not feasible: widths {tuple(stored)} allow "
                f"{low / count:g} to {high / count:g} bits on average"
                + (f"; if it is bytes, write {budget:.0f}B" if budget > 64 else "")
            )
        total = min(high, math.floor(budget * count * (1 + 1e-12)))
    chosen = share_out(cost, size, total)
    _tell_if_slight(cost, size, chosen)
    widths = {(part.layer, part.tap): np.array(others) for part in every}
    first = 0
    for part in mine:
        own = np.array(stored)[chosen[first : first + (part.experts or 1)]]
        widths[part.layer, part.tap] = own if part.experts else own[0]
        first += part.experts or 1
    return widths


def _programme(mine, manifest, stored, in_bytes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Costs and sizes [E, widths] of parts, a cost infinite where a part lacks the width."""
    cost, size = [], []
    for part in mine:
        own = np.full((part.experts or 1, len(stored)), np.inf)
        own[:, [stored.index(k) for k in part.widths]] = costs(manifest, part)
        each = [
            part.bytes(k, manifest["group_size"]) if in_bytes else k * part.weights()
            for k in stored
        ]
        cost.append(own)
        size.append(np.broadcast_to(np.array(each), own.shape))
    return cost, size


def costs(manifest: Mapping[str, Any], part: Part) -> np.ndarray:
    """What a part costs at each of its widths, nats a token: [E, widths], E 1 unless routed.

    Its divergence at one width was measured for all experts at once; experts and widths share it
    as the squares of the changes that they make to what the part gives.
    """
    measured = manifest["statistics"]["parts"][part.layer][part.tap]
    squared = np.atleast_2d(np.array(measured["squared"], np.float64))
    # What calibration hardly reached, or rounding left nothing of, costs a little all the same.
    squared = np.maximum(squared, 0) + 1e-6 * np.abs(squared).max()
    probed = squared[:, part.widths.index(measured["width"])].sum()
    cost = max(measured["divergence"], 1e-9) * squared / max(probed, 1e-30)
    return np.minimum.accumulate(cost, axis=1)


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
    return _filled(cost, size, total, np.argmax(np.where(usable, x.value, -1), axis=1))


def _filled(cost, size, total, chosen) -> np.ndarray:
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


def _tell_if_slight(cost: np.ndarray, size: np.ndarray, chosen: np.ndarray) -> None:
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


def statistics(manifest: Mapping[str, Any], most: int) -> pmq.ExpertStatistics:
    """What the published rule goes by, of widths up to `most`."""
    kept = manifest["statistics"]
    bits = tuple(k for k in kept["bits"] if k <= most)
    return pmq.ExpertStatistics(
        frequency=np.array(kept["frequency"]),
        routing_weight=np.array(kept["routing_weight"]),
        error=np.array(kept["error"])[..., : len(bits)],
        bits=bits,
    )


def published(manifest: Mapping[str, Any], budget: float) -> np.ndarray:
    """Each expert's width [L, E] by the published rule, `mcjax.pmq`, of widths 1 to 3.

    A layer that has one expert shares with the other layers.
    """
    stats = statistics(manifest, 3)
    scope = "model" if stats.frequency.shape[1] == 1 else "layer"
    return pmq.allocate(stats, budget, scope)


def predicted_loss(decoder: Decoder, manifest: Mapping[str, Any], widths: Widths) -> float:
    """What all parts cost together at some widths, nats a token."""
    total = 0.0
    for part in parts(decoder, manifest):
        cost, own = costs(manifest, part), np.atleast_1d(widths[part.layer, part.tap])
        total += sum(cost[e, part.widths.index(int(k))] for e, k in enumerate(own))
    return float(total)
