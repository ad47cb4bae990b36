"""An artifact's tables trained end to end against the dense model, one layer dense at a time.

At each of a few *settings*, a width for what budgets are about and one for all else, the tables of
these widths, and a factor of each entry of the norms and of each expert in the routers, which goes
with the former, learn to give the dense model's predictions:

    minimise  mean_t KL(softmax(h(x_t)) || softmax(h(x'_t)))

with x the last layer's outputs in the dense model, x' those at the setting and h norm and head, for
the tokens of calibration windows, over the likeliest tokens of a large vocabulary, see
`mcjax.vocabulary`. Tables that an earlier setting trained stay as they are.

A step runs forward and back through the layers one by one. A layer's weights are made of its planes
when it is their turn, so that one layer is dense at a time; beside it memory holds all planes, and
the tables of all widths, the moments of those that train and the outputs of the last layer in
float32. Planes never change, nor do the errors that budgets are shared out by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax import parameters, vocabulary
from mcjax import tables as tables_lib
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.checkpoint import ArtifactReader
from mcjax.models import weights
from mcjax.models.attention import Context
from mcjax.models.decoder import Decoder, Layer
from mcjax.models.language_model import embed, run_layer

STEPS = {1: 24, 2: 80, 3: 56, 4: 32}
"""Of each width, for a model of `WEIGHTS` weights in planes or more; of wider ones the least."""

RATES = {1: 8e-3, 2: 8e-3, 3: 4e-3, 4: 2e-3}
"""The greatest learning rate of each width, of log2 steps, see `table_rates`: it rises in a
twentieth of the steps, then falls. Of wider ones the least."""

WEIGHTS = 1e8
"""A smaller model takes as many times more steps, in about the same time."""

FACTOR_RATE = 0.25
"""The learning rate of factors of norms and routers, in those of tables."""

MOST_TIMES = 8
"""At most so many times more."""

STEP_TOKENS = 1024
"""About how many tokens a step learns from."""

CLIP = 1.0
"""Greatest norm of a gradient."""

KEEP_EVERY = 16
"""Steps after which what is trained is kept for a run that goes on."""

Path_ = tuple[str, ...]


class Setting(NamedTuple):
    """What a few steps train.

    Attributes:
      budgeted: width of the weights that a budget is about.
      others: widths of all else, which take turns.
      steps: how many.
    """

    budgeted: int
    others: tuple[int, ...]
    steps: int

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        most, warm = RATES.get(self.budgeted, min(RATES.values())), max(2, self.steps // 20)
        if step < warm:
            return most * (step + 1) / warm
        part = (step - warm) / max(1, self.steps - warm)
        return most * (0.05 + 0.475 * (1 + math.cos(math.pi * part)))


def settings(
    decoder: Decoder, widths: Sequence[int], others: Sequence[int], usual: int
) -> tuple[Setting, ...]:
    """The settings of an artifact, in order: from the widest down.

    Args:
      decoder: the model.
      widths: of what budgets are about.
      others: of all else.
      usual: at which all else is served unless asked otherwise.
    """
    count = sum(
        math.prod(role.shape)
        for layer in decoder.layers
        for role in weights.roles(layer, decoder.width)
        if role.tap is not None
    )
    times = min(MOST_TIMES, max(1.0, WEIGHTS / count))
    found = []
    for k in sorted(widths, reverse=True):
        both = (usual, k) if k in others and k != usual else (usual,)
        found.append(Setting(k, both, round(times * STEPS.get(k, min(STEPS.values())))))
    return tuple(found)


def windows_wanted(every: Sequence[Setting], length: int) -> int:
    """How many windows of so many tokens settings learn from, none twice in one setting."""
    return _batch(length) * max(setting.steps for setting in every)


def _batch(length: int) -> int:
    """How many windows of so many tokens make a step."""
    return max(1, STEP_TOKENS // length)


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
    progress: Callable[..., Any],
) -> list[dict[str, np.ndarray]]:
    """Trains the tables of the widths that settings name.

    Args:
      reader: of the artifact.
      every: what to train, in order.
      windows: tokens int [N, T].
      target: float [N, T, D], what the dense model's last layer gives for them.
      keep: a file that an interrupted run goes on from.
      progress: wraps the iteration over steps, called with (items, description=...).

    Returns:
      For each layer its tables uint8, by the names of their leaves, such as "….o.table_2", and what
      factors differ from 1 by, bfloat16, such as "….router.factor_2".
    """
    decoder = reader.decoder
    layers = [read_layer(reader, i) for i in range(len(decoder.layers))]
    outside = parameters.read_rest(reader)
    steps = [(setting, n) for setting in every for n in range(setting.steps)]
    state = State(layers, every)
    first = state.restore(keep)
    batch = _batch(windows.shape[1])
    order = np.random.default_rng(0).permutation(len(windows))
    model = Model(decoder, layers, outside)
    for number in progress(range(first, len(steps)), description="tuning"):
        setting, n = steps[number]
        if n == 0:
            state.begin(setting)
        some = order[np.arange(number * batch, (number + 1) * batch) % len(order)]
        wide = setting.others[n % len(setting.others)]
        gradients = model.gradients(state, wide, windows[some], target[some])[1]
        state.update(gradients, setting.rate(n))
        if n + 1 == setting.steps:
            state.end()
        if (number + 1) % KEEP_EVERY == 0 or number + 1 == len(steps):
            state.save(keep, number + 1)
    return state.stored()


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


class State:
    """Every layer's tables and factors, the optimiser's moments, and what has been trained."""

    def __init__(self, layers: Sequence[Weights], every: Sequence[Setting]):
        self.layers, self.every = layers, every
        self.tables: list[Tables] = [
            {
                (path, k): tables_lib.to_parameters(table, k)
                for path, planes in layer.planes.items()
                for k, table in zip(planes.widths, planes.tables, strict=True)
            }
            for layer in layers
        ]
        for layer, tables in zip(layers, self.tables, strict=True):
            for path in layer.corrected:
                for k in layer.planes[min(layer.budgeted)].widths:
                    tables[path, k] = jnp.zeros(layer.rest[path].shape[-1])
        self.moments: list[Tables] = [{} for _ in layers]
        self.done: set[tuple[bool, int]] = set()
        self.setting = every[0]

    def widths(self, i: int, others: int) -> dict[Path_, int]:
        """The width of each of layer i's weights, where all else has width `others`."""
        layer, own = self.layers[i], self.setting.budgeted
        return {path: own if path in layer.budgeted else others for path in layer.planes}

    def begin(self, setting: Setting) -> None:
        """Starts a setting, whose tables have moments of their own."""
        self.setting = setting
        for i, layer in enumerate(self.layers):
            self.moments[i] = {}
            for path in layer.corrected:
                of_path = path, setting.budgeted
                self.moments[i][of_path] = _ADAM.init(self.tables[i][of_path])
            for others in setting.others:
                for path, k in self.widths(i, others).items():
                    if (path in layer.budgeted, k) not in self.done:
                        self.moments[i][path, k] = _ADAM.init(self.tables[i][path, k])

    def update(self, gradients: Sequence[Tables], rate: float) -> None:
        """Takes a step along gradients of some of the tables."""
        squares = [_square(list(of_layer.values())) for of_layer in gradients]
        norm = float(np.sqrt(sum(map(float, squares))))
        scale = min(1.0, CLIP / max(norm, 1e-30))
        for i, of_layer in enumerate(gradients):
            for (path, k), gradient in of_layer.items():
                factor = path in self.layers[i].corrected
                rates = rate * FACTOR_RATE if factor else table_rates(rate, k)
                table, moments = self.tables[i][path, k], self.moments[i][path, k]
                made = _step(table, moments, gradient, scale, rates)
                self.tables[i][path, k], self.moments[i][path, k] = made

    def end(self) -> None:
        """Has later settings leave what this one trained."""
        self.done |= {(True, self.setting.budgeted)}
        self.done |= {(False, others) for others in self.setting.others}

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
        for setting in self.every:
            self.begin(setting)
            if left <= setting.steps:
                break
            left -= setting.steps
            self.end()
        like = [[list(d.values()) for d in self.tables], self._moments]
        tables, moments = jax.tree.unflatten(jax.tree.structure(like), leaves)
        for kept, new in ((self.tables, tables), (self.moments, moments)):
            for own, values in zip(kept, new, strict=True):
                own |= dict(zip(own, values, strict=True))
        if left == self.setting.steps:
            self.end()
        return int(step)


