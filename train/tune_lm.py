"""Tables of an artifact trained for one budget, on text of one's own.

    uv run python train/tune_lm.py MODEL ARTIFACT OUT --text TEXT --budget 2.5

MODEL is the Hugging Face folder that ARTIFACT was compressed from, whose predictions are what the
artifact at that budget learns. Planes stay as they are, and OUT has the same bytes. It serves every
budget, but others read the tables that were tuned for this one too, of attention in any case: keep
ARTIFACT for them. OUT.run keeps checkpoints and metrics, and --resume goes on from them.

On several devices both models are shared out, see --mesh. A layer is dense when it is its turn,
there and back.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from loop import (
    State,
    data_mesh,
    device_mesh,
    fit,
    global_batch,
    join,
    meet,
    mesh_sizes,
    place,
    program,
    refuse_other,
    state_shardings,
    take_processes,
)
from moe_lm import FileCorpus, check_shared, manifest_of

import mcjax
from mcjax import checkpoint, sharding, text, tune
from mcjax.hub import Folder, local
from mcjax.models.language_model import LanguageModel

MESH = (
    "how devices share the work, such as data=2,expert=4; by default along data. Planes, tables "
    "and their moments are cut along expert and model, the 16-bit model along data too"
)
"""What --mesh says for itself."""

HELD_OUT = 0.1
"""The share of windows, the last, that are not trained on."""

TESTED = 16
"""How many of these the divergence is measured on, at most."""


def adam(tuned: tune.Tuned, steps: int, rate: float) -> optax.GradientTransformation:
    """Adam with the rates of `mcjax.tune.rates`, in shares of them: they rise, then fall."""
    each = tune.rates(tuned)
    rise = max(1, steps // 20)
    shares = optax.warmup_cosine_decay_schedule(rate / (rise + 1), rate, rise, steps, rate / 20)
    own_rate = optax.stateless(lambda up, _: jax.tree.map(lambda u, r: -r * u, up, each))
    adam = optax.scale_by_adam(b2=0.99)
    return optax.chain(
        optax.clip_by_global_norm(1.0), adam, optax.scale_by_schedule(shares), own_rate
    )


class Begun(NamedTuple):
    """A run before its first step.

    Attributes:
      model: of the artifact at its budget.
      state: of the loop; its parameters are tables, see `mcjax.tune.init`.
      shardings: of it; None on one device.
      step: from a state and tokens [B, T] to the next state and metrics.
      test: from a state and tokens to the mean divergence, nats a token.
      rows: the axes of the mesh that share a batch.
    """

    model: mcjax.Model
    state: State
    shardings: Any
    step: Any
    test: Any
    rows: tuple[str, ...]


def begun(
    folder: Folder,
    artifact: Path,
    precision: dict[str, Any],
    mesh: Mesh,
    batch_size: int,
    steps: int,
    rate: float = 1.0,
) -> Begun:
    """Reads both models and shares them out on a mesh.

    Raises:
      ValueError: if the mesh cannot share a batch or experts evenly, or the precision is not
        feasible.
    """
    decoder, many = folder.decoder, mesh.size > 1
    fully = sharding.resolve(mesh, fully=True) if many else None
    check_shared(decoder, fully, batch_size)
    model = mcjax.load(artifact, **precision, mesh=mesh if many else None)
    teacher = folder.read(on_host=many)
    if fully is not None:
        teacher = sharding.put_on(decoder, teacher, fully)
    teaches = LanguageModel(decoder, shared=fully)
    tables = tune.init(model.params, ())["tables"]
    optimiser = adam({"tables": tables, "others": {}}, steps, rate)

    def first(tables):
        return State(jnp.zeros((), jnp.int32), tables, optimiser.init(tables))

    where, rows = None, tuple(mesh.axis_names)
    if fully is not None:
        own = jax.tree.map(lambda a: a.sharding, tables)
        where = state_shardings(optimiser, jax.eval_shape(first, tables), own, mesh)
        rows = fully.batch

    def distance(tables, params, teacher, tokens):
        target = teaches.apply({"params": teacher}, tokens)
        tuned = {"tables": tables, "others": {}}
        return tune.divergence(model.module, params, tuned, tokens, target)

    @partial(jax.jit, donate_argnums=0)
    def step(state, params, teacher, tokens):
        value, gradient = jax.value_and_grad(distance)(state.params, params, teacher, tokens)
        update, opt = optimiser.update(gradient, state.optimiser, state.params)
        tables = optax.apply_updates(state.params, update)
        return State(state.step + 1, tables, opt), {"divergence": value}

    test = jax.jit(lambda state, *given: distance(state.params, *given))
    return Begun(
        model,
        jax.jit(first, out_shardings=where)(tables),
        where,
        lambda state, tokens: step(state, model.params, teacher, tokens),
        lambda state, tokens: test(state, model.params, teacher, tokens),
        rows,
    )


def _sharing(mesh: Mesh) -> int | None:
    """How many devices share experts, by which tables are ordered; None if all have all."""
    shared = sharding.resolve(mesh)
    return None if mesh.size == 1 or shared.expert is None else shared.size(shared.expert)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("out", type=place, help="the artifact to write; must not exist")
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--budget", help='average bits, or all bytes, such as "4.2GB"')
    parser.add_argument("--bits", type=int, help="one width for every expert instead")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument(
        "--learning-rate", type=float, default=1.0, help="times those of --effort best"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--mesh", metavar="AXES", help=MESH)
    take_processes(parser)
    arguments = parser.parse_args()
    join(arguments)
    run_folder = arguments.out.with_name(arguments.out.name + ".run")
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists; remove it or choose another place")
    if run_folder.exists() and not arguments.resume:
        raise ValueError(f"{run_folder} exists; go on with --resume, or choose another OUT")
    if arguments.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {arguments.steps}")
    if (arguments.budget is None) == (arguments.bits is None):
        raise ValueError("say what to tune for: --budget or --bits, one of them")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    folder = Folder(local(arguments.model))
    made_of = manifest_of(arguments.artifact, folder)
    decoder, sizes = folder.decoder, arguments.mesh and mesh_sizes(arguments.mesh)
    mesh = device_mesh(sizes) if sizes else data_mesh()
    ends, length = decoder.eos_token_ids, arguments.seq_len
    text.check_length(length, decoder.max_position_embeddings)
    tokens = text.encode_file(folder.tokenizer_path, arguments.text, decoder.vocab_size, ends)
    begin = text.beginning(folder.tokenizer_path, decoder.vocab_size, "auto")
    every = text.windows(tokens, length, "training text", begin)
    kept = max(1, round(HELD_OUT * len(every)))
    if len(every) < 2:
        raise ValueError(
            f"the training text has one window of {length} tokens, and one is held out; give more "
            "text or a smaller --seq-len"
        )
    own = length - (begin is not None)
    corpus = FileCorpus(tokens[: own * (len(every) - kept)], length, begin)
    names = ("budget", "bits", "steps", "batch_size", "seq_len", "learning_rate")
    about = {name: getattr(arguments, name) for name in names} | {
        "text": checkpoint.crc32(tokens),
        "model": made_of["source_sha256"],
        "artifact": checkpoint.crc32(np.frombuffer(json.dumps(made_of).encode(), np.uint8)),
        "experts_shared_by": _sharing(mesh),
    }
    if run_folder.exists():
        refuse_other(run_folder, about)
    precision = {"budget": arguments.budget, "bits": arguments.bits}
    run = begun(
        folder,
        arguments.artifact,
        precision,
        mesh,
        arguments.batch_size,
        arguments.steps,
        arguments.learning_rate,
    )
    shape, tested = (arguments.batch_size, length), text.spread(every[-kept:], TESTED)

    def batch(row):
        return global_batch(mesh, shape, row, run.rows)

    def measured(state):
        """On held-out windows, of which a batch that is not full has some twice."""
        starts = range(0, len(tested), arguments.batch_size)
        with jax.set_mesh(mesh):
            values = [
                run.test(state, batch(lambda i, s=s: tested[(s + i) % len(tested)])) for s in starts
            ]
        return float(np.mean([float(value) for value in values]))

    before = measured(run.state)
    state = fit(
        run_folder,
        run.state,
        run.step,
        lambda i: batch(partial(corpus.row, 0, i)),
        mesh=mesh,
        shardings=run.shardings,
        steps=arguments.steps,
        identity=about,
        resume=arguments.resume,
        save_every=100,
        log_every=20,
    )
    after = measured(state)
    tune.save(run.model, {"tables": state.params, "others": {}}, arguments.out, about)
    meet("written")  # a process that ended would not wait long for the first one
    if jax.process_index() == 0:
        print(
            f"{arguments.out}: divergence from the model as it was on held-out text "
            f"{before:.4f} to {after:.4f} nats a token"
        )


if __name__ == "__main__":
    program(main, "tune_lm")
