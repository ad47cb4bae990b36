"""An artifact's tables trained end to end against the dense model, one layer dense at a time.

At each of a few *settings* the tables of the widths that it is about, and a factor of each entry of
the norms and of each expert in the routers, which goes with the layer's average width, learn to
give the dense model's predictions:

    minimise  mean_t KL(softmax(h(x_t)) || softmax(h(x'_t)))

with x the last layer's outputs in the dense model, x' those at the setting and h norm and head, for
the tokens of calibration windows, over the likeliest tokens of a large vocabulary, see
`mcjax.vocabulary`. A setting has one width for what budgets are about and one for all else, from
the widest down, and leaves tables alone that an earlier one trained. Then what each part costs is
measured anew, see `mcjax.sensitivity`, since tables that are trained make other errors. The last
setting has budgets, each shared out by that as serving does, and all widths by turns: tables learn
to do without company of their own width.

A step runs forward and back through the layers one by one. A layer's weights are made of its planes
when it is its turn, there and back, so that one layer is dense at a time, unless what all of them
need on the way back fits in `most_kept` bytes. Beside that memory holds all planes, and the tables
of all widths, the moments of those that train and the outputs of the last layer in float32.
Planes never change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax import parameters, tune, vocabulary
from mcjax import tables as tables_lib
from mcjax.allocate import stored_at
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.checkpoint import ArtifactReader
from mcjax.models import weights
from mcjax.models.attention import Context
from mcjax.models.decoder import Decoder, Layer
from mcjax.models.language_model import embed, run_layer
from mcjax.schedule import Path_, Setting, Turn, batch_of, turns

FACTOR_RATE = 0.25
"""The learning rate of factors of norms and routers, in those of tables."""

CLIP = 1.0
"""Greatest norm of a gradient."""

HEAD_STEPS = 4
"""Steps that share the likeliest tokens of a large vocabulary."""

KEEP_EVERY = 16
"""Steps after which what is trained is kept for a run that goes on."""


class Weights(NamedTuple):
    """One layer's weights.

    Attributes:
      planes: with the tables of all widths, by path.
      rest: arrays, by path.
      budgeted: the paths that a budget is about.
      corrected: the paths of `rest` that have factors for each width of those.
    """

    planes: dict[Path_, BitPlanes]
    rest: dict[Path_, jax.Array]
    budgeted: frozenset[Path_]
    corrected: tuple[Path_, ...]


def tune_artifact(
    reader: ArtifactReader,
    every: Sequence[Setting],
    windows: np.ndarray,
    target: np.ndarray,
    keep: Path,
    most_kept: int,
    measure: Callable[[State], dict[str, Any]],
    progress: Callable[..., Any],
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """Trains the tables of the widths that settings name.

    Args:
      reader: of the artifact.
      every: what to train, in order.
      windows: tokens int [N, T].
      target: float [N, T, D], what the dense model's last layer gives for them.
      keep: a file that an interrupted run goes on from.
      most_kept: bytes that what layers need on the way back may take, all of them together.
      measure: gives the manifest with what parts cost as they are trained so far; asked once,
        before the first setting that is about budgets, or at the end.
      progress: wraps the iteration over steps, called with (items, description=...).

    Returns:
      For each layer its tables uint8, by the names of their leaves, such as "….o.table_2", and what
      factors differ from 1 by, bfloat16, such as "….router.factor_2"; and what `measure` gave.
    """
    decoder = reader.decoder
    layers = [read_layer(reader, i) for i in range(len(decoder.layers))]
    outside = parameters.read_rest(reader)
    steps = [(setting, n) for setting in every for n in range(setting.steps)]
    manifests: list[dict[str, Any]] = []

    def measured():
        if not manifests:
            manifests.append(measure(state))
        return manifests[0]

    def turns_of(setting):
        return turns(decoder, measured() if setting.budgets else reader.manifest, setting)

    state = State(layers, every, turns_of)
    first = state.restore(keep)
    batch = batch_of(windows.shape[1])
    order = np.random.default_rng(0).permutation(len(windows))
    model = Model(decoder, outside, fits(decoder, state, batch, windows.shape[1], most_kept))

    @lru_cache(maxsize=1)
    def head(group):
        some = np.arange(group * HEAD_STEPS * batch, (group + 1) * HEAD_STEPS * batch)
        return vocabulary.head_of(decoder, outside, target[order[some % len(order)]])

    widths = sum(setting.steps for setting in every if not setting.budgets)
    for begin, end, what in ((0, widths, "tuning"), (widths, len(steps), "tuning budgets")):
        if first < end and begin == widths:
            measured()  # before its progress is told, since measuring tells its own
        for number in progress(range(max(first, begin), end), description=what):
            setting, n = steps[number]
            if n == 0:
                state.begin(every.index(setting))
            some = order[np.arange(number * batch, (number + 1) * batch) % len(order)]
            turn = state.turns[n % len(state.turns)]
            given = windows[some], target[some], head(number // HEAD_STEPS)
            gradients = model.gradients(state, turn, *given)[1]
            state.update(gradients, setting.rate(n), turn)
            if n + 1 == setting.steps:
                state.end()
            if (number + 1) % KEEP_EVERY == 0 or number + 1 in (widths, len(steps)):
                state.save(keep, number + 1)
    return state.stored(), measured()


def read_layer(reader: ArtifactReader, i: int) -> Weights:
    """Layer i of an artifact."""
    decoder = reader.decoder
    layer = decoder.layers[i]
    names = [role for role in weights.roles(layer, decoder.width) if role.tap is None]
    values = reader.read((f"layers/{i}", role.name, None) for role in names)
    rest = {r.path: jnp.asarray(v, jnp.float32) for r, v in zip(names, values, strict=True)}
    budgeted = frozenset(role.path for role in weights.budgeted(decoder, layer))
    corrected = weights.corrected(layer, decoder.width) if budgeted else ()
    every = parameters.read_every_width(reader, i)
    return Weights(every, rest, budgeted, tuple(role.path for role in corrected))


Tables = dict[tuple[Path_, int], Any]
"""Trees of what trains by a weight's path and a width."""