_ADAM = optax.scale_by_adam(b2=0.99)


def table_rates(rate: float, width: int) -> dict[str, float]:
    """The learning rates of a table, by which steps and offsets move a weight about as far.

    An octave of a step is ln 2 of a weight; an offset of 1 is a half span, of so many deviations of
    a Gaussian weight.
    """
    half_span = tables_lib.GAUSSIAN_STEP[width] * (2**width - 1) / 2
    return {"steps": rate, "offset": rate * math.log(2) / half_span}


@jax.jit
def _step(table: Any, moments: Any, gradient: Any, scale, rates):
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    change, moments = _ADAM.update(gradient, moments, table)
    return jax.tree.map(lambda value, d, rate: value - rate * d, table, change, rates), moments


@jax.jit
def _square(tree: Any) -> jax.Array:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)), jnp.float32(0))


class Model(NamedTuple):
    """The model at a setting, run layer by layer."""

    decoder: Decoder
    layers: Sequence[Weights]
    outside: Any

    def gradients(
        self, state: State, others: int, tokens: np.ndarray, target: np.ndarray
    ) -> tuple[jax.Array, list[Tables]]:
        """The divergence, and each layer's gradient by the tables that train."""
        decoder = self.decoder
        x = embed(decoder, self.outside, tokens, jnp.float32)
        inputs = []
        for i, layer in enumerate(decoder.layers):
            inputs.append(x)
            x = outputs(layer, decoder.norm_eps, self._own(state, i, others), x)
        norm, head = vocabulary.head_of(decoder, self.outside, target)
        value, change = _divergence(decoder, norm, head, x, jnp.asarray(target))
        gradients: list[Tables] = [{} for _ in inputs]
        for i in reversed(range(len(inputs))):
            own = self._own(state, i, others)
            of_own, change = _backward(decoder.layers[i], decoder.norm_eps, own, inputs[i], change)
            for path, k in state.widths(i, others).items():
                if (path, k) in state.moments[i]:
                    planes = self.layers[i].planes[path].slice(k)
                    gradients[i][path, k] = _table_gradient(
                        planes, state.tables[i][path, k], weights.get(of_own, path)
                    )
            for path in self.layers[i].corrected:
                own_change = weights.get(of_own, path) * self.layers[i].rest[path]
                gradients[i][path, state.setting.budgeted] = jnp.sum(
                    own_change, axis=tuple(range(own_change.ndim - 1))
                )
            del own, of_own
        return value, gradients

    def _own(self, state: State, i: int, others: int) -> dict[str, Any]:
        """Layer i's weights, dense."""
        own: dict[str, Any] = {}
        for path, value in self.layers[i].rest.items():
            if path in self.layers[i].corrected:
                value = value * (1 + state.tables[i][path, state.setting.budgeted])
            weights.put(own, path, value)
        for path, k in state.widths(i, others).items():
            planes = self.layers[i].planes[path].slice(k)
            weights.put(own, path, _dense(planes, state.tables[i][path, k]))
        return own


@jax.jit
def _dense(planes: BitPlanes, table: Any) -> jax.Array:
    return planes.values(*tables_lib.decode_parameters(table, planes.bits))


@jax.jit
def _table_gradient(planes: BitPlanes, table: Any, change: jax.Array) -> Any:
    return jax.vjp(partial(_dense, planes), table)[1](change)[0]


@partial(jax.jit, static_argnums=(0, 1))
def outputs(layer: Layer, eps: float, own: Any, x: jax.Array) -> jax.Array:
    """What a layer of dense weights makes of x [B, T, D]."""
    context = Context(jnp.arange(x.shape[1], dtype=jnp.int32)[None], None)
    return run_layer(layer, own, x, context, None, eps)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _backward(layer: Layer, eps: float, own: Any, x: jax.Array, change: jax.Array):
    return jax.vjp(partial(outputs, layer, eps), own, x)[1](change)


@partial(jax.jit, static_argnums=0)
def _divergence(decoder: Decoder, norm, head, x, target):
    """`mcjax.vocabulary.divergence` and its gradient by x."""
    measure = partial(vocabulary.divergence, decoder, norm, head)
    return jax.value_and_grad(measure)(x, target)
