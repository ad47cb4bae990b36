"""Once-QAT of a language model's experts, from a compressed artifact to a better one of its kind.

    uv run python train/once_lm.py MODEL ARTIFACT OUT --text TEXT --calibration TEXT

MODEL is the Hugging Face folder that ARTIFACT was compressed from. Its experts start as they are
in the artifact, weights at the widest width and all tables, and train at all widths at once; the
16-bit model teaches the widest width, each width the next lower one. Everything else stays. OUT is
an artifact like any other: same bytes, same commands. OUT.run keeps checkpoints and metrics, and
--resume goes on from them. On several devices all of it is shared out, see --mesh.
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
from jax.sharding import PartitionSpec as P
from loop import (
    State,
    adamw,
    data_mesh,
    device_mesh,
    fit,
    global_batch,
    join,
    mesh_sizes,
    place,
    program,
    state_shardings,
    take_processes,
)
from moe_lm import MESH, FileCorpus, check_shared, manifest_of

from mcjax import bitplane, checkpoint, parameters, qat, serving, sharding, text
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.compress import compress
from mcjax.hosts import everywhere
from mcjax.hub import Folder, local
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.language_model import LanguageModel
from mcjax.ops import dense


def start(artifact: Path, params: Any) -> tuple[Any, Any, Any]:
    """What trains, what stays, and each trained weight's spec.

    Args:
      artifact: the compressed model.
      params: the 16-bit model's, float32.

    Returns:
      `{"w", "quantizer"}` by the dotted path of every weight that a budget is about, stacked over
      layers; parameters with the artifact's other weights; and specs by the same paths.
    """
    model = serving.load(artifact)
    reader = checkpoint.ArtifactReader(artifact)
    decoder, group_size = reader.decoder, reader.manifest["group_size"]
    widths = tuple(reversed(reader.manifest["statistics"]["bits"]))
    every = {i: parameters.read_every_width(reader, i) for i in weights.budgeted_layers(decoder)}
    kept = jax.tree.map(
        lambda w: w if isinstance(w, MixedPlanes) else dense(w, jnp.float32),
        model.params,
        is_leaf=lambda w: isinstance(w, BitPlanes | MixedPlanes),
    )
    trained, specs = {}, {}
    for member in weights.members(decoder):
        for role in weights.budgeted(decoder, member.layer):
            each = [every[i][role.path] for i in member.numbers]
            planes = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
            path = member.path + role.path
            weights.put(kept, path, weights.get(params, path))
            name = ".".join(path)
            trained[name] = {"w": planes.dequantize(), "quantizer": qat.from_planes(planes)}
            specs[name] = qat.QuantSpec(
                widths=widths,
                group_size=bitplane.resolve_group_size(role.shape[-2], group_size),
                act_bits=None,
                rotated=planes.rotated,
            )
    return trained, kept, specs


def served_at(trained: Any, kept: Any, specs: Any, bits: int) -> Any:
    """Parameters of the model with its experts as they are served at a width."""
    params = jax.tree.map(lambda w: w, kept)
    for name, leaf in trained.items():
        made = qat.fake_quant(leaf["w"], leaf["quantizer"], specs[name], bits)
        weights.put(params, tuple(name.split(".")), made)
    return params


def make_step(
    module: LanguageModel, teacher: Any, kept: Any, specs: Any, optimiser, objective, distill
):
    """The jitted training step; `State.extra` is the objective's state."""
    widths = next(iter(specs.values())).widths

    def losses(trained, teacher, kept, tokens):
        seen, labels = tokens[:, :-1], tokens[:, 1:]

        def logits_at(bits, state):
            params = served_at(trained, kept, specs, bits)
            return module.apply({"params": params}, seen), state

        def loss(logits):
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

        target = module.apply({"params": teacher}, seen)
        values, _ = qat.cascade_losses(logits_at, loss, widths, distill=distill, teacher=target)
        return values, ()

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, teacher, kept, tokens):
        gradient, values, _, _, extra = qat.combine(
            lambda trained: losses(trained, teacher, kept, tokens),
            state.params,
            objective,
            state.extra,
        )
        update, opt = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, update)
        metrics = {f"loss_{k}": v for k, v in zip(widths, values, strict=True)}
        return State(state.step + 1, params, opt, extra), metrics

    return lambda state, tokens: step(state, teacher, kept, tokens)


def shared_out(decoder: Decoder, shared: sharding.Sharding, trained, kept, teacher):
    """All of it on the devices of a mesh: each weight as that of the model that it is for."""
    where = sharding.shardings(decoder, teacher, shared)

    def of_weight(name, leaf):
        path = tuple(name.split("."))
        own, routed = weights.get(where, path), path[-1 - len(weights.EXPERTS) : -1]
        tables = P(None, shared.expert) if routed == weights.EXPERTS else P()
        return {
            "w": shared.place(leaf["w"], own.spec),
            "quantizer": jax.tree.map(lambda a: shared.place(a, tables), leaf["quantizer"]),
        }

    made = {name: of_weight(name, leaf) for name, leaf in trained.items()}
    placed = sharding.put_on(decoder, teacher, shared)
    kept = jax.tree.map(
        lambda own, its, there: there if own is its else shared.place(own, there.sharding.spec),
        kept,
        teacher,
        placed,
    )
    return made, kept, placed


