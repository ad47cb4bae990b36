"""What compressing a model takes: memory, disk and time, said before it begins.

Memory is what a stage holds in arrays, from shapes alone, and what XLA says that its programs need
beside their arguments, t. Of a layer of P weights, and R bytes outside of the layers, these hold

    importance of tokens    R + 4 P + t
    layers                  4 P + Gram matrices + planes + t
    what widths cost        R + 4 P + 4 P (gradients) + 4 P (another width) + planes + t
    tuning                  R + planes and tables of all layers + what layers keep for the way back

its programs, and the process itself. Time is that of each program on random numbers, times how
often it runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import calibrate, importance, passes, sensitivity, tune_artifact, vocabulary
from mcjax.bitplane import BitPlanes
from mcjax.job import Job
from mcjax.meter import Meter, Need
from mcjax.models import weights
from mcjax.models.decoder import Layer, Routed
from mcjax.process_memory import forget, process_bytes
from mcjax.quantize import api, quantize
from mcjax.quantize_layer import (
    ATTENTION_WIDTHS,
    ERROR_ROWS,
    experts_at_once,
    of_experts,
)
from mcjax.schedule import batch_of

FOUR = 4
"""Bytes of a float32."""


SINGLE = 100 << 20
"""About what programs of single operations take, and what malloc keeps of blocks that are small."""

HOLDS_ALL = ("what widths cost", "tuning")
"""Stages that hold as much whatever the windows."""


class Stage(NamedTuple):
    """A part of a run.

    Attributes:
      name: what it does.
      bytes: of memory beside the process itself, at most.
      seconds: that it takes; NaN where that was not measured.
    """

    name: str
    bytes: int
    seconds: float


class Forecast(NamedTuple):
    """What a run takes.

    Attributes:
      stages: in order.
      process: bytes of the process itself, without programs.
      disk: bytes of files beside the artifact, at most.
      artifact: bytes of the artifact.
    """

    stages: tuple[Stage, ...]
    process: int
    disk: int
    artifact: int

    @property
    def memory(self) -> int:
        """Bytes at most."""
        return self.process + max(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forecast(
    job: Job, timed: bool = True, progress: Callable[..., Any] = lambda items, **_: items
) -> Forecast:
    """What `mcjax.compress` takes on this machine.

    Args:
      job: of it.
      timed: whether to time programs, which takes about as long as a layer of each kind.
      progress: wraps the iteration over kinds of layers, called with (items, description=...).
    """
    return _forecast(job, Meter(timed), progress)


def _forecast(job: Job, meter: Meter, progress: Callable[..., Any]) -> Forecast:
    decoder = job.folder.decoder
    count, length = job.windows.shape
    kinds = {layer: _Kind(job, layer, meter) for layer in decoder.layers}
    times = Counter(decoder.layers)
    outside = job.folder.itemsize * sum(math.prod(role.shape) for role in weights.rest(decoder))
    parts: list[Callable[[_Kind], Stage]] = [
        lambda kind: kind.importance(outside),
        lambda kind: kind.quantized(),
        lambda kind: kind.costs(outside),
        *([lambda kind: kind.tuned()] if job.plan else []),
    ]
    stages: list[list[Stage]] = [[] for _ in parts]
    programs: list[set[Any]] = [set() for _ in parts]
    forget()
    process = process_bytes()
    for layer in progress(list(kinds), description="programs"):
        for part, mine, used in zip(parts, stages, programs, strict=True):
            meter.used = used
            made = part(kinds[layer])
            mine.append(made._replace(seconds=times[layer] * made.seconds))
    meter.used = programs[0]
    stages[0].append(_head(job, outside, meter))
    total = [_together(each) for each in stages]
    for n, used in enumerate(programs):
        own = SINGLE + sum(meter.known[key].program for key in used)
        total[n] = total[n]._replace(bytes=total[n].bytes + own)
    every = [kinds[layer] for layer in decoder.layers]
    if job.plan:
        kept = sum(kind.kept for kind in every)
        held = outside + sum(kind.tuning_bytes for kind in every)
        kept = kept if kept <= job.most_kept else 0
        rows = min(decoder.vocab_size, vocabulary.MOST)
        held += FOUR * rows * decoder.width
        costs = total[-2]  # measured again in the midst of it
        most = held + max(total[-1].bytes + kept, costs.bytes)
        total[-1] = total[-1]._replace(bytes=most, seconds=total[-1].seconds + costs.seconds)
    token = FOUR * decoder.width
    matter = sum(2 * count * length * kind.importances for kind in every)
    there_and_back = count * length * (len(decoder.layers) * token // 2 + 2 * token)
    layers = length * token * 2 * (count + len(job.lessons))
    layers += length * token * count * max(kind.rows_of_token for kind in every)
    layers += max(kind.gram_bytes for kind in every)
    planes = sum(_bytes(kind.planes) for kind in every)
    plain = sum(kind.plain for kind in every) * min(2, job.folder.itemsize)
    artifact = planes + plain + min(2, job.folder.itemsize) * outside // job.folder.itemsize
    disk = artifact + matter + max(there_and_back, layers)
    if job.plan:  # the layers twice, what goes on from the last, and what trains twice
        trained = sum(kind.tuning_bytes - _bytes(kind.planes) for kind in every)
        ended = length * token * (count + len(job.lessons))
        disk = max(disk, artifact + planes + matter + ended + 2 * trained)
    return Forecast(tuple(total), process, disk, artifact)


def within(job: Job, memory: int) -> Job:
    """The job, with less at once if that is needed to keep to so much memory.

    That is tokens, weights that are quantised, experts whose Gram matrices are made, and what
    layers may keep for the way back while tables train: half of them, a quarter and so on. Results
    change as little as sums of floats and samples of tokens do.

    Args:
      job: as it is usually done.
      memory: bytes, those of the process itself included.

    Raises:
      ValueError: if the least of all is still too much.
    """
    meter, tried = Meter(timed=False), {}

    def smaller(half):
        how = job.how._replace(chunk=job.how.chunk >> half, gram_bytes=job.how.gram_bytes >> half)
        tokens, most_kept = job.batch_tokens >> half, job.most_kept >> half
        made = job._replace(how=how, batch_tokens=tokens, most_kept=most_kept)
        tried[half] = _forecast(made, meter, lambda items, **_: items)
        return made, tried[half].memory <= memory

    low, high = 0, 9  # the first that fits is between them
    while low < high:
        middle = (low + high) // 2 if tried else 0
        low, high = (low, middle) if smaller(middle)[1] else (middle + 1, high)
    if low < 9:
        return smaller(low)[0]
    least = min(tried.values(), key=lambda found: found.memory)
    most = max(least.stages, key=lambda stage: stage.bytes)
    raise ValueError(
        f"{memory / 1e9:.2f} GB of memory are too few: {least.memory / 1e9:.2f} GB are the least, "
        f"for {most.name}{'' if most.name in HOLDS_ALL else '; fewer tokens in a window need less'}"
    )


def _together(stages: Sequence[Stage]) -> Stage:
    """Of several kinds of layers, or parts one after another."""
    return Stage(
        stages[0].name,
        max(stage.bytes for stage in stages),
        sum(stage.seconds for stage in stages),
    )


def _head(job: Job, outside: int, meter: Meter) -> Stage:
    """Predictions, and the gradient of a loss on them."""
    decoder, (count, length) = job.folder.decoder, job.windows.shape
    rows = min(decoder.vocab_size, vocabulary.MOST)
    norm, head = _floats(decoder.width), _floats(rows, decoder.width)
    key = jax.random.key(0)
    need = meter(
        passes._drawn_gradient, decoder, norm, head, key, _floats(1, length, decoder.width)
    )
    size, seconds = _bytes(head) + need.bytes, count * need.seconds
    if rows < decoder.vocab_size:
        kind = jnp.float32 if job.folder.itemsize == FOUR else jnp.bfloat16
        every = jax.ShapeDtypeStruct((decoder.vocab_size, decoder.width), kind)
        some = _floats(vocabulary.ASKED, decoder.width)
        need = meter(vocabulary._likeliest, decoder, norm, every, some)
        size = max(size, _bytes(every) + need.bytes)
        seconds += count / passes.TOGETHER * need.seconds
    return Stage("head", outside + size, seconds)


class _Kind:
    """A layer of some structure, as shapes."""

    def __init__(self, job: Job, layer: Layer, meter: Meter):
        self.job, self.layer, self.how, self.meter = job, layer, job.how, meter
        self.decoder = decoder = job.folder.decoder
        self.roles = list(weights.roles(layer, decoder.width))
        self.budgeted = weights.budgeted(decoder, layer)
        self.own: dict[str, Any] = {}
        for role in self.roles:
            weights.put(self.own, role.path, _floats(*role.shape))
        self.size = sum(math.prod(role.shape) for role in self.roles)
        self.plain = sum(math.prod(role.shape) for role in self.roles if role.tap is None)
        paths = {role.path for role in self.budgeted}
        self.planes = {
            role.path: self.planes_of(_floats(*role.shape), role.path in paths)
            for role in self.roles
            if role.tap is not None
        }
        self.routed = isinstance(layer.block, Routed)
        self.rows_of_token = 1
        if isinstance(layer.block, Routed) and layer.block.routing.inputs:
            self.rows_of_token = layer.block.routing.top_k
        self.importances = sum(map(importance.groups, importance.products(layer, decoder.width)))
        self.importances += 1 if self.routed else 0

    def planes_of(self, w: Any, budgeted: bool) -> BitPlanes:
        """The planes of a weight of that shape."""
        bits = self.how.max_bits if budgeted else ATTENTION_WIDTHS[-1]
        widths = None if budgeted else ATTENTION_WIDTHS
        made = partial(quantize, bits=bits, widths=widths, **self.how.of_matrices)
        return jax.eval_shape(made, w)

    def _x(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        return _floats(batch, length, self.decoder.width)

    def _outputs(self, x: Any) -> Need:
        return self.meter(tune_artifact.outputs, self.layer, self.decoder.norm_eps, self.own, x)

    def importance(self, outside: int) -> Stage:
        """The calibration text there and back."""
        (count, length), batch = self.job.windows.shape, self.job.batch
        x, eps = self._x(batch, length), self.decoder.norm_eps
        there = self._outputs(x)
        back = self.meter(importance._backward, self.layer, eps, self.own, x, x)
        size = outside + FOUR * self.size + 2 * _bytes(x) + max(there.bytes, back.bytes)
        seconds = math.ceil(count / batch) * (there.seconds + back.seconds)
        return Stage("importance of tokens", size, seconds)

    def costs(self, outside: int) -> Stage:
        """A pass there and back for each width that costs something."""
        count, length = sensitivity.shape_of(self.decoder, self.job.windows)
        batch = min(count, max(1, self.job.batch_tokens // length))
        x, eps = self._x(batch, length), self.decoder.norm_eps
        paths = tuple(role.path for roles in self._taps.values() for role in roles)
        there = self._outputs(x)
        back = self.meter(sensitivity._backward, self.layer, eps, paths, self.own, x, x)
        head = count * FOUR * min(self.decoder.vocab_size, vocabulary.MOST) * self.decoder.width
        size = outside + head // passes.TOGETHER + 2 * FOUR * self.size + self.planes_bytes
        widths = {k for p in self.planes.values() for k in p.widths if k < sensitivity.DENSE}
        made = [
            self.meter(tune_artifact._dense, planes, _parameters(planes))
            for planes in self.planes.values()
        ]
        each = math.ceil(count / batch) * (there.seconds + back.seconds)
        each += 4 * sum(need.seconds for need in made)
        seconds = len(widths) * each
        return Stage("what widths cost", size + max(there.bytes, back.bytes), seconds)

    @property
    def _taps(self) -> Mapping[str, Sequence[weights.Role]]:
        return weights.by_tap(self.layer, self.decoder.width)

    @property
    def planes_bytes(self) -> int:
        """Of planes, and tables as they are stored and as they train."""
        tables = sum(FOUR * table.size for p in self.planes.values() for table in p.tables)
        return _bytes(self.planes) + tables

    def quantized(self) -> Stage:
        """Calibrating on what the layer sees, its planes, and writing it."""
        (count, length), batch = self.job.windows.shape, self.job.batch
        x, batches = self._x(batch, length), math.ceil(count / batch)
        seeing, (grams, seen) = self.meter(calibrate.observe, *self._to_see), self._seen
        held = FOUR * self.size + (_bytes(grams) if batches > 1 else 0)
        sizes, seconds = [held + 2 * _bytes(x) + seeing.bytes], batches * seeing.seconds
        held = FOUR * self.size + _bytes(grams)
        done = 0
        for role in self.roles:
            if role.tap is None or role.routed:
                continue
            budgeted = role in self.budgeted
            need = self._of_matrices(role.shape, len(grams[role.name]), budgeted)
            sizes.append(held + done + need.bytes)
            done += _bytes(self.planes[role.path])
            seconds += need.seconds
        if self.budgeted:
            blocks = self._of_experts(seen, batches)
            sizes.append(held + done + blocks.bytes)
            seconds += blocks.seconds
        itemsize = self.job.folder.itemsize
        stored = (itemsize + min(2, itemsize)) * self.size
        sizes.append(stored + 2 * _bytes(self.planes))
        return Stage("layers", max(sizes), seconds)

    @property
    def _to_see(self) -> tuple[Any, ...]:
        """The arguments of `mcjax.calibrate.observe`."""
        batch, length = self.job.batch, self.job.windows.shape[1]
        matter = {
            role.name: _floats(batch, length, importance.groups(role))
            for role in self.roles
            if role.tap is not None and not role.routed
        }
        if self.routed:
            matter[calibrate.EXPERTS] = _floats(batch, length, 1)
        of_layer = self.layer, self.decoder.width, self.decoder.norm_eps
        return *of_layer, self.own, self._x(batch, length), matter

    @property
    def _seen(self) -> tuple[Any, Any]:
        """What it gives but for outputs."""
        given = self._to_see
        return jax.eval_shape(partial(calibrate.observe, *given[:3]), *given[3:])[1:]

    @property
    def gram_bytes(self) -> int:
        """Of sums over inputs, which lie in a file while the layer is at work."""
        return _bytes(self._seen[0])

    def _of_matrices(self, shape: tuple[int, ...], groups: int, budgeted: bool) -> Need:
        """Quantising a matrix whose output features are in groups."""
        w = _floats(groups, shape[0], shape[1] // groups)
        need = self._quantizing(w, budgeted)
        return Need(_bytes(w) + need.bytes, need.seconds)

    def _quantizing(self, w: Any, budgeted: bool) -> Need:
        planes, d_in = self.planes_of(w, budgeted), w.shape[-2]
        gram = np.broadcast_to(np.eye(d_in, dtype=np.float32), (*w.shape[:-1], d_in))
        return self.meter(
            api._quantize,
            w,
            gram if self.meter.timed else _floats(*gram.shape),
            widths=planes.widths,
            weights=api.usual_weights(planes.widths),
            group_size=planes.group_size,
            rotated=self.how.rotated,
            damping=np.float32(0.03),
            sweeps=np.int32(self.how.sweeps),
            chunk=self.how.chunk,
        )

    def _of_experts(self, seen: calibrate.Seen, batches: int) -> Need:
        """Experts' Gram matrices, planes and errors, some experts at a time."""
        path = self.budgeted[0].path[:-1]
        every = {role.path[-1]: role.shape for role in self.roles if role.path[:-1] == path}
        every = of_experts(every)
        if not self.routed:
            every = {name: (1, *shape) for name, shape in every.items()}
        count, *features = every["gate"]
        step = experts_at_once(count, features, self.how.gram_bytes)
        mine = {name: _floats(step, *shape[1:]) for name, shape in every.items()}
        activation, blocks = self.layer.block.activation, math.ceil(count / step)
        devices = min(blocks, jax.local_device_count())  # each has a block at a time
        turns = math.ceil(blocks / devices)
        tokens, chosen = seen.experts.shape
        spread = (np.arange(tokens * chosen, dtype=np.int32) % count).reshape(tokens, chosen)
        seen = calibrate.Seen(seen.x, spread, *(_floats(*a.shape) for a in seen[2:]))
        planes = {name: self.planes_of(mine[name], True) for name in ("gate", "up", "down")}
        rows = max(1, min(tokens, round(ERROR_ROWS * count / (chosen * batches))))
        some = jax.tree.map(
            lambda a: a[:rows] if isinstance(a, np.ndarray) else _floats(rows, *a.shape[1:]), seen
        )
        first = np.int32(0)
        errors = self.meter(calibrate.expert_errors, activation, mine, planes, some, first)
        made = sum(map(math.prod, every.values())) / sum(w.size for w in mine.values())
        held = int(2 * made * _bytes(planes))  # on the host, of all experts, in parts and joined
        sizes = [_bytes(planes) + batches * _bytes(some) + errors.bytes]
        seconds = turns * batches * errors.seconds
        if not self.routed:
            return Need(held + max(sizes), seconds)
        grams = tuple(_floats(step, size, size) for size in features)
        adding = self.meter(calibrate._add_expert_grams, activation, mine, seen, first, grams)
        raising = _floats(step, features[0], 2 * features[1])
        up, down = self._quantizing(raising, True), self._quantizing(mine["down"], True)
        sizes += [_bytes(grams) + _bytes(seen) + adding.bytes]
        sizes += [_bytes(grams) + max(_bytes(raising) + up.bytes, up.bytes + down.bytes)]
        pruning = self.meter(calibrate._lower_ranked, self.layer.block, self._experts, seen)
        seconds += turns * (batches * adding.seconds + up.seconds + down.seconds)
        size = max(devices * (_bytes(mine) + max(sizes)), _bytes(seen) + pruning.bytes)
        return Need(held + size, seconds + batches * pruning.seconds)

    @property
    def _experts(self) -> Any:
        return of_experts(weights.get(self.own, weights.EXPERTS))

    def tuned(self) -> Stage:
        """Steps of tuning, but for what all layers hold together."""
        steps = sum(setting.steps for setting in self.job.plan)
        x, eps = self._of_a_step, self.decoder.norm_eps
        there = self.meter(tune_artifact._forward, self.layer, eps, self.own, x)
        back = self._way_back
        behind = self.meter(tune_artifact._way_back, back, x)
        seconds = there.seconds + behind.seconds
        for role in self.roles:
            if role.tap is None:
                continue
            planes = self.planes[role.path]
            change, table = _floats(*role.shape), _parameters(planes)
            seconds += self.meter(tune_artifact._dense, planes, table).seconds
            seconds += self.meter(tune_artifact._table_gradient, planes, table, change).seconds
        size = 2 * FOUR * self.size + max(there.bytes, behind.bytes)
        return Stage("tuning", size, steps * seconds)

    @property
    def _of_a_step(self) -> jax.ShapeDtypeStruct:
        length = self.job.windows.shape[1]
        return self._x(batch_of(length), length)

    @property
    def _way_back(self) -> Any:
        forward = partial(tune_artifact._forward, self.layer, self.decoder.norm_eps)
        return jax.eval_shape(forward, self.own, self._of_a_step)[1]

    @property
    def kept(self) -> int:
        """Bytes that a step keeps for the way back."""
        return _bytes(self._way_back)

    @property
    def tuning_bytes(self) -> int:
        """Planes, tables as they are stored, and as they train with two moments of each."""
        tables = sum(3 * FOUR * table.size for p in self.planes.values() for table in p.tables)
        return _bytes(self.planes) + tables


def _parameters(planes: BitPlanes) -> Any:
    """What trains of the table of the widest width."""
    return jax.eval_shape(tune_artifact.tables_lib.to_parameters, planes.tables[-1])
