"""Parameters of a `LanguageModel` from an artifact: at a budget, for drafts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mcjax import sharding
from mcjax.allocate import Widths, nearest
from mcjax.bitplane import BitPlanes, MixedPlanes, draft_widths, empty, places
from mcjax.checkpoint import INTERCEPT, ArtifactReader, unflatten
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.weights import Role
from mcjax.odp import PruningStatistics
from mcjax.ops import Places, layout
from mcjax.sharding import Sharding
from mcjax.tables import num_rows


def read_rest(reader: ArtifactReader, shared: Sharding | None = None) -> dict[str, Any]:
    """Parameters outside the layers; for a mesh on this host, see `read_layers`."""
    names = list(reader.manifest["checksums"]["rest"])
    values = reader.read(("rest", name, None) for name in names)
    made = unflatten(dict(zip(names, values, strict=True)))
    return jax.device_put(made) if shared is None else made


class _Room:
    """Arrays to be filled as chunks are read: requests, and where each answer goes.

    Arrays begin where a device that shares the host's memory can take them over without a copy.
    """

    def __init__(self, reader: ArtifactReader):
        self.reader = reader
        self.pending: list[tuple[tuple[str, str, int | None], np.ndarray]] = []

    def empty(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        raw = np.empty(size + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + size].view(dtype).reshape(shape)

    def fill(self, layer: int, leaf: str, row: int | None, place: np.ndarray) -> None:
        """Asks for a chunk of layer `layer`, to be put into `place`."""
        self.pending.append(((f"layers/{layer}", leaf, row), place))

    def read(self) -> None:
        """Reads what was asked for."""
        asked, self.pending = self.pending, []
        values = self.reader.read(request for request, _ in asked)
        for (_, place), value in zip(asked, values, strict=True):
            place[...] = value


def read_layers(
    reader: ArtifactReader, widths: Widths, shared: Sharding | None = None
) -> dict[str, Any]:
    """Parameters of all layers, stacked as a `LanguageModel` has them.

    Args:
      reader: of the artifact.
      widths: of each part.
      shared: a mesh that they are to be placed on. Then they are arrays of this host, and of
        experts a process reads those of its own devices; memory for others is never touched.
    """
    decoder, room = reader.decoder, _Room(reader)
    params: dict[str, Any] = {}
    by_layer: dict[int, list[Callable]] = {i: [] for i in range(len(decoder.layers))}
    apart = shared is not None and shared.expert is not None
    places_of = sharding.places(decoder, widths, shared) if shared and apart else {}
    for member in weights.members(decoder):
        mine = member.numbers
        paths = {role.path for role in weights.budgeted(decoder, member.layer)}
        spread = None
        if shared is not None and mine[0] in places_of:
            of_experts = np.stack([places_of[i] for i in mine])
            spread = Spread(shared, of_experts)
            where = Places(place=jnp.asarray(of_experts), axis=str(shared.expert))
            weights.put(params, member.path + weights.PLACES, where)
        for role in weights.roles(member.layer, decoder.width):
            own = widths_of(mine, role, widths)
            if role.tap is None:
                by_expert = spread if weights.EXPERT in role.axes else None
                made, fills = _plain(room, role, mine, by_expert)
            elif role.path in paths or np.ptp(own):
                made, fills = _mixed(room, role, mine, own, spread if role.routed else None)
            else:
                made, fills = _uniform(room, role, mine, int(own.flat[0]))
            weights.put(params, member.path + role.path, made)
            for i, fill in zip(mine, fills, strict=True):
                by_layer[i].append(fill)
    for fills in by_layer.values():  # by layers, which bounds what is read at once
        for fill in fills:
            fill()
        room.read()
    correct(reader, params, nearest(reader.decoder, reader.manifest, widths))
    return layout.put(params) if shared is None else params


class Spread(NamedTuple):
    """Experts' places on a mesh: of some layers int [R, E]."""

    shared: Sharding
    place: np.ndarray

    @classmethod
    def of(cls, block: Any, shared: Sharding | None) -> Spread | None:
        """The places in some layers' parameters of their experts; None if all are everywhere."""
        places = block.get(weights.PLACES[-1])
        return None if shared is None or places is None else cls(shared, np.asarray(places.place))

    @property
    def devices(self) -> int:
        """How many share experts."""
        return self.shared.size(self.shared.expert)

    @property
    def total(self) -> int:
        """Places of all devices together."""
        return -(-self.place.shape[1] // self.devices) * self.devices

    def local(self, r: int, e: int) -> bool:
        """Whether this process has expert e of layer r."""
        return self.shared.is_local(int(self.place[r, e]), self.total)

    def stacks(self, widths: np.ndarray) -> tuple[dict[int, int], np.ndarray, np.ndarray]:
        """How many weights of each width a device has room for; each place's stack and slot."""
        devices, held = self.devices, np.zeros((len(widths), self.total), int)
        np.put_along_axis(held, self.place, widths, axis=1)
        stack, slot, room = np.zeros_like(held), np.zeros_like(held), {}
        for s, k in enumerate(np.unique(widths).tolist()):
            mine = held == k
            by_device = mine.reshape(len(widths), devices, -1)
            number = np.cumsum(np.swapaxes(by_device, 0, 1).reshape(devices, -1), axis=1) - 1
            number = np.swapaxes(number.reshape(devices, len(widths), -1), 0, 1)
            stack[mine], slot[mine] = s, number.reshape(held.shape)[mine]
            room[k] = int(by_device.sum(axis=(0, 2)).max())
        return room, stack.astype(np.int32), slot.astype(np.int32)


class Arrangement(NamedTuple):
    """Where weights of widths int [R, ...] lie in the stacks of `MixedPlanes`.

    Attributes:
      counts: rows of each width's stack; those of a mesh's devices one after another.
      stack: as `MixedPlanes` has it.
      slot: likewise.
      row: int [R, ...], each weight's row of its width's stack.
    """

    counts: dict[int, int]
    stack: np.ndarray
    slot: np.ndarray
    row: np.ndarray


def arrange(widths: np.ndarray, spread: Spread | None) -> Arrangement:
    """Gives weights of the widths int [R, ...] their rows."""
    if spread is None:
        stack, slot = places(widths)
        counts = {int(k): int((widths == k).sum()) for k in np.unique(widths)}
        return Arrangement(counts, stack, slot, slot)
    room, stack, slot = spread.stacks(widths)
    device = spread.place * spread.devices // spread.total
    row = np.take_along_axis(slot, spread.place, axis=1)
    row = row + device * np.vectorize(room.get)(widths)
    return Arrangement({k: spread.devices * n for k, n in room.items()}, stack, slot, row)


def correct(
    reader: ArtifactReader,
    params: Any,
    wanted: dict[int, int],
    held: dict[int, int] | None = None,
    shared: Sharding | None = None,
) -> None:
    """Multiplies norms and routers by what tuning stored for the widths wanted, if it did.

    Args:
      reader: of the artifact.
      params: of all layers; changed.
      wanted: the width of each layer that a budget is about.
      held: the widths whose factors are in `params` already; None if there are none, and `params`
        still on this host.
      shared: the mesh that `params` are on, None for one device.
    """
    if wanted == held:
        return
    sums = reader.manifest["checksums"]
    for member in weights.members(reader.decoder):
        mine = [i for i in member.numbers if i in wanted]
        for role in weights.corrected(member.layer, reader.decoder.width) if mine else ():
            names = [(f"layers/{i}", f"{role.name}.factor_{wanted[i]}", None) for i in mine]
            if any(leaf not in sums[layer] for layer, leaf, _ in names):
                continue
            plain: Any = weights.get(params, member.path + role.path)
            if held is not None:
                plain = np.stack(reader.read((f"layers/{i}", role.name, None) for i in mine))
            factor = 1 + np.stack(reader.read(names)).astype(np.float32)
            factor = factor.reshape(len(mine), *[1] * (plain.ndim - 2), -1)
            made: Any = np.asarray(plain, np.float32) * factor  # bfloat16 loses small corrections
            if held is not None:
                made = jnp.asarray(made) if shared is None else shared.place(made, P())
            weights.put(params, member.path + role.path, made)


def widths_of(layers: Sequence[int], role: Role, widths: Widths) -> np.ndarray:
    """Widths int [R, ...] of a role in some layers, the dots being experts for routed ones."""
    return np.array([widths[i, role.tap] for i in layers if role.tap is not None])


def _plain(room: _Room, role: Role, layers: Sequence[int], spread: Spread | None):
    """An array [R, ...] of the stored type, and what fills each layer's part."""
    probe = room.reader.dtype(f"layers/{layers[0]}", role.name)
    made = room.empty((len(layers), *role.shape), probe)
    if spread is not None:
        moved = np.zeros((len(layers), spread.total, *role.shape[1:]), probe)

        def fill(r, i):
            (value,) = room.reader.read([(f"layers/{i}", role.name, None)])
            moved[r, spread.place[r]] = value

        return moved, [partial(fill, r, i) for r, i in enumerate(layers)]
    return made, [partial(room.fill, i, role.name, None, made[r]) for r, i in enumerate(layers)]


def _uniform(room: _Room, role: Role, layers: Sequence[int], bits: int):
    """`BitPlanes` [R, ...] of one width, and what fills each layer's part."""
    made = _empty_planes(room, (len(layers), *role.shape), (bits,))

    def fill(r, i):
        for p in range(bits):
            room.fill(i, f"{role.name}.plane_{p}", None, made.planes[r, ..., p, :, :, :])
        room.fill(i, f"{role.name}.table_{bits}", None, made.tables[0][r])

    return made, [partial(fill, r, i) for r, i in enumerate(layers)]


def _mixed(
    room: _Room, role: Role, layers: Sequence[int], widths: np.ndarray, spread: Spread | None
):
    """`MixedPlanes` [R, ...] of the widths int [R, ...], and what fills each layer's part."""
    found = arrange(widths, spread)
    stacks = {k: _empty_planes(room, (n, *role.shape[-2:]), (k,)) for k, n in found.counts.items()}

    def fill(r, i):
        for e in np.ndindex(*widths.shape[1:]):
            if spread is not None and not spread.local(r, e[0]):
                continue
            row, own = found.row[r, *e], stacks[int(widths[r, *e])]
            number = e[0] if e else None
            for p in range(own.bits):
                room.fill(i, f"{role.name}.plane_{p}", number, own.planes[row, p])
            room.fill(i, f"{role.name}.table_{own.bits}", number, own.tables[0][row])

    where: Any = {"stack": found.stack, "slot": found.slot}
    made = MixedPlanes(stacks=tuple(stacks.values()), **where)
    return made, [partial(fill, r, i) for r, i in enumerate(layers)]


def _empty_planes(room: _Room, shape, widths) -> Any:
    recipe = room.reader.manifest
    like = jax.eval_shape(partial(empty, shape, widths, recipe["group_size"], recipe["rotated"]))
    return jax.tree.map(lambda a: room.empty(a.shape, a.dtype), like)


def read_draft_tables(
    reader: ArtifactReader,
    params: Any,
    widths: Widths,
    draft: int,
    shared: Sharding | None = None,
) -> dict[str, Any]:
    """Parameters whose experts are read at `draft` bits at most.

    Args:
      reader: of the artifact.
      params: as `read_layers` gives them; on a mesh, where `sharding.put_on` has put them.
      widths: of each part as held.
      draft: the width whose tables are read, for experts that are wider; on a mesh each process
        reads those of its own devices.
      shared: the mesh that they are on.

    Returns:
      The same arrays, not copies of them, and beside each wider stack's table that of `draft`.
    """
    decoder = reader.decoder
    params = jax.tree.map(lambda a: a, params)
    for member in weights.members(decoder):
        spread = Spread.of(weights.get(params, member.path + weights.BLOCK), shared)
        for role in weights.budgeted(decoder, member.layer):
            held = weights.get(params, member.path + role.path)
            own, stacks = widths_of(member.numbers, role, widths), []
            apart = spread if role.routed else None
            found, leaf = arrange(own, apart), f"{role.name}.table_{draft}"
            for (k, count), stack in zip(found.counts.items(), held.stacks, strict=True):
                if k > draft:
                    wider = map(tuple, np.argwhere(own == k))
                    mine = [e for e in wider if apart is None or apart.local(*e)]
                    values = reader.read(
                        (f"layers/{member.numbers[r]}", leaf, e[0] if e else None) for r, *e in mine
                    )
                    shape = (count, num_rows(draft), *stack.tables[-1].shape[2:])
                    table = np.zeros(shape, np.uint8)
                    for e, value in zip(mine, values, strict=True):
                        table[found.row[e]] = value
                    rows = None if apart is None else apart.shared.expert
                    columns = None if shared is None else shared.columns(role, table.shape[-1])
                    tables = placed(table, shared, rows, columns), stack.tables[-1]
                    stack = replace(stack, tables=tables, widths=draft_widths(k, draft))
                stacks.append(stack)
            made = replace(held, stacks=tuple(stacks), most=draft)
            weights.put(params, member.path + role.path, made)
    return params


def placed(
    array: np.ndarray, shared: Sharding | None, first: str | None, last: str | None = None
) -> jax.Array:
    """An array of this host, its first and last axis along those of a mesh, if there is one."""
    if shared is None:
        return layout.put(array)
    middle = [None] * (array.ndim - 2)
    return shared.place(array, P(first, *middle, last) if array.ndim > 1 else P(first))


def read_every_width(reader: ArtifactReader, i: int) -> dict[tuple[str, ...], BitPlanes]:
    """The planes of layer i by their paths, with the tables of all widths."""
    decoder, manifest = reader.decoder, reader.manifest
    layer, room, made = decoder.layers[i], _Room(reader), {}
    paths = {role.path for role in weights.budgeted(decoder, layer)}
    for role in weights.roles(layer, decoder.width):
        if role.tap is None:
            continue
        budgeted = role.path in paths
        bits = tuple(manifest["statistics"]["bits"] if budgeted else manifest["attention_widths"])
        planes = _empty_planes(room, role.shape, bits)
        for row in range(role.shape[0]) if role.routed else (None,):
            own = slice(None) if row is None else row
            for p in range(bits[-1]):
                room.fill(i, f"{role.name}.plane_{p}", row, planes.planes[own][..., p, :, :, :])
            for k, table in zip(bits, planes.tables, strict=True):
                room.fill(i, f"{role.name}.table_{k}", row, table[own])
        made[role.path] = planes
    room.read()
    return jax.device_put(made)


def pruning_bytes(decoder: Decoder) -> int:
    """What `read_pruning` reads: a bfloat16 vector of each routed expert."""
    blocks = [layer.block for layer in decoder.layers if isinstance(layer.block, Routed)]
    return sum(2 * block.experts * decoder.width for block in blocks)


def read_pruning(reader: ArtifactReader) -> list[PruningStatistics]:
    """What `mcjax.odp` needs of every layer of routed experts."""
    kept, layers = reader.manifest["statistics"], reader.decoder.layers
    routed = [i for i, layer in enumerate(layers) if isinstance(layer.block, Routed)]
    leaf = ".".join(INTERCEPT)
    intercepts = reader.read((f"layers/{i}", leaf, None) for i in routed)
    return [
        PruningStatistics(np.array(ratio), np.array(slope), intercept)
        for ratio, slope, intercept in zip(kept["ratio"], kept["slope"], intercepts, strict=True)
    ]
