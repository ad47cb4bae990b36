"""Which weight gets how many bits: one programme over all that differs.

A *part* of a layer is its weights that multiply the same input, such as `gate` and `up`, or `down`,
or `qkv`; each routed expert has its own. An artifact tells what each part at each width k costs,
L_ik nats a token of divergence from the model as it was, see `mcjax.sensitivity`. Widths then

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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcjax import pmq, tables
from mcjax.bitplane import padded, resolve_group_size
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.weights import Role
from mcjax.programme import Bytes, solve

POLICIES = ("loss", "paper")

Widths = Mapping[tuple[int, str], np.ndarray]
"""Each part's width by its layer and tap: int [E] for routed experts', else int []."""


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


def nearest(decoder: Decoder, manifest: Mapping[str, Any], widths: Widths) -> dict[int, int]:
    """The stored width next to the average of each layer that a budget is about."""
    stored, found = np.array(manifest["statistics"]["bits"]), {}
    for i in weights.budgeted_layers(decoder):
        roles = weights.budgeted(decoder, decoder.layers[i])
        means = [np.mean(widths[i, str(role.tap)]) for role in roles]
        mean = np.average(means, weights=[math.prod(role.shape) for role in roles])
        found[i] = int(stored[np.argmin(np.abs(stored - mean))])
    return found


def stored_at(stored: Sequence[int], k: int) -> int:
    """A weight's width where all are to have k bits: the widest stored up to k, else the least."""
    return max((own for own in stored if own <= k), default=min(stored))


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
    chosen = solve(
        cost,
        size,
        budget,
        widths=stored,
        count=sum(part.weights() * (part.experts or 1) for part in mine),
        fixed=manifest["statistics"]["plain_bytes"] + reserved,
    )
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


LEAST = 0.25
"""An expert costs at least this share of what its squared error suggests."""


def costs(manifest: Mapping[str, Any], part: Part) -> np.ndarray:
    """What a part costs at each of its widths, nats a token: [E, widths], E 1 unless routed.

    What was measured at the end of the model, see `mcjax.sensitivity`, is a sample, in which few
    tokens or none may meet a rare expert. The square of the change that an expert makes to what its
    layer gives rests on all calibration tokens, so costs shared out by that bound it from below.
    """
    measured = manifest["statistics"]["parts"][part.layer][part.tap]
    cost = np.array(measured["cost"], np.float64)
    if part.experts:
        squared = np.maximum(np.array(measured["squared"], np.float64), 0) + 1e-30
        cost = np.maximum(cost, LEAST * cost.sum(axis=0) * squared / squared.sum(axis=0))
    # What a width is measured to cost a wider one may not: then the narrower one costs that too.
    return np.maximum.accumulate(np.maximum(cost, 1e-15)[:, ::-1], axis=1)[:, ::-1]


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
