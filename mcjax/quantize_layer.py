"""One layer's weights as planes, and what of them the manifest keeps.

Weights that multiply the same input make a part. A routed expert's Gram matrices are made when it
is its turn, by blocks of experts, of the inputs and the routes that calibration saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax import checkpoint
from mcjax.bitplane import BitPlanes
from mcjax.calibrate import (
    EXPERTS,
    Seen,
    expert_errors,
    expert_grams,
    pruning_statistics,
    sampled,
    use,
)
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Layer, Routed
from mcjax.quantize import quantize
from mcjax.quantize.api import CHUNK
from mcjax.work import Keep

ATTENTION_WIDTHS = (2, 3, 4, 8)
"""Of what no budget in bits is about."""

GRAM_BYTES = 1 << 29
"""What the Gram matrices of experts may take at once on a device, unless asked otherwise."""

CPU_WEIGHTS = 1 << 22
"""Weights of experts that a CPU works on at once, where several fit."""

EXPERT_WEIGHTS = ("gate", "up", "down")

ERROR_ROWS = 512
"""Calibration tokens by which an expert's errors are measured, on average: each is computed at
every width."""


class Options(NamedTuple):
    """How weights are quantised, see `mcjax.quantize`.

    Attributes:
      max_bits: planes of what budgets are about.
      group_size: input features that share a table entry, None for each weight's default.
      rotated: whether inputs are rotated.
      sweeps: rounds of descent.
      chunk: weights that are worked on at once.
      gram_bytes: what the Gram matrices of experts may take at once on a device, see
        `experts_at_once`.
    """

    max_bits: int
    group_size: int | None
    rotated: bool
    sweeps: int
    chunk: int = CHUNK
    gram_bytes: int = GRAM_BYTES

    @property
    def of_matrices(self) -> dict[str, Any]:
        """The arguments of `mcjax.quantize` that all weights share."""
        return {name: getattr(self, name) for name in ("group_size", "rotated", "sweeps", "chunk")}


Planes = dict[tuple[str, ...], Any]
"""What is quantised of a layer, by path."""


def quantize_layer(
    decoder: Decoder,
    layer: Layer,
    own: Any,
    grams: Mapping[str, jax.Array],
    seen: Sequence[Seen],
    options: Options,
    experts: Mapping[str, BitPlanes] | None = None,
    keep: Keep = lambda _, make: make(),
) -> tuple[dict[str, Any], Planes]:
    """Quantises and measures one layer.

    Args:
      decoder: the model.
      layer: the one of it.
      own: its weights, float32.
      grams: by roles' names, of inputs, from `mcjax.calibrate.observe`.
      seen: what the experts saw.
      options: how.
      experts: planes of `gate`, `up` and `down` that were made otherwise; None makes them.
      keep: keeps what is made, see `mcjax.work.keeping`.

    Returns:
      What the manifest says of it, JSON-ready, and the planes.
    """
    budgeted = weights.budgeted(decoder, layer)

    def of_role(role, bits, widths=None):
        def make():
            w, gram = weights.get(own, role.path), grams[role.name]
            return {role.name: _quantize_groups(w, bits, gram, options, widths)}

        return keep(role.name, make)[role.name]

    parts, planes = _others(decoder, layer, {role.path for role in budgeted}, of_role)
    if not budgeted:
        return {"parts": parts}, planes
    path = budgeted[0].path[:-1]
    dense = of_experts(weights.get(own, path))
    routed = isinstance(layer.block, Routed)
    if not routed:  # the one expert of its layer
        if experts is None:
            experts = {role.path[-1]: of_role(role, options.max_bits) for role in budgeted}
        dense, experts = jax.tree.map(lambda w: w[None], (dense, experts))

    def make(some, mine):
        if experts is not None:
            return jax.tree.map(lambda a: a[some], experts)
        return keep(f"experts_{some.start}_{some.stop}", partial(make_anew, some, mine))

    def make_anew(some, mine):
        activation, every = layer.block.activation, grams[EXPERTS][0]
        into, hidden = expert_grams(activation, mine, seen, some.start, every)
        raising = {name: mine[name] for name in ("gate", "up")}
        made = _quantize_alike(raising, options.max_bits, into, options)
        down = quantize(mine["down"], options.max_bits, gram=hidden, **options.of_matrices)
        return made | {"down": down}

    made, squared = _by_blocks(layer, dense, seen, make, options.gram_bytes)
    for n, tap in enumerate(dict.fromkeys(str(role.tap) for role in budgeted)):
        parts[tap] = {"squared": squared[:, n].tolist()}
    planes |= {
        (*path, name): p if routed else jax.tree.map(lambda a: a[0], p) for name, p in made.items()
    }
    frequency, weight = use(len(squared), seen)
    error = np.sqrt(squared.sum(axis=1))
    record = {"frequency": frequency, "routing_weight": weight, "error": error}
    if isinstance(layer.block, Routed):
        pruning = pruning_statistics(layer.block, dense, seen)
        record |= {"ratio": pruning.ratio, "slope": pruning.slope}
        planes[checkpoint.INTERCEPT] = pruning.intercept.astype(ml_dtypes.bfloat16)
    return {name: value.tolist() for name, value in record.items()} | {"parts": parts}, planes


def of_experts(own: Mapping[str, Any]) -> dict[str, Any]:
    """What of a network's weights each expert has: its matrices and their biases."""
    return {name: w for name, w in own.items() if name.split("_")[0] in EXPERT_WEIGHTS}


