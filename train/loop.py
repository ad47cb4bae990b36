"""The training loop that every recipe shares: data-parallel, resumable to the bit, measured.

What makes resuming exact: a batch is a pure function of the step, the state holds everything else,
and Orbax gives back the state that it was given.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mcjax.atomic import whole


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: a pytree; likewise `extra`, for what is not trained by gradients.
      optimiser: optax's state.
      extra: see `params`.
    """

    step: jax.Array
    params: Any
    optimiser: Any
    extra: Any = ()


def adamw(
    *,
    learning_rate: float,
    warmup: int,
    steps: int,
    weight_decay: float,
    clip: float,
    decays: Any = None,
) -> optax.GradientTransformation:
    """AdamW with gradient clipping.

    The rate climbs for `warmup` steps and then falls by a cosine to a hundredth. `decays` says
    which parameters decay, a tree like them of bools; None lets matrices, and no norms and biases.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup, max(steps, warmup + 1), learning_rate / 100
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=weight_decay,
            mask=decays or (lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
        ),
    )


def data_mesh() -> Mesh:
    """All devices in a row, to share a batch; the compiler splits what follows from it."""
    return device_mesh({"data": jax.device_count()})


def device_mesh(sizes: Mapping[str, int]) -> Mesh:
    """All devices, axes as long as `sizes` say.

    Raises:
      ValueError: if there are more or fewer devices.
    """
    if math.prod(sizes.values()) != jax.device_count():
        wanted = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"a mesh of {wanted} devices; there are {jax.device_count()}")
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def mesh_sizes(text: str) -> dict[str, int]:
    """Axes of a mesh as they are written, "data=4,expert=2".

    Raises:
      ValueError: if they are written otherwise, or named otherwise.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "expert", "model") or name in sizes or not size.isdecimal():
            raise ValueError(
                "--mesh takes axes of data, expert and model, such as data=4,expert=2; "
                f"got {text!r}"
            )
        sizes[name] = int(size)
    return sizes


def global_batch(
    mesh: Mesh,
    shape: tuple[int, ...],
    row: Callable[[int], np.ndarray],
    axes: tuple[str, ...] = ("data",),
) -> jax.Array:
    """An array whose rows are shared along axes; each process makes those of its devices."""

    def part(index):
        return np.stack([row(i) for i in range(*index[0].indices(shape[0]))])

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(axes)), part)


