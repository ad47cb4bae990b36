"""A model shared out on a mesh of devices: which axis of what lies along which axis of the mesh.

Everything has *logical* axes, and rules say along which axes of the mesh these lie:

    batch    sequences: of tokens, caches, recurrent states, logits
    expert   routed experts, each whole on one device, see `mcjax.ops.exchange`
    out      output features of all other products, and of experts', see `mcjax.ops.Columns`;
             heads of attention and of its cache go with them where they divide evenly, and the
             rows of embedding and head
Dense weights that train may be *fully* shared out besides: their input features lie along all axes
that share sequences, and each layer's are put together when it is its turn, see
`mcjax.ops.Fragment`.

What has no such axis is whole on every device: norms, routers, odd sizes. The forward pass is one
`jax.shard_map`, so every collective in it stands in the code, and none moves a plane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models import weights
from mcjax.models.attention import KeyValues
from mcjax.models.decoder import Decoder, Heads, Routed
from mcjax.ops import Adapted, Columns, Fragment, Places, layout

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
      fully: whether dense weights' input features lie along `batch`.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    expert: str | None
    out: str | None
    fully: bool = False

    def size(self, *axes: str | None) -> int:
        """Devices along axes, 1 for None."""
        return math.prod(self.mesh.shape[axis] for axis in axes if axis is not None)

    def place(self, array: Any, spec: P) -> jax.Array:
        """An array of this host on its devices, each process putting only what its own hold."""
        where = layout.row_by_row(array, NamedSharding(self.mesh, spec))
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    def batch_spec(self, count: int) -> tuple[str, ...] | None:
        """The axes that so many sequences are shared out along: the most that divide them."""
        for n in range(len(self.batch), 0, -1):
            if count % self.size(*self.batch[:n]) == 0:
                return self.batch[:n]
        return None

    def shares_heads(self, mixer: Any) -> bool:
        """Whether heads of an attention lie along `out`, see `attention.heads_axis`."""
        if self.out is None or not isinstance(mixer, Heads):
            return False
        return mixer.kv_heads % self.size(self.out) == 0

    def columns(self, role: weights.Role, count: int) -> str | None:
        """The axis that a weight's output features, so many, lie along: `out` if it can be."""
        if self.out is None or weights.OUT not in role.axes:
            return None
        return self.out if count % self.size(self.out) == 0 else None

    def is_local(self, place: int, places: int) -> bool:
        """Whether a device of this process has that one of all places for experts."""
        if self.expert is None:
            return True
        along = self.mesh.axis_names.index(self.expert)
        own = np.moveaxis(self.mesh.devices, along, 0)[place * self.size(self.expert) // places]
        return any(d.process_index == jax.process_index() for d in own.flat)


def resolve(
    mesh: Mesh,
    rules: Mapping[str, str | Sequence[str] | None] | None = None,
    fully: bool = False,
) -> Sharding:
    """A mesh with rules, `RULES` where they are not given; `fully` as in `Sharding`.

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
    return Sharding(mesh=mesh, batch=axes["batch"], expert=expert, out=out, fully=fully)


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


def divided(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """Parameters whose leaves say how they are shared out: `Columns`, `Fragment`, `Places`.

    Args:
      decoder: the model.
      params: of a `LanguageModel`. Experts that have no places yet are in their order.
      sharding: of the mesh.

    Raises:
      ValueError: for adapters of experts that are shared out.
    """
    made = jax.tree.map(lambda leaf: leaf, params, is_leaf=_is_weight)
    cut = sharding.batch if sharding.fully else ()

    def divide(role, leaf, own):
        if isinstance(leaf, Adapted):
            if role.routed and sharding.expert is not None:
                raise ValueError(
                    f"{role.name} has adapters, whose experts are in their order and not where the "
                    "mesh has them; share experts out along no axis (rules={'expert': None})"
                )
            return replace(leaf, weight=divide(role, leaf.weight, own))
        count = role.shape[role.axes.index(weights.OUT)] if weights.OUT in role.axes else 0
        by_columns = sharding.columns(role, count) is not None
        axes = tuple(axis for axis in own if sharding.size(axis) > 1)
        if axes and weights.IN in role.axes and not isinstance(leaf, BitPlanes | MixedPlanes):
            at = role.axes.index(weights.IN) - len(role.axes)
            if role.shape[at] % sharding.size(*axes) == 0:
                leaf = Fragment(part=leaf, axes=axes, at=at)
        return Columns(weight=leaf, axis=str(sharding.out)) if by_columns else leaf

    for role in weights.rest(decoder):
        leaf = weights.get(params, role.path)
        weights.put(made, role.path, divide(role, leaf, cut))
    for member in weights.members(decoder):
        for role in weights.roles(member.layer, decoder.width):
            path, own = member.path + role.path, cut
            if weights.EXPERT in role.axes:
                own = tuple(axis for axis in own if axis != sharding.expert)
            weights.put(made, path, divide(role, weights.get(params, path), own))
        block = weights.get(made, member.path + weights.BLOCK)
        if isinstance(member.layer.block, Routed) and sharding.expert is not None:
            count = len(member.numbers), member.layer.block.experts
            order = jnp.broadcast_to(jnp.arange(count[1], dtype=jnp.int32), count)
            block.setdefault(weights.PLACES[-1], Places(place=order, axis=sharding.expert))
    return made


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, BitPlanes | MixedPlanes | Columns | Fragment | Adapted)


def put_on(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """Parameters of this host on the devices of a mesh.

    Experts that do not divide evenly are filled up with zeros, unless they have places already.
    """
    params = jax.tree.map(lambda leaf: leaf, params, is_leaf=_is_weight)
    for member in weights.members(decoder):
        block = weights.get(params, member.path + weights.BLOCK)
        if not isinstance(member.layer.block, Routed) or weights.PLACES[-1] in block:
            continue
        more = -member.layer.block.experts % sharding.size(sharding.expert)
        for role in weights.roles(member.layer, decoder.width):
            if more and weights.EXPERT in role.axes:
                value = np.asarray(weights.get(params, member.path + role.path))
                value = np.pad(value, [(0, 0), (0, more)] + [(0, 0)] * (value.ndim - 2))
                weights.put(params, member.path + role.path, value)
    return jax.tree.map(
        lambda leaf, where: sharding.place(leaf, where.spec),
        params,
        shardings(decoder, params, sharding),
    )


def shardings(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """A tree like the parameters of `NamedSharding`s."""
    specs = partition(decoder, divided(decoder, params, sharding), sharding)
    named = jax.tree.map(partial(NamedSharding, sharding.mesh), specs)

    def plain(leaf):
        while isinstance(leaf, Columns | Fragment):
            leaf = leaf.weight if isinstance(leaf, Columns) else leaf.part
        return replace(leaf, weight=plain(leaf.weight)) if isinstance(leaf, Adapted) else leaf

    named = jax.tree.map(plain, named, is_leaf=_is_weight)
    for member in weights.members(decoder):  # what `divided` added
        if weights.PLACES[-1] not in weights.get(params, member.path + weights.BLOCK):
            weights.get(named, member.path + weights.BLOCK).pop(weights.PLACES[-1], None)
    return named


def partition(decoder: Decoder, params: Any, sharding: Sharding) -> Any:
    """A tree like `divided` parameters of `PartitionSpec`s."""

    def spec(leaf, expert, axis=None):
        first = (None, expert) if expert else ()
        if isinstance(leaf, Columns):
            return replace(leaf, weight=spec(leaf.weight, expert, leaf.axis))
        if isinstance(leaf, Adapted):
            own = jax.tree.map(lambda _: P(*first), leaf)
            return replace(own, weight=spec(leaf.weight, expert))
        if isinstance(leaf, MixedPlanes):
            stacks = jax.tree.map(lambda a: of_array(a, (expert,), axis), leaf.stacks)
            where: Any = P(*first)
            return replace(leaf, stacks=stacks, stack=where, slot=where)
        if isinstance(leaf, Fragment):
            return replace(leaf, part=of_array(leaf.part, first, axis, leaf))
        return jax.tree.map(lambda a: of_array(a, first, axis), leaf)

    def of_array(a, first, axis, fragment=None):
        own: list[Any] = [*first, *[None] * (a.ndim - len(first))]
        if axis is not None:
            own[-1] = axis
        if fragment is not None:
            own[fragment.at] = fragment.axes
        return P(*own)

    specs = jax.tree.map(lambda _: P(), params)
    for role in weights.rest(decoder):
        leaf = weights.get(params, role.path)
        if not isinstance(leaf, Columns | Fragment):
            continue
        rows = leaf.axis if isinstance(leaf, Columns) else None  # columns of their transposes
        inner = leaf.weight if isinstance(leaf, Columns) else leaf
        own: Any = P(rows)
        if isinstance(inner, Fragment):
            part: Any = P(rows, inner.axes)
            own = replace(inner, part=part)
        weights.put(specs, role.path, replace(leaf, weight=own) if rows else own)
    for member in weights.members(decoder):
        block = weights.get(params, member.path + weights.BLOCK)
        for role in weights.roles(member.layer, decoder.width):
            path = member.path + role.path
            shared = weights.EXPERT in role.axes and weights.PLACES[-1] in block
            expert = sharding.expert if shared else None
            made = jax.tree.map(
                partial(spec, expert=expert), weights.get(params, path), is_leaf=_is_weight
            )
            weights.put(specs, path, made)
    return specs


def cache_partition(decoder: Decoder, cache: Any, sharding: Sharding, batch: Any) -> Any:
    """A tree like a cache of `P`s, sequences lying along `batch`."""
    specs = jax.tree.map(lambda _: P(None, batch), cache)
    for member in weights.members(decoder):
        if sharding.shares_heads(member.layer.mixer):
            heads: Any = P(None, batch, sharding.out)
            weights.put(specs, member.path, KeyValues(heads, heads))
    return specs