def _others(decoder, layer, budgeted, of_role) -> tuple[dict[str, Any], Planes]:
    """Parts that no budget in bits is about: attention, shared experts."""
    parts: dict[str, Any] = {}
    planes: Planes = {}
    for tap, roles in weights.by_tap(layer, decoder.width).items():
        if roles[0].path in budgeted:
            continue
        for role in roles:
            planes[role.path] = of_role(role, ATTENTION_WIDTHS[-1], ATTENTION_WIDTHS)
        parts[tap] = {}
    return parts, planes


def _quantize_groups(
    w: jax.Array, bits: int, grams: jax.Array, options: Options, widths: Sequence[int] | None = None
) -> BitPlanes:
    """Planes of a matrix whose output features have Gram matrices by groups."""
    some = jnp.moveaxis(w.reshape(w.shape[0], len(grams), -1), 1, 0)
    planes = quantize(some, bits, gram=grams, widths=widths, **options.of_matrices)
    return jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], w.shape[-1]), planes
    )


def _quantize_alike(matrices: Mapping[Any, Any], bits: int, gram: Any, options: Options) -> dict:
    """Planes of matrices [..., d_in, d_out] that multiply the same inputs.

    Their output features are quantised as one matrix's, so what the Gram matrix is made into is
    made once.
    """
    joined = jnp.concatenate([*matrices.values()], axis=-1)
    planes = quantize(joined, bits, gram=gram, **options.of_matrices)
    ends = np.cumsum([matrix.shape[-1] for matrix in matrices.values()])
    return {
        name: jax.tree.map(lambda a, m=matrix, end=end: a[..., end - m.shape[-1] : end], planes)
        for (name, matrix), end in zip(matrices.items(), ends.tolist(), strict=True)
    }


def experts_at_once(count: int, features: Sequence[int], gram_bytes: int) -> int:
    """How many of so many experts each of this process's devices works on at once, at least one.

    Args:
      count: of all experts.
      features: of their inputs and their hidden ones, which have a Gram matrix each.
      gram_bytes: what these may take.
    """
    width, hidden = features
    most = min(-(-count // jax.local_device_count()), gram_bytes // (4 * (width**2 + hidden**2)))
    if jax.default_backend() == "cpu":  # more are no quicker there, and what is made is kept
        most = min(most, CPU_WEIGHTS // (2 * width * hidden))
    return max(1, most)


def _by_blocks(layer: Layer, dense: Any, seen, make, gram_bytes: int):
    """Experts' planes on the host and `expert_errors` [E, 2, widths], some experts at a time.

    This process's devices each take a block of experts, and the next one when that is done.
    """
    count, *features = dense["gate"].shape
    step = experts_at_once(count, features, gram_bytes)
    tokens, chosen = sum(len(s.x) for s in seen), seen[0].experts.shape[1]
    share = ERROR_ROWS * count / (chosen * tokens)
    some_seen = [sampled(s, round(share * len(s.x))) for s in seen]

    def block(device, first):
        some = slice(first, first + step)
        mine = jax.tree.map(lambda w: w[some], dense)  # cut where all of them are
        with nullcontext() if device is None else jax.default_device(device):
            mine = jax.device_put(mine, device)
            made = make(some, mine)
            measure = partial(expert_errors, layer.block.activation, mine, made)
            error = np.asarray(sum(measure(batch, first) for batch in some_seen))
            return jax.device_get(made), error

    parts, errors = zip(*_on_devices(block, range(0, count, step)), strict=True)
    whole_layer = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    return whole_layer, np.concatenate(errors)


def _on_devices(function: Callable[[Any, int], Any], items: Sequence[int]) -> Iterable[Any]:
    """Results of ``function(device, item)`` in order, an item at a time on each device.

    The device is None where there is one, or where the caller has chosen it.
    """
    devices = jax.local_devices()
    chosen = jax.config.jax_default_device is not None  # type: ignore[attr-defined]
    if len(devices) == 1 or len(items) == 1 or chosen:
        return map(partial(function, None), items)
    idle: SimpleQueue = SimpleQueue()
    for device in devices:
        idle.put(device)

    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def on_one(item):
        device = idle.get()
        try:
            with jax.default_matmul_precision(precision):  # which each thread has its own of
                return function(device, item)
        finally:
            idle.put(device)

    with ThreadPoolExecutor(len(devices)) as threads:
        return list(threads.map(on_one, items))