def meet(where: str) -> None:
    """Waits for all processes; `where` names the place."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def state_shardings(
    optimiser: optax.GradientTransformation, like: State, own: Any, mesh: Mesh
) -> State:
    """Where a state lies: moments as their parameters do, all else whole on every device.

    Args:
      optimiser: of the state.
      like: it, or its shapes.
      own: shardings of its parameters.
      mesh: of all devices.
    """
    each = NamedSharding(mesh, P())
    moments = optax.tree.map_params(
        optimiser, lambda _, where: where, like.optimiser, own, transform_non_params=lambda _: each
    )
    return State(each, own, moments, jax.tree.map(lambda _: each, like.extra))


def fit(
    directory: Path,
    state: State,
    step: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batch: Callable[[int], Any],
    *,
    mesh: Mesh,
    steps: int,
    identity: Mapping[str, Any],
    shardings: Any = None,
    resume: bool = False,
    save_every: int = 500,
    log_every: int = 50,
    evaluate: Callable[[State], dict[str, float]] | None = None,
    evaluate_every: int = 500,
) -> State:
    """Trains to `steps`, or until SIGINT or SIGTERM, which save and end.

    Args:
      directory: for `checkpoints/`, `recipe.json` and `metrics.csv`; must not exist, or be one
        of the same identity that `resume` goes on from.
      state: the initial state.
      step: jitted, (state, batch) -> (state, metrics of scalars); its state is donated.
      batch: step number -> batch.
      mesh: of all devices.
      steps: how many, in all.
      identity: what must not change between a run and its resumption; plain JSON values. The mesh
        may: a checkpoint is restored onto any.
      shardings: a tree like the state, already on its devices; None holds it whole on each.
      resume: go on from the newest checkpoint.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.
      evaluate: state -> metrics of held-out data.
      evaluate_every: steps between evaluations; the last step is always evaluated.

    Returns:
      The final state.

    Raises:
      ValueError: if the directory exists and resuming was not asked for, or it is of another
        recipe.
      KeyboardInterrupt: after a signal, once the state is saved.
    """
    import orbax.checkpoint as ocp
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    _claim(directory, dict(identity), resume)
    if shardings is None:
        state = jax.device_put(state, NamedSharding(mesh, P()))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((directory / "checkpoints").absolute(), options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            if shardings is not None:
                abstract = jax.tree.map(
                    lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
                    abstract,
                    shardings,
                )
            state = manager.restore(first, args=ocp.args.StandardRestore(abstract))
        rows = Metrics(directory / "metrics.csv", first)
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
        bar = Progress(*columns, console=console, disable=not console.is_terminal)
        with Signals() as signals, bar as progress:
            task = progress.add_task("training", total=steps, completed=first)
            started, since = time.perf_counter(), first
            for i in range(first, steps):
                with jax.set_mesh(mesh):
                    state, metrics = step(state, batch(i))
                done = i + 1
                progress.update(task, completed=done)
                tested = evaluate is not None and (done % evaluate_every == 0 or done == steps)
                if done % log_every == 0 or done == steps or tested:
                    row = {k: float(v) for k, v in metrics.items()}
                    row["steps_per_second"] = (done - since) / (time.perf_counter() - started)
                    if evaluate is not None and tested:
                        row |= evaluate(state)
                    rows.add(done, row)
                    words = ", ".join(f"{k} {v:.4g}" for k, v in row.items())
                    console.print(f"step {done}: {words}", highlight=False, soft_wrap=True)
                    started, since = time.perf_counter(), done
                stop = signals.stop(done)
                if done % save_every == 0 or done == steps or stop:
                    manager.save(done, args=ocp.args.StandardSave(state))
                if stop:
                    manager.wait_until_finished()
                    raise KeyboardInterrupt(f"stopped at step {done}; go on with --resume")
    return state


class Signals:
    """While entered, remembers SIGINT and SIGTERM, so that a step is never cut in half.

    Of many processes all must stop at one step. JAX's service for that catches SIGTERM in any of
    them and chooses the step; SIGINT is made a SIGTERM.
    """

    def __init__(self):
        self.received = False
        self.many = jax.process_count() > 1

    def stop(self, step: int) -> bool:
        """Whether to save and end after so many steps; every process must ask after each."""
        if not self.many:
            return self.received
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT,) if self.many else (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.received = True
        if self.many:
            os.kill(os.getpid(), signal.SIGTERM)


class Metrics:
    """A CSV of one row a logged step; rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, first: int):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if first and path.is_file():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the file anew with one more row, whole or not at all."""
        self.rows.append({"step": step, **values})
        if jax.process_index():
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with whole(self.path) as aside, aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


def _claim(directory: Path, identity: dict[str, Any], resume: bool) -> None:
    """Makes the directory of a run, or checks that it is of this one."""
    there = directory.exists()
    meet("seen")  # all have looked before the first one makes it
    if not there:
        if jax.process_index() == 0:
            directory.mkdir(parents=True)
            (directory / "recipe.json").write_text(json.dumps(identity, indent=2))
        meet("made")
        return
    if not resume:
        raise ValueError(f"{directory} exists; choose another place, or go on with --resume")
    refuse_other(directory, identity)


def refuse_other(directory: Path, identity: Mapping[str, Any]) -> None:
    """Raises ValueError if a directory is not of a run of that identity."""
    file, identity = directory / "recipe.json", json.loads(json.dumps(identity))
    try:
        before = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{directory} is not a run of this recipe: no {file.name}") from None
    changed = [k for k in {**before, **identity} if before.get(k) != identity.get(k)]
    if changed:
        k = changed[0]
        raise ValueError(
            f"{directory} was trained with {k} {before.get(k)!r}, not {identity.get(k)!r}; "
            "resume with the same recipe, or choose another place"
        )


def place(name: str) -> Path:
    """A path that a command line names, which must be of this machine."""
    if "://" in name:
        raise argparse.ArgumentTypeError(f"{name} is no folder of this machine; mount it here")
    return Path(name)


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser of what every recipe takes; hand its arguments to `begin`.

    Args:
      doc: the script's docstring, shown as its help.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=Path, help="a file of train/configs")
    parser.add_argument(
        "--out", type=place, help="folder to write, by default named as the config; must not exist"
    )
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    take_processes(parser)
    return parser


def take_processes(parser: argparse.ArgumentParser) -> None:
    """Has a parser take what `join` wants to know."""
    group = parser.add_argument_group("one process of many")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="as the environment says: a TPU pod's, SLURM's, Open MPI's",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; or so")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which this is, from 0")


def join(arguments: argparse.Namespace) -> None:
    """Joins the other processes if there are any.

    Raises:
      ValueError: if the arguments do not say which process this is of which.
    """
    own = arguments.coordinator, arguments.processes, arguments.process
    if any(value is not None for value in own):
        if None in own:
            raise ValueError("--coordinator, --processes and --process go together")
        if not 0 <= arguments.process < arguments.processes:
            raise ValueError(
                f"--process must be 0 to {arguments.processes - 1}, got {arguments.process}"
            )
        jax.distributed.initialize(*own)
    elif arguments.distributed:
        jax.distributed.initialize()


def begin(arguments: argparse.Namespace, kind: type) -> tuple[Any, Path]:
    """Joins the other processes if there are any; returns the config's recipe and where to write.

    Args:
      arguments: from the parser of `command_line`.
      kind: of the recipe.

    Raises:
      ValueError: see `load_recipe`.
    """
    join(arguments)
    recipe = load_recipe(arguments.config, kind)
    return recipe, arguments.out or Path(arguments.config.stem)


def load_recipe(path: str | Path, kind: type) -> Any:
    """The `recipe` that an executable config defines.

    Raises:
      ValueError: if the file is missing, fails, or defines none of that kind.
    """
    try:
        recipe = runpy.run_path(str(path)).get("recipe")
    except Exception as error:  # whatever a config raises
        raise ValueError(f"cannot run the config {path}: {error}") from None
    if not isinstance(recipe, kind):
        raise ValueError(f"{path} must define `recipe`, a {kind.__name__}; found {recipe!r}")
    return recipe


def program(main: Callable[[], None], name: str) -> None:
    """Runs a script's `main`: bad input ends it with one clear line."""
    try:
        main()
    except (ValueError, TypeError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"{name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
