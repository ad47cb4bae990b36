"""Experts shared out among devices: rows go to the device that has their expert, and back.

Every device of a mesh axis holds equally many places for experts, and `Places` says which place
each expert has. If all devices have the same rows, each computes those of its own experts and the
sums are added up. If each has rows of its own, they are sent in *rounds*: in a round a device sends
each other one at most

    C = ceil(ROOM * rows / devices)

of its rows, so memory is bounded whatever the router does, and no row is ever dropped: a round
whose rows have all been sent already is skipped by all devices together. Rows that are not kept
are not sent. Where the platform has a ragged exchange (GPU, and TPU but for large slices of v5e)
only rows travel; elsewhere a round's whole room does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from mcjax.ops import device
from mcjax.ops.columns import within
from mcjax.ops.linear import axes_of

ROOM = 2.0
"""Rows that a round has room for, in those that an even split would send."""

Rows = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""From rows [N / K, D], their experts int [N] and which to compute bool [N] to [N, D]."""


@partial(jax.tree_util.register_dataclass, data_fields=["place"], meta_fields=["axis"])
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Places:
    """Where experts are.

    Attributes:
      place: int32 [..., E], each expert's place; device d has places ``d n`` to ``d n + n - 1``.
      axis: of the mesh.
    """

    place: jax.Array
    axis: str


def by_experts(
    places: Places,
    apply: Rows,
    count: int,
    x: jax.Array,
    index: jax.Array,
    keep: jax.Array | None = None,
) -> jax.Array:
    """Each row by its expert, wherever that is.

    Args:
      places: of the experts.
      apply: computes rows by this device's experts, numbered by their places here.
      count: places that a device has; outside of `jax.shard_map` those of all devices.
      x: [N / K, D], of which each row meets K experts in a row.
      index: int [N], the experts.
      keep: bool [N], which to compute; None for all.

    Returns:
      [N, D]; zeros where a row is not kept. If x is the same on all devices of the axis it is this
      device's part of a sum, see `total`.
    """
    place = places.place[index]
    if not within(places.axis):
        return apply(x, place, keep)
    owner, slot = place // count, place % count
    if places.axis not in axes_of(x):
        mine = owner == jax.lax.axis_index(places.axis)
        return apply(x, jnp.where(mine, slot, 0), mine if keep is None else mine & keep)
    return _exchanged(places.axis, apply, x, owner, slot, keep)


def total(places: Places, x: jax.Array, y: jax.Array) -> jax.Array:
    """Adds up what `by_experts` made of x on each device, or a sum of its rows."""
    if within(places.axis) and places.axis not in axes_of(x):
        return jax.lax.psum(y, places.axis)
    return y


def _exchanged(axis: str, apply: Rows, x, owner, slot, keep):
    devices, rows = jax.lax.axis_size(axis), owner.shape[0]
    room = min(rows, int(-(-ROOM * rows // devices)))
    owner = owner if keep is None else jnp.where(keep, owner, devices)
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    each = jnp.arange(devices, dtype=jnp.int32)
    count = jnp.sum(owner[None] == each[:, None], axis=1, dtype=jnp.int32)
    first = jnp.cumsum(count, dtype=jnp.int32) - count
    # All devices go round as often: collectives wait for each other.
    rounds = jax.lax.pmax(-(-jnp.max(count) // room), tuple(sorted(axes_of(count))))
    repeats = rows // x.shape[0]

    def one_round(y, start):
        at = start + jnp.arange(room, dtype=jnp.int32)[None]
        real = at < count[:, None]
        going = jnp.clip(count - start, 0, room)
        coming = jax.lax.all_to_all(going, axis, 0, 0, tiled=True)
        row = jnp.where(real, order[jnp.minimum(first[:, None] + at, rows - 1)], rows)
        sent = jnp.where(real[..., None], x[jnp.minimum(row, rows - 1) // repeats], 0)
        to = jnp.where(real, slot[jnp.minimum(row, rows - 1)], 0)
        to = jax.lax.all_to_all(to, axis, 0, 0, tiled=True).reshape(-1)
        came = _sent(axis, sent, going, coming).reshape(-1, x.shape[-1])
        arrived = jnp.arange(room, dtype=jnp.int32)[None] < coming[:, None]
        made = apply(came, to, arrived.reshape(-1)).reshape(devices, room, -1)
        back = _sent(axis, made, coming, going)
        return y.at[row.reshape(-1)].set(back.reshape(-1, back.shape[-1]), mode="drop")

    def step(y, number):
        def more(y):
            return one_round(y, number * room)

        return jax.lax.cond(number < rounds, more, lambda y: y, y), None

    shape = jax.eval_shape(apply, x, slot, None)
    y = jnp.zeros(shape.shape, shape.dtype) + 0 * x[:1, :1].astype(shape.dtype)
    return jax.lax.scan(step, y, jnp.arange(-(-rows // room), dtype=jnp.int32))[0]


def _sent(axis: str, values: jax.Array, going: jax.Array, coming: jax.Array) -> jax.Array:
    """Rows for every device, exchanged for those from every device.

    Args:
      axis: of the mesh.
      values: [devices, room, D], zeros beyond the rows that go.
      going: int32 [devices], how many rows go to each.
      coming: int32 [devices], how many come from each.

    Returns:
      [devices, room, D], zeros beyond the rows that came.
    """

    def whole(values, *_):
        return jax.lax.all_to_all(values, axis, 0, 0, tiled=True)

    def ragged(values, going, coming):
        devices, room = values.shape[:2]
        rows = values.reshape(devices * room, -1)
        from_here = jnp.arange(devices, dtype=jnp.int32) * room
        to_there = jnp.full(devices, jax.lax.axis_index(axis) * room, jnp.int32)
        made = jax.lax.ragged_all_to_all(
            rows, jnp.zeros_like(rows), from_here, going, to_there, coming, axis_name=axis
        )
        return made.reshape(values.shape)

    def exchanged(sizes, values):
        if not device.exchanges_raggedly(jax.sharding.get_abstract_mesh().size):
            return whole(values)
        return jax.lax.platform_dependent(values, *sizes, cpu=whole, default=ragged)

    def returned(sizes, values):  # what exchanges rows also takes their gradients back
        return exchanged(sizes[::-1], values)

    return jax.custom_derivatives.linear_call(exchanged, returned, (going, coming), values)
