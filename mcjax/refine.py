"""Parameters at other widths, made of planes that are held and of those that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mcjax.allocate import Widths, nearest
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.checkpoint import ArtifactReader
from mcjax.models import weights
from mcjax.models.weights import Role
from mcjax.ops import layout
from mcjax.parameters import Spread, arrange, correct, placed, widths_of
from mcjax.sharding import Sharding
from mcjax.tables import num_rows


def refine_layers(
    reader: ArtifactReader, params: Any, widths: Widths, shared: Sharding | None = None
) -> dict[str, Any]:
    """The same parameters at other widths; planes that are held stay on their device.

    Args:
      reader: of the artifact.
      params: as `read_layers` gives them; on a mesh, where `sharding.put_on` has put them.
      widths: as there.
      shared: the mesh that they are on. Experts keep their places, and a process reads what its
        own devices lack.

    Returns:
      New parameters; no array of the given ones changes.
    """
    decoder = reader.decoder
    before: dict[tuple[int, str], np.ndarray] = {}
    params = jax.tree.map(lambda a: a, params)
    for member in weights.members(decoder):
        paths = {role.path for role in weights.budgeted(decoder, member.layer)}
        of_experts = Spread.of(weights.get(params, member.path + weights.BLOCK), shared)
        for role in weights.roles(member.layer, decoder.width):
            if role.tap is None:
                continue
            after = widths_of(member.numbers, role, widths)
            planes = weights.get(params, member.path + role.path)
            planes = weights.looked_up(planes) if isinstance(planes, BitPlanes) else planes
            own, spread = planes.allocation, of_experts if role.routed else None
            if spread is not None:
                own = np.take_along_axis(own, spread.place, axis=1)
            before |= {(i, role.tap): w for i, w in zip(member.numbers, own, strict=True)}
            if (own != after).any():
                change = _Change(reader, role, member.numbers, own, after, shared, spread)
                made: Any = change.apply(planes)
                if role.path not in paths and not np.ptp(after):
                    (made,) = made.stacks  # as `read_layers` has it
                weights.put(params, member.path + role.path, made)
    wanted, held = (nearest(decoder, reader.manifest, each) for each in (widths, before))
    correct(reader, params, wanted, held, shared)
    return params


class _Change(NamedTuple):
    """Another width for weights of one role in some layers, int [R, ...] before and after."""

    reader: ArtifactReader
    role: Role
    layers: Sequence[int]
    before: np.ndarray
    after: np.ndarray
    shared: Sharding | None
    spread: Spread | None

    @property
    def row_axis(self) -> str | None:
        """The mesh axis that rows of stacks lie along."""
        return None if self.spread is None else self.spread.shared.expert

    @property
    def devices(self) -> int:
        """How many share the rows of a stack."""
        return 1 if self.spread is None else self.spread.devices

    def apply(self, held: MixedPlanes) -> MixedPlanes:
        """The planes at the widths after, made of what is held and of what is read."""
        old, new = arrange(self.before, self.spread), arrange(self.after, self.spread)
        sources, stacks = dict(zip(old.counts, held.stacks, strict=True)), []
        of_plane = held.stacks[0].planes.shape[2:]
        of_row = held.stacks[0].tables[0].shape[2:]
        for k, count in new.counts.items():
            origins = {}
            for source, rows in old.counts.items():
                both = (self.after == k) & (self.before == source)
                if not both.any():
                    continue
                origins[source] = np.full(count, -1, np.int32)
                origins[source][new.row[both]] = old.row[both] % (rows // self.devices)
            name, lacking = self.role.name, np.argwhere((self.after == k) & (self.before != k))
            each = [(tuple(e), int(new.row[tuple(e)])) for e in lacking]
            planes = self._made(
                [(sources[source].planes, origin) for source, origin in origins.items()],
                [
                    (e, f"{name}.plane_{p}", (r, p))
                    for e, r in each
                    for p in range(self.before[e], k)
                ],
                (count, k, *of_plane),
                jax.ShapeDtypeStruct(of_plane, np.uint32),
            )
            table = self._made(
                [(sources[k].tables[0], origins[k])] if k in origins else [],
                [(e, f"{name}.table_{k}", (r,)) for e, r in each],
                (count, num_rows(k), *of_row),
                jax.ShapeDtypeStruct((num_rows(k), *of_row), np.uint8),
            )
            stacks.append(replace(held.stacks[0], planes=planes, tables=(table,), widths=(k,)))
        stack, slot = (
            placed(array, self.shared, None, self.row_axis) for array in (new.stack, new.slot)
        )
        return MixedPlanes(stacks=tuple(stacks), stack=stack, slot=slot)

    def _made(self, sources, lacking, shape, chunk: jax.ShapeDtypeStruct) -> jax.Array:
        """An array of rows that are held and of chunks that are read.

        Args:
          sources: pairs of an array that is held, and for each new row the row there that it is,
            negative if none.
          lacking: of each chunk the weight's place in `after`, the leaf's name, and where it goes.
          shape: of the array, all devices' rows together.
          chunk: what a chunk is like.
        """
        count, columns = shape[0] // self.devices, None
        if self.shared is not None:
            columns = self.shared.columns(self.role, shape[-1])
        by_device: list[list] = [[] for _ in range(self.devices)]
        for e, leaf, (row, *rest) in lacking:
            by_device[row // count].append((e, leaf, (row % count, *rest)))
        most = max(map(len, by_device))
        at = np.full((self.devices, most, len(shape) - len(chunk.shape)), count, np.int32)
        values = np.zeros((self.devices, most, *chunk.shape), chunk.dtype)
        for d, mine in enumerate(by_device):
            if mine and (self.spread is None or self.spread.local(*mine[0][0])):
                requests = [
                    (f"layers/{self.layers[e[0]]}", leaf, e[1] if len(e) > 1 else None)
                    for e, leaf, _ in mine
                ]
                for n, value in enumerate(self.reader.read(requests)):
                    at[d, n], values[d, n] = mine[n][2], value
        made = _rows_together(
            [source for source, _ in sources],
            [placed(origin, self.shared, self.row_axis) for _, origin in sources],
            placed(at.reshape(-1, at.shape[-1]), self.shared, self.row_axis),
            placed(values.reshape(-1, *chunk.shape), self.shared, self.row_axis, columns),
            (count, *shape[1 : at.shape[-1]]),
            None if self.shared is None else (self.shared.mesh, self.row_axis, columns),
        )
        return layout.put(made)


@partial(jax.jit, static_argnums=(4, 5))
def _rows_together(sources, origins, at, values, shape, along):
    """Rows of arrays and values read, in new arrays; on a mesh each device's own.

    Args:
      sources: arrays [n, ...].
      origins: for each int32 [N], the row of it that a new row begins as, negative if none.
      at: int32 [M, len(shape)], where values go; outside if nowhere.
      values: [M, ...].
      shape: the first axes of what a device makes, N among them.
      along: a mesh and the axes of it that rows and columns lie along; None for one device.
    """

    def local(sources, origins, at, values):
        made = jnp.zeros((*shape, *values.shape[1:]), values.dtype)
        for source, origin in zip(sources, origins, strict=True):
            both = min(source.shape[1], made.shape[1])
            moved = source[jnp.maximum(origin, 0), :both]
            is_there = (origin >= 0).reshape(-1, *[1] * (made.ndim - 1))
            made = made.at[:, :both].set(jnp.where(is_there, moved, made[:, :both]))
        return made.at[tuple(at.T)].set(values, mode="drop")

    if along is None:
        return local(sources, origins, at, values)
    mesh, row, column = along

    def spec(ndim):
        return P(row, *[None] * (ndim - 2), column)

    arrays = [spec(source.ndim) for source in sources]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(arrays, P(row), P(row), spec(values.ndim)),
        out_specs=spec(len(shape) + values.ndim - 1),
    )(sources, origins, at, values)
