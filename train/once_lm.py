"""Once-QAT of a language model's experts, from a compressed artifact to a better one of its kind.

    uv run python train/once_lm.py MODEL ARTIFACT OUT --text TEXT --calibration TEXT

MODEL is the Hugging Face folder that ARTIFACT was compressed from. Its experts start as they are
in the artifact, weights at the widest width and all tables, and train at all widths at once; the
16-bit model teaches the widest width, each width the next lower one. Everything else stays. OUT is
an artifact like any other: same bytes, same commands. OUT.run keeps checkpoints and metrics, and
--resume goes on from them.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from loop import State, adamw, data_mesh, fit, global_batch, program
from moe_lm import FileCorpus

from mcjax import checkpoint, qat, serving, text
from mcjax.compress import compress
from mcjax.convert import HuggingFaceFolder
from mcjax.models import Mixtral

EXPERTS = checkpoint.EXPERT_WEIGHTS


def start(artifact: Path, params: Any) -> tuple[Any, Any, dict[str, qat.QuantSpec]]:
    """What trains, what stays, and each expert weight's spec.

    Args:
      artifact: the compressed model.
      params: the 16-bit model's, float32.

    Returns:
      `{layer: {weight: {"w", "quantizer"}}}`; parameters with the artifact's attention; specs.
    """
    model = serving.load(artifact)  # every expert at the widest width
    reader = checkpoint.ArtifactReader(artifact)
    geometry, widths = reader.manifest["geometry"], reader.manifest["statistics"]["bits"]
    specs = {
        name: qat.QuantSpec(
            widths=tuple(reversed(widths)),
            group_size=geometry[f"moe.experts.{name}"]["group_size"],
            act_bits=None,
        )
        for name in EXPERTS
    }
    trained, kept = {}, dict(params)
    for i in range(model.module.config.num_hidden_layers):
        layer = f"layer_{i}"
        own = model.params[layer]
        trained[layer] = {}
        for name in EXPERTS:
            (planes,) = own["moe"]["experts"][name].stacks
            tables = [
                jnp.asarray(
                    np.stack(
                        reader.read(
                            (f"layers/{i}", f"moe.experts.{name}.table_{k}", e)
                            for e in range(planes.shape[0])
                        )
                    )
                )
                for k in widths
            ]
            every = dataclasses.replace(planes, widths=tuple(widths), tables=tuple(tables))
            trained[layer][name] = {
                "w": planes.dequantize(),
                "quantizer": qat.from_planes(every),
            }
        attention = {name: p.dequantize() for name, p in own["attention"].items()}
        kept[layer] = {**params[layer], "attention": attention}
    return trained, kept, specs


def served_at(trained: Any, kept: Any, specs: Any, bits: int) -> Any:
    """Parameters of the model with its experts as they are served at a width."""
    params = dict(kept)
    for layer, weights in trained.items():
        experts = {
            name: qat.fake_quant(leaf["w"], leaf["quantizer"], specs[name], bits)
            for name, leaf in weights.items()
        }
        params[layer] = {**kept[layer], "moe": {**kept[layer]["moe"], "experts": experts}}
    return params


def make_step(module: Mixtral, teacher: Any, kept: Any, specs: Any, optimiser, objective, distill):
    """The jitted training step; `State.extra` is the objective's state."""
    widths = specs["gate"].widths

    def losses(trained, tokens):
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
    def step(state: State, tokens: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        gradient, values, _, _, extra = qat.combine(
            lambda trained: losses(trained, tokens), state.params, objective, state.extra
        )
        update, opt = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, update)
        metrics = {f"loss_{k}": v for k, v in zip(widths, values, strict=True)}
        return State(state.step + 1, params, opt, extra), metrics

    return step


def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("out", type=Path, help="the artifact to write; must not exist")
    parser.add_argument("--text", required=True, help="training text")
    parser.add_argument("--calibration", required=True, help="as in mcjax compress")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--distill", type=float, default=0.7)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists; remove it or choose another place")
    folder = HuggingFaceFolder(arguments.model)
    config, teacher = folder.config, folder.read(np.float32)
    trained, kept, specs = start(arguments.artifact, teacher)
    tokens = text.encode_file(folder.tokenizer_path, arguments.text, config.vocab_size)
    length = arguments.seq_len + 1
    text.windows(tokens, length, "training text")
    corpus, mesh = FileCorpus(tokens, length), data_mesh()
    optimiser = adamw(
        learning_rate=arguments.learning_rate,
        warmup=20,
        steps=arguments.steps,
        weight_decay=0.0,
        clip=len(specs["gate"].widths),  # 1 for each of the losses that are summed
    )
    objective = qat.fixed()
    extra = objective.init(len(specs["gate"].widths))
    state = State(jnp.zeros((), jnp.int32), trained, optimiser.init(trained), extra)
    step = make_step(Mixtral(config), teacher, kept, specs, optimiser, objective, arguments.distill)
    shape = (arguments.batch_size, length)
    names = ("steps", "batch_size", "seq_len", "learning_rate", "distill")
    state = fit(
        arguments.out.with_name(arguments.out.name + ".run"),
        state,
        step,
        lambda i: global_batch(mesh, shape, partial(corpus.row, 0, i)),
        mesh=mesh,
        steps=arguments.steps,
        identity={name: getattr(arguments, name) for name in names},
        resume=arguments.resume,
        save_every=100,
        log_every=20,
    )
    experts = [
        {
            name: qat.freeze(leaf["w"], leaf["quantizer"], specs[name])
            for name, leaf in state.params[f"layer_{i}"].items()
        }
        for i in range(config.num_hidden_layers)
    ]
    made_of = checkpoint.read_manifest(arguments.artifact)
    compress(
        arguments.model,
        arguments.out,
        arguments.calibration,
        max_bits=made_of["max_bits"],
        group_size=made_of["group_size"],
        samples=made_of["calibration"]["windows"],
        seq_len=made_of["calibration"]["window_tokens"],
        experts=experts,
    )
    print(f"{arguments.out}: trained at {specs['gate'].widths} bits for {arguments.steps} steps")


if __name__ == "__main__":
    program(main, "once_lm")