def first_tables(layer: Weights) -> Tables:
    """A layer's tables as they are stored, and factors of 1."""
    tables: Tables = {
        (path, k): tables_lib.to_parameters(table)
        for path, planes in layer.planes.items()
        for k, table in zip(planes.widths, planes.tables, strict=True)
    }
    for path in layer.corrected:
        for k in layer.planes[min(layer.budgeted)].widths:
            tables[path, k] = jnp.zeros(layer.rest[path].shape[-1])
    return tables


def dense(
    layer: Weights, tables: Tables, widths: Mapping[Path_, np.ndarray], factor: int
) -> dict[str, Any]:
    """A layer's weights.

    Args:
      layer: its planes and all else.
      tables: of the planes.
      widths: of its weights, one or int [E].
      factor: the width whose norms and routers it takes, if it has such.
    """
    own: dict[str, Any] = {}
    for path, value in layer.rest.items():
        if path in layer.corrected:
            value = value * (1 + tables[path, factor])
        weights.put(own, path, value)
    for path, of_weight in widths.items():
        total: Any = None
        for k in np.unique(of_weight).tolist():
            made = _dense(layer.planes[path].slice(k), tables[path, k])
            total = made if total is None else _chosen(of_weight == k, made, total)
        weights.put(own, path, total)
    return own


def dense_at(layer: Weights, tables: Tables, k: int) -> dict[str, Any]:
    """A layer's weights where all are to have k bits, see `mcjax.allocate.stored_at`."""
    own = {path: stored_at(planes.widths, k) for path, planes in layer.planes.items()}
    factor = own[min(layer.budgeted or own)]  # of a layer with neither, which has no factors
    return dense(layer, tables, {path: np.array(width) for path, width in own.items()}, factor)


