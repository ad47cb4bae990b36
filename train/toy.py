"""Trains a toy Mixtral on Python's own documentation, to have something real to compress.

    uv run python train/toy.py toy            (about two minutes on 2 cores)

writes toy/model (Hugging Face form), toy/calibration.txt (training text) and toy/eval.txt (text it
never saw). The text is the language reference that every Python carries in `pydoc_data.topics`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer

from mcjax.convert import write_hugging_face
from mcjax.models import Mixtral, MixtralConfig
from mcjax.text import negative_log_likelihood, windows

CONFIG = MixtralConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps (default 400)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"toy: error: {arguments.out} exists")
    folder = arguments.out / "model"
    folder.mkdir(parents=True)

    pages = [topics[name] for name in sorted(topics)]
    held_out = pages[::8]
    training = [page for i, page in enumerate(pages) if i % 8]
    (arguments.out / "eval.txt").write_text("\n".join(held_out), encoding="utf-8")
    (arguments.out / "calibration.txt").write_text("\n".join(training), encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(training, vocab_size=CONFIG.vocab_size, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    data = windows(np.array(tokenizer.encode("\n".join(training)).ids, np.int32), 128)

    model = Mixtral(CONFIG)
    params = model.init(jax.random.key(0), data[:1, :4])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-3, 40, arguments.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            return negative_log_likelihood(model, params, tokens) / tokens[:, 1:].size

        value, gradient = jax.value_and_grad(loss)(params)
        update, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, update), state, value

    state, rng = optimiser.init(params), np.random.default_rng(0)
    console = Console(stderr=True)
    for i in track(range(arguments.steps), description="training", console=console):
        batch = data[rng.integers(0, len(data), 8)]
        params, state, value = step(params, state, jnp.asarray(batch))
        if i % 100 == 99:
            console.print(f"step {i + 1}: loss {value:.3f}")
    write_hugging_face(folder, CONFIG, params)
    print(f"{arguments.out}: model, calibration.txt, eval.txt")


if __name__ == "__main__":
    main()