class Begun(NamedTuple):
    """A run before its first step.

    Attributes:
      state: of the loop; its parameters are `start`'s first.
      shardings: of it; None on one device.
      step: see `make_step`.
      specs: see `start`.
      rows: the axes of the mesh that share a batch.
    """

    state: State
    shardings: Any
    step: Any
    specs: dict[str, qat.QuantSpec]
    rows: tuple[str, ...]


def begun(
    folder: Folder, artifact: Path, mesh: Mesh, optimiser, batch_size: int, distill: float
) -> Begun:
    """Reads both models and shares them out on a mesh.

    Raises:
      ValueError: if the mesh cannot share a batch or experts evenly.
    """
    decoder = folder.decoder
    shared = sharding.resolve(mesh, fully=True) if mesh.size > 1 else None
    check_shared(decoder, shared, batch_size)
    with jax.default_device(jax.local_devices(backend="cpu")[0] if shared else None):
        teacher = folder.read(np.float32)
        trained, kept, specs = start(artifact, teacher)
    objective = qat.fixed()

    def first(trained):
        extra = objective.init(len(next(iter(specs.values())).widths))
        return State(jnp.zeros((), jnp.int32), trained, optimiser.init(trained), extra)

    where, rows = None, ("data",)
    if shared is not None:
        trained, kept, teacher = shared_out(decoder, shared, trained, kept, teacher)
        own = jax.tree.map(lambda a: a.sharding, trained)
        where = state_shardings(optimiser, jax.eval_shape(first, trained), own, mesh)
        rows = shared.batch
    state = jax.jit(first, out_shardings=where)(trained)
    module = LanguageModel(decoder, shared=shared)
    step = make_step(module, teacher, kept, specs, optimiser, objective, distill)
    return Begun(state, where, step, specs, rows)


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("out", type=place, help="the artifact to write; must not exist")
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--calibration", required=True, help="as in mcjax compress")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--distill", type=float, default=0.7)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--mesh", metavar="AXES", help=MESH)
    take_processes(parser)
    arguments = parser.parse_args()
    join(arguments)
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists; remove it or choose another place")
    folder = Folder(local(arguments.model))
    decoder, sizes = folder.decoder, arguments.mesh and mesh_sizes(arguments.mesh)
    mesh = device_mesh(sizes) if sizes else data_mesh()
    made_of = manifest_of(arguments.artifact, folder)
    widths = made_of["statistics"]["bits"]
    ends = decoder.eos_token_ids
    tokens = text.encode_file(folder.tokenizer_path, arguments.text, decoder.vocab_size, ends)
    text.check_length(arguments.seq_len, decoder.max_position_embeddings)
    length = arguments.seq_len + 1
    begin = text.beginning(folder.tokenizer_path, decoder.vocab_size, "auto")
    text.windows(tokens, length, "training text", begin)
    corpus = FileCorpus(tokens, length, begin)
    optimiser = adamw(
        learning_rate=arguments.learning_rate,
        warmup=20,
        steps=arguments.steps,
        weight_decay=0.0,
        clip=len(widths),  # 1 for each of the losses that are summed
    )
    state, shardings, step, specs, rows = begun(
        folder, arguments.artifact, mesh, optimiser, arguments.batch_size, arguments.distill
    )
    shape = (arguments.batch_size, length)
    names = ("steps", "batch_size", "seq_len", "learning_rate", "distill")
    state = fit(
        arguments.out.with_name(arguments.out.name + ".run"),
        state,
        step,
        lambda i: global_batch(mesh, shape, partial(corpus.row, 0, i), rows),
        mesh=mesh,
        shardings=shardings,
        steps=arguments.steps,
        identity={name: getattr(arguments, name) for name in names}
        | {
            "text": checkpoint.crc32(tokens),
            "model": made_of["source_sha256"],
            "artifact": checkpoint.crc32(np.frombuffer(json.dumps(made_of).encode(), np.uint8)),
        },
        resume=arguments.resume,
        save_every=100,
        log_every=20,
    )
    trained = everywhere(state.params)
    first = jax.process_index() == 0
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # the rest takes the first process longer than others may wait
    if not first:
        return
    frozen = {
        name: qat.freeze(leaf["w"], leaf["quantizer"], specs[name])
        for name, leaf in trained.items()
    }
    experts: dict[int, dict[str, BitPlanes]] = {i: {} for i in weights.budgeted_layers(decoder)}
    for member in weights.members(decoder):
        for role in weights.budgeted(decoder, member.layer):
            stacked = frozen[".".join(member.path + role.path)]
            for r, i in enumerate(member.numbers):
                experts[i][role.path[-1]] = jax.tree.map(lambda a, r=r: a[r], stacked)
    compress(
        arguments.model,
        arguments.out,
        arguments.calibration,
        max_bits=made_of["max_bits"],
        group_size=made_of["group_size"],
        samples=made_of["calibration"]["windows"],
        seq_len=made_of["calibration"]["window_tokens"],
        effort=made_of["effort"],
        experts=list(experts.values()),
    )
    print(f"{arguments.out}: trained at {widths} bits for {arguments.steps} steps")


if __name__ == "__main__":
    program(main, "once_lm")