class State:
    """Every layer's tables and factors, the optimiser's moments, and what has been trained."""

    def __init__(
        self,
        layers: Sequence[Weights],
        every: Sequence[Setting],
        turns_of: Callable[[Setting], list[Turn]],
    ):
        self.layers, self.every, self.turns_of = layers, every, turns_of
        self.turns: list[Turn] = []
        self.tables = list(map(first_tables, layers))
        self.moments: list[Tables] = [{} for _ in layers]
        self.done: set[tuple[bool, int]] = set()
        self.number = 0

    def layer(self, i: int, widths: Mapping[Path_, np.ndarray], factor: int) -> Any:
        """Layer i's weights as its tables are now, see `dense`."""
        return dense(self.layers[i], self.tables[i], widths, factor)

    def begin(self, number: int) -> None:
        """Starts a setting, whose tables have moments of their own."""
        self.number, self.turns = number, self.turns_of(self.every[number])
        again = bool(self.every[number].budgets)
        self.moments = [{} for _ in self.layers]
        for turn in self.turns:
            for i, layer in enumerate(self.layers):
                used = {(path, int(k)) for path, w in turn.widths[i].items() for k in np.unique(w)}
                used = {
                    (p, k) for p, k in used if again or (p in layer.budgeted, k) not in self.done
                }
                used |= {(path, turn.factors[i]) for path in layer.corrected}
                for one in sorted(used - set(self.moments[i])):
                    self.moments[i][one] = _ADAM.init(self.tables[i][one])

    def update(self, gradients: Sequence[Tables], rate: float, turn: Turn) -> None:
        """Takes a step along gradients of the tables in turn, a share of their greatest."""
        squares = [_square(list(of_layer.values())) for of_layer in gradients]
        norm = float(np.sqrt(sum(map(float, squares))))
        scale = min(1.0, CLIP / max(norm, 1e-30))
        for i, of_layer in enumerate(gradients):
            for (path, k), gradient in of_layer.items():
                most = rate * tune.most_rate(k)
                factor = path in self.layers[i].corrected
                rates = most * FACTOR_RATE if factor else tune.table_rates(most, k)
                table, moments = self.tables[i][path, k], self.moments[i][path, k]
                which = turn.widths[i].get(path, np.array(k)) == k
                made = _step(table, moments, gradient, scale, rates, which)
                self.tables[i][path, k], self.moments[i][path, k] = made

    def end(self) -> None:
        """Has later settings leave what this one trained."""
        for turn in self.turns:
            for layer, widths in zip(self.layers, turn.widths, strict=True):
                for path, w in widths.items():
                    self.done |= {(path in layer.budgeted, int(k)) for k in np.unique(w)}

    def stored(self) -> list[dict[str, np.ndarray]]:
        """See `tune_artifact`."""
        found: list[dict[str, np.ndarray]] = []
        for layer, tables in zip(self.layers, self.tables, strict=True):
            found.append({})
            for (path, k), one in tables.items():
                name = ".".join(path)
                if path in layer.corrected:
                    found[-1][f"{name}.factor_{k}"] = np.asarray(one.astype(jnp.bfloat16))
                else:
                    table = tables_lib.from_parameters(one, k)
                    found[-1][f"{name}.table_{k}"] = np.asarray(table)
        return found

    def save(self, keep: Path, step: int) -> None:
        """Writes all that a run goes on from, whole or not at all."""
        leaves = jax.tree.leaves([[list(d.values()) for d in self.tables], self._moments])
        with whole(keep) as aside, open(aside, "wb") as file:
            np.savez(file, step, *map(np.asarray, leaves))

    @property
    def _moments(self) -> list[list[Any]]:
        return [list(moments.values()) for moments in self.moments]

    def restore(self, keep: Path) -> int:
        """Reads what `save` wrote, if it is there; returns the step to go on with."""
        if not keep.exists():
            return 0
        with np.load(keep) as file:
            step, *leaves = (jnp.asarray(file[name]) for name in file.files)
        left = int(step)
        for number, setting in enumerate(self.every):
            self.begin(number)
            if left <= setting.steps:
                break
            left -= setting.steps
            self.end()
        like = [[list(d.values()) for d in self.tables], self._moments]
        tables, moments = jax.tree.unflatten(jax.tree.structure(like), leaves)
        for kept, new in ((self.tables, tables), (self.moments, moments)):
            for own, values in zip(kept, new, strict=True):
                own |= dict(zip(own, values, strict=True))
        if left == self.every[self.number].steps:
            self.end()
        return int(step)


_ADAM = optax.scale_by_adam(b2=0.99)


@jax.jit
def _step(table: Any, moments: Any, gradient: Any, scale, rates, which):
    """A step of the experts that have this table's width; the others' tables and moments stay."""
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    change, new = _ADAM.update(gradient, moments, table)
    moved = jax.tree.map(lambda value, d, rate: value - rate * d, table, change, rates)
    mu, nu = (_chosen(which, *pair) for pair in ((new.mu, moments.mu), (new.nu, moments.nu)))
    return _chosen(which, moved, table), new._replace(mu=mu, nu=nu)


@jax.jit
def _square(tree: Any) -> jax.Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


def fits(decoder: Decoder, state: State, batch: int, length: int, most_kept: int) -> bool:
    """Whether what all layers need on the way back takes no more bytes."""
    x, each = jax.ShapeDtypeStruct((batch, length, decoder.width), jnp.float32), {}
    for layer, held, tables in zip(decoder.layers, state.layers, state.tables, strict=True):
        if layer not in each:
            own = jax.eval_shape(partial(dense_at, held, tables, 1))
            _, back = jax.eval_shape(partial(_forward, layer, decoder.norm_eps), own, x)
            each[layer] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(back))
    return sum(each[layer] for layer in decoder.layers) <= most_kept


