"""A model shared out on a mesh of devices: which axis of what lies along which axis of the mesh.

Everything has *logical* axes, and rules say along which axes of the mesh these lie:

    batch    sequences: of tokens, caches, recurrent states, logits
    expert   routed experts, each whole on one device, see `mcjax.ops.exchange`
    out      output features of all other products, and of experts', see `mcjax.ops.Columns`;
             heads of attention and of its cache go with them where they divide evenly, and the
             rows of embedding and head

What has no such axis is whole on every device: norms, routers, odd sizes. The forward pass is one
`jax.shard_map`, so every collective in it stands in the code, and none moves a plane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models import weights
from mcjax.models.attention import KeyValues
from mcjax.models.decoder import Decoder, Heads, Routed
from mcjax.ops import Columns, Places

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "expert"),
    "expert": "expert",
    "out": "model",
}
"""Logical axes, and the axes of a mesh along which they lie if it has them."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """A mesh, and what lies along its axes.

    Attributes:
      mesh: of devices.
      batch: axes that share sequences.
      expert: the axis that shares experts, None if every device has all.
      out: the axis that shares output features.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    expert: str | None
    out: str | None

    def size(self, axis: str | None) -> int:
        """Devices along an axis, 1 for None."""
        return 1 if axis is None else self.mesh.shape[axis]

    def place(self, array: Any, spec: PartitionSpec) -> jax.Array:
        """An array of this host on its devices, each process putting only what its own hold."""
        return jax.make_array_from_callback(
            array.shape, NamedSharding(self.mesh, spec), lambda index: array[index]
        )

    def batch_spec(self, count: int) -> tuple[str, ...] | None:
        """The axes that so many sequences are shared out along: the most that divide them."""
        for n in range(len(self.batch), 0, -1):
            if count % math.prod(map(self.size, self.batch[:n])) == 0:
                return self.batch[:n]
        return None

    def shares_heads(self, mixer: Any) -> bool:
        """Whether heads of an attention lie along `out`, see `attention.heads_axis`."""
        if self.out is None or not isinstance(mixer, Heads):
            return False
        return mixer.kv_heads % self.size(self.out) == 0

    def is_local(self, place: int, places: int) -> bool:
        """Whether a device of this process has that one of all places for experts."""
        if self.expert is None:
            return True
        along = self.mesh.axis_names.index(self.expert)
        own = np.moveaxis(self.mesh.devices, along, 0)[place * self.size(self.expert) // places]
        return any(d.process_index == jax.process_index() for d in own.flat)


def resolve(mesh: Mesh, rules: Mapping[str, str | Sequence[str] | None] | None = None) -> Sharding:
    """A mesh with rules, `RULES` where they are not given.

    Raises:
      ValueError: for a logical axis that there is not, or an axis that the mesh lacks.
    """
    given = dict(rules or {})
    if unknown := sorted(set(given) - set(RULES)):
        raise ValueError(f"rules name {unknown}; there are {sorted(RULES)}")
    axes: dict[str, tuple[str, ...]] = {}
    for name, usual in RULES.items():
        wanted = given.get(name, usual)
        named = () if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
        missing = [axis for axis in named if axis not in mesh.shape]
        if missing and name in given:
            raise ValueError(f"rules put {name!r} along {missing}; the mesh has {mesh.axis_names}")
        axes[name] = tuple(axis for axis in named if axis in mesh.shape)
    for name in ("expert", "out"):
        if len(axes[name]) > 1:
            raise ValueError(f"rules put {name!r} along {axes[name]}: it takes one axis")
    if set(axes["out"]) & {*axes["batch"], *axes["expert"]}:
        raise ValueError(f"rules put 'out' along {axes['out']}, which shares other things: {axes}")
    expert, out = (axes[name][0] if axes[name] else None for name in ("expert", "out"))
    return Sharding(mesh=mesh, batch=axes["batch"], expert=expert, out=out)


def in_columns(sharding: Sharding, role: weights.Role) -> bool:
    """Whether a weight's output features are shared out: if they divide evenly."""
    if sharding.out is None or weights.OUT not in role.axes:
        return False
    return role.shape[role.axes.index(weights.OUT)] % sharding.size(sharding.out) == 0


def share(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """Dense parameters of a `LanguageModel` on a mesh, experts in their order.

    Args:
      decoder: the model.
      params: arrays of this host.
      sharding: the mesh.
    """
    made: dict[str, Any] = {}

    def put(path, role, value):
        if in_columns(sharding, role):
            value = Columns(weight=value, axis=str(sharding.out))
        weights.put(made, path, value)

    for role in weights.rest(decoder):
        put(role.path, role, weights.get(params, role.path))
    for member in weights.members(decoder):
        block = member.layer.block
        experts = block.experts if isinstance(block, Routed) and sharding.expert else 0
        more = -experts % sharding.size(sharding.expert)
        for role in weights.roles(member.layer, decoder.width):
            value = np.asarray(weights.get(params, member.path + role.path))
            if more and weights.EXPERT in role.axes:
                value = np.pad(value, [(0, 0), (0, more)] + [(0, 0)] * (value.ndim - 2))
            put(member.path + role.path, role, value)
        if experts:
            place = np.tile(np.arange(experts, dtype=np.int32), (len(member.numbers), 1))
            where: Any = Places(place=jnp.asarray(place), axis=str(sharding.expert))
            weights.put(made, member.path + weights.PLACES, where)
    return jax.tree.map(sharding.place, made, partition(decoder, made, sharding))


def places(decoder: Decoder, widths: Any, sharding: Sharding) -> dict[int, np.ndarray]:
    """A place for every expert, so that devices hold about equally many bytes of every stack.

    Layer by layer, of the devices that have places left an expert goes to the one where the least
    padding follows; of equals, to the one that holds the fewest of its widths.

    Args:
      decoder: the model.
      widths: of each part, see `mcjax.allocate.Widths`.
      sharding: with an axis for experts.

    Returns:
      By layers of routed experts int32 [E]; device d has places d n to d n + n - 1, with n the
      least number that suffices.
    """
    devices, found = sharding.size(sharding.expert), {}
    for member in weights.members(decoder):
        if not isinstance(member.layer.block, Routed):
            continue
        parts = [r for r in weights.roles(member.layer, decoder.width) if r.routed]
        sizes = np.array([math.prod(role.shape[1:]) for role in parts])
        room = -(-member.layer.block.experts // devices)
        held = np.zeros((len(parts), 9, devices), int)  # of each width
        each = np.arange(len(parts))
        for i in member.numbers:
            own = np.stack([widths[i, str(role.tap)] for role in parts], axis=-1)
            free = np.full(devices, room)
            found[i] = np.zeros(len(own), np.int32)
            for e in np.lexsort(own.T)[::-1]:
                here = held[each, own[e]]  # [parts, devices]
                weight = (sizes * own[e])[:, None]
                more = np.sum(weight * (here == here.max(axis=1, keepdims=True)), axis=0)
                ahead = np.sum(weight * (here - here.min(axis=1, keepdims=True)), axis=0)
                d = np.lexsort((-free, ahead, more, free == 0))[0]
                found[i][e] = d * room + room - free[d]
                free[d] -= 1
                held[each, own[e], d] += 1
    return found


def partition(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """A tree like the parameters of `PartitionSpec`s."""

    def spec(weight, expert, axis=None):
        if isinstance(weight, Columns):
            return replace(weight, weight=spec(weight.weight, expert, weight.axis))
        if isinstance(weight, MixedPlanes):
            stacks = jax.tree.map(lambda a: of_array(a, (expert,), axis), weight.stacks)
            where: Any = PartitionSpec(None, expert) if expert else PartitionSpec()
            return replace(weight, stacks=stacks, stack=where, slot=where)
        first = (None, expert) if expert else ()
        return jax.tree.map(lambda a: of_array(a, first, axis), weight)

    def of_array(a, first, axis):
        if axis is None:
            return PartitionSpec(*first)
        return PartitionSpec(*first, *[None] * (a.ndim - len(first) - 1), axis)

    def is_weight(leaf):
        return isinstance(leaf, BitPlanes | MixedPlanes | Columns)

    specs = jax.tree.map(lambda _: PartitionSpec(), params)
    for role in weights.rest(decoder):
        if isinstance(own := weights.get(params, role.path), Columns):
            weights.put(specs, role.path, replace(own, weight=PartitionSpec(own.axis)))
    for member in weights.members(decoder):
        for role in weights.roles(member.layer, decoder.width):
            path = member.path + role.path
            block = weights.get(params, member.path + weights.BLOCK)
            shared = weights.EXPERT in role.axes and weights.PLACES[-1] in block
            own = weights.get(params, path)
            expert = sharding.expert if shared else None
            made = jax.tree.map(lambda w, e=expert: spec(w, e), own, is_leaf=is_weight)
            weights.put(specs, path, made)
    return specs


def cache_partition(decoder: Decoder, cache: Any, sharding: Sharding, batch: Any) -> Any:
    """A tree like a cache of `PartitionSpec`s, sequences lying along `batch`."""
    specs = jax.tree.map(lambda _: PartitionSpec(None, batch), cache)
    for member in weights.members(decoder):
        if sharding.shares_heads(member.layer.mixer):
            heads: Any = PartitionSpec(None, batch, sharding.out)
            weights.put(specs, member.path, KeyValues(heads, heads))
    return specs
