"""What tuning trains, step by step: settings, and the widths that their steps have.

A *setting* has one width for what budgets are about and one for all else, from the widest down. The
last has budgets, each shared out as serving does, and all widths by turns. See
`mcjax.tune_artifact`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mcjax import allocate
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.notes import Note

STEPS = {1: 16, 2: 64, 3: 40, 4: 28}
"""Steps that train each width alone, in a model of `WEIGHTS` weights in planes or more."""

WIDE_STEPS = 24
"""Those of widths that are not named there."""

MIXED_STEPS = 112
"""Steps that train budgets and all widths by turns."""

MIXED_RATE = 0.5
"""Their learning rates, in those of the widths."""

BUDGETS = (1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5)
"""Those of them that lie between the least and the greatest width."""

WEIGHTS = 1e8
"""A smaller model takes as many times more steps and text, in about the same time."""

MOST_TIMES = 8
"""At most so many times more."""

STEP_TOKENS = 1024
"""About how many tokens a step learns from."""

Path_ = tuple[str, ...]


class Setting(NamedTuple):
    """What a few steps train.

    Attributes:
      budgeted: width of the weights that a budget is about; None for `budgets`.
      others: widths of all else, which take turns; with `budgets` what these are served with.
      steps: how many.
      budgets: average bits, which take turns with all widths.
    """

    budgeted: int | None
    others: tuple[int, ...]
    steps: int
    budgets: tuple[float, ...] = ()

    def rate(self, step: int) -> float:
        """Of the greatest learning rates the share that step 0, 1, ... takes."""
        most, warm = MIXED_RATE if self.budgets else 1.0, max(2, self.steps // 20)
        if step < warm:
            return most * (step + 1) / warm
        part = (step - warm) / max(1, self.steps - warm)
        return most * (0.05 + 0.475 * (1 + math.cos(math.pi * part)))


def settings(
    decoder: Decoder, widths: Sequence[int], others: Sequence[int], usual: int
) -> tuple[Setting, ...]:
    """The settings of an artifact, in order: from the widest down, then all.

    Args:
      decoder: the model.
      widths: of what budgets are about.
      others: of all else.
      usual: at which all else is served unless asked otherwise.
    """
    times, found = times_of(decoder), []
    for k in sorted(widths, reverse=True):
        both = (usual, k) if k in others and k != usual else (usual,)
        found.append(Setting(k, both, round(times * STEPS.get(k, WIDE_STEPS))))
    between = tuple(b for b in BUDGETS if min(widths) < b < max(widths))
    if between:
        found.append(Setting(None, (usual,), round(times * MIXED_STEPS), between))
    return tuple(found)


def times_of(decoder: Decoder) -> float:
    """How many times the steps and text of a model of `WEIGHTS` weights or more this one takes."""
    count = sum(
        math.prod(role.shape)
        for layer in decoder.layers
        for role in weights.roles(layer, decoder.width)
        if role.tap is not None
    )
    return min(MOST_TIMES, max(1.0, WEIGHTS / count))


class Turn(NamedTuple):
    """The widths that a step has.

    Attributes:
      widths: of each layer's weights by path, one or int [E].
      factors: by layer, which width's norms and routers it takes.
    """

    widths: list[dict[Path_, np.ndarray]]
    factors: dict[int, int]


def turns(decoder: Decoder, manifest: Mapping[str, Any], setting: Setting) -> list[Turn]:
    """What the steps of a setting take turns in, for an artifact of such a manifest."""
    shape = np.shape(manifest["statistics"]["frequency"])
    pairs = [(setting.budgeted, other) for other in setting.others]
    if setting.budgets:
        widths, (usual, *_) = manifest["statistics"]["bits"], setting.others
        stored = manifest["attention_widths"]
        pairs = [(k, other) for k in widths for other in {usual, k if k in stored else usual}]
    every = [allocate.of_experts(decoder, manifest, np.full(shape, k), other) for k, other in pairs]
    with warnings.catch_warnings(action="ignore", category=Note):  # of even widths being as good
        every += [
            allocate.allocate(decoder, manifest, budget, setting.others[0])
            for budget in setting.budgets
        ]
    return [turn_of(decoder, manifest, widths) for widths in every]


def turn_of(decoder: Decoder, manifest: Mapping[str, Any], widths: allocate.Widths) -> Turn:
    """A step's widths from those of parts, see `mcjax.allocate`."""
    of_layers = [
        {
            role.path: np.asarray(widths[i, str(role.tap)])
            for role in weights.roles(layer, decoder.width)
            if role.tap is not None
        }
        for i, layer in enumerate(decoder.layers)
    ]
    return Turn(of_layers, allocate.nearest(decoder, manifest, widths))


def windows_wanted(every: Sequence[Setting], length: int) -> int:
    """How many windows of so many tokens settings learn from, none twice in one setting."""
    return batch_of(length) * max(setting.steps for setting in every)


def batch_of(length: int) -> int:
    """How many windows of so many tokens make a step."""
    return max(1, STEP_TOKENS // length)