class Model(NamedTuple):
    """The model at a setting, run layer by layer.

    Attributes:
      decoder: its description.
      outside: parameters outside of the layers.
      keeps: whether a layer keeps what it needs on the way back; else it runs once more then.
    """

    decoder: Decoder
    outside: Any
    keeps: bool

    def gradients(
        self, state: State, turn: Turn, tokens: np.ndarray, target: np.ndarray, head: tuple
    ) -> tuple[jax.Array, list[Tables]]:
        """The divergence, and each layer's gradient by the tables that train.

        Args:
          state: of the tables.
          turn: the widths.
          tokens: int [B, T].
          target: float [B, T, D], what the dense model's last layer gives for them.
          head: from `mcjax.vocabulary.head_of`.
        """
        decoder, eps = self.decoder, self.decoder.norm_eps
        x: Any = embed(decoder, self.outside, tokens, jnp.float32)
        ways_back: list[Any] = []
        for i, layer in enumerate(decoder.layers):
            own = state.layer(i, turn.widths[i], turn.factors.get(i, 0))
            if self.keeps:
                x, back = _forward(layer, eps, own, x)
            else:
                x, back = outputs(layer, eps, own, x), x
            ways_back.append(back)
        del own
        value, change = divergence_and_gradient(decoder, *head, x, jnp.asarray(target))
        gradients: list[Tables] = [{} for _ in ways_back]
        for i in reversed(range(len(gradients))):
            back = ways_back.pop()
            if not self.keeps:
                own = state.layer(i, turn.widths[i], turn.factors.get(i, 0))
                _, back = _forward(decoder.layers[i], eps, own, back)
            of_own, change = _way_back(back, change)
            del back
            for path, widths in turn.widths[i].items():
                for k in np.unique(widths).tolist():
                    if (path, k) not in state.moments[i]:
                        continue
                    gradient = _table_gradient(
                        state.layers[i].planes[path].slice(k),
                        state.tables[i][path, k],
                        weights.get(of_own, path),
                    )
                    nothing = jax.tree.map(jnp.zeros_like, gradient)
                    gradients[i][path, k] = _chosen(widths == k, gradient, nothing)
            for path in state.layers[i].corrected:
                own_change = weights.get(of_own, path) * state.layers[i].rest[path]
                gradients[i][path, turn.factors[i]] = jnp.sum(
                    own_change, axis=tuple(range(own_change.ndim - 1))
                )
            del of_own
        return value, gradients


@jax.jit
def _chosen(which: jax.Array, one: Any, other: Any) -> Any:
    """Of arrays [E, ...] those of the experts that bool [E] says, or of all if it is one thing."""

    def of_leaf(a, b):
        return jnp.where(jnp.reshape(which, which.shape + (1,) * (a.ndim - which.ndim)), a, b)

    return jax.tree.map(of_leaf, one, other)


@jax.jit
def _dense(planes: BitPlanes, table: Any) -> jax.Array:
    return planes.values(*tables_lib.decode_parameters(table, planes.bits))


@partial(jax.jit, static_argnums=(0, 1))
def _forward(layer: Layer, eps: float, own: Any, x: jax.Array):
    """What a layer gives, and the way back."""
    return jax.vjp(partial(outputs, layer, eps), own, x)


@jax.jit
def _way_back(back: Any, change: jax.Array):
    return back(change)


@jax.jit
def _table_gradient(planes: BitPlanes, table: Any, change: jax.Array) -> Any:
    return jax.vjp(partial(_dense, planes), table)[1](change)[0]


@partial(jax.jit, static_argnums=(0, 1))
def outputs(layer: Layer, eps: float, own: Any, x: jax.Array) -> jax.Array:
    """What a layer of dense weights makes of x [B, T, D]."""
    context = Context(jnp.arange(x.shape[1], dtype=jnp.int32)[None], None)
    return run_layer(layer, own, x, context, None, eps)[0]


@partial(jax.jit, static_argnums=0)
def divergence_and_gradient(decoder: Decoder, norm, head, x, target):
    """`mcjax.vocabulary.divergence` and its gradient by x."""
    measure = partial(vocabulary.divergence, decoder, norm, head)
    return jax.value_and_grad(measure)(x, target)
