"""What adapters win back of two bits: the embedded language model, ten minutes on two cores.

    uv run python benchmarks/lora.py --out FILE.json

Every weight of a layer, attention and experts, is served at 2 bits and gets an adapter. These learn
the model's own predictions (its divergence) or the text (cross-entropy); beside them adapters of
the weights as they were learn the text. Perplexity is on the held-out chapters; the adapters of 2
bits are then put on 3 bits, and merged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mcjax
from mcjax import lora, text
from mcjax.compress import compress
from mcjax.divergence import divergence
from mcjax.hub import Folder

LENGTH = 256


def main() -> None:
    """Writes FILE.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--text", type=Path, default=Path("train/data/king_james.txt"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    embedded = Path(str(resources.files("mcjax") / "embedded"))
    folder = Folder(embedded)

    def windows(file):
        tokens = text.encode_file(folder.tokenizer_path, file, folder.decoder.vocab_size)
        return text.windows(tokens, LENGTH)

    held_out = windows(embedded / "held_out.txt")
    lessons = windows(arguments.text)  # the held-out chapters are not in it
    dense = mcjax.load(embedded)
    with tempfile.TemporaryDirectory() as place:
        artifact = Path(place) / "embedded.mcjax"
        compress(embedded, artifact, embedded / "calibration.txt", seq_len=LENGTH)
        two, three = (mcjax.load(artifact, bits=k, attention_bits=k) for k in (2, 3))

    def perplexity(params: Any) -> float:
        each = [loss_of_text(dense.module, params, row[None]) for row in held_out]
        return float(np.exp(np.mean(each, dtype=np.float64)))

    rows: dict[str, Any] = {
        "16 bits": {"perplexity": perplexity(dense.params)},
        "2 bits": {"perplexity": perplexity(two.params)},
        "3 bits": {"perplexity": perplexity(three.params)},
    }
    start = lora.init(jax.random.key(0), two.params, rank=arguments.rank)
    plans = {
        "2 bits, divergence": (two, True),
        "2 bits, text": (two, False),
        "16 bits, text": (dense, False),
    }
    for name, (model, taught) in plans.items():
        began = time.perf_counter()
        teacher = dense if taught else None
        adapters = trained(model, teacher, start, lessons, arguments)
        seconds = time.perf_counter() - began
        found = perplexity(lora.apply(model.params, adapters))
        rows[name] = {"perplexity": found, "seconds": seconds}
        if taught:
            on_three = perplexity(lora.apply(three.params, adapters))
            rows[f"{name}, put on 3 bits"] = {"perplexity": on_three}
            merged = perplexity(lora.merge(model.params, adapters))
            rows[f"{name}, merged"] = {"perplexity": merged}
        print(name, rows[name], flush=True)
    gap = [np.log(rows[name]["perplexity"]) for name in ("16 bits", "2 bits", "2 bits, divergence")]
    out = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "numbers": sum(leaf.size for leaf in jax.tree.leaves(start)),
        "recovered": float((gap[1] - gap[2]) / (gap[1] - gap[0])),
        **{name: getattr(arguments, name) for name in ("steps", "batch", "rank", "rate")},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))


def trained(model, teacher, adapters, lessons: np.ndarray, arguments) -> Any:
    """Adapters of a model that have learned from a teacher, or from text."""
    schedule = optax.warmup_cosine_decay_schedule(0, arguments.rate, 20, arguments.steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    given = None if teacher is None else teacher.params

    @jax.jit
    def step(adapters, state, params, given, tokens):
        def loss(adapters):
            own = lora.apply(params, adapters)
            if given is None:
                return loss_of_text(model.module, own, tokens)
            expected, got = (model.module.apply({"params": p}, tokens) for p in (given, own))
            return divergence(expected, got)

        value, gradient = jax.value_and_grad(loss)(adapters)
        change, state = optimiser.update(gradient, state)
        return optax.apply_updates(adapters, change), state, value

    state, generator = optimiser.init(adapters), np.random.default_rng(0)
    for n in range(arguments.steps):
        some = generator.choice(len(lessons), arguments.batch, replace=False)
        adapters, state, value = step(adapters, state, model.params, given, lessons[some])
        if n % 50 == 0:
            print(n, float(value), flush=True)
    return adapters


def loss_of_text(module, params, tokens) -> jax.Array:
    """Mean cross-entropy of each token given those before it."""
    return _loss_of_text(module, params, jnp.asarray(tokens))


def _loss(module, params, tokens):
    logits = module.apply({"params": params}, tokens)[:, :-1]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


_loss_of_text = jax.jit(_loss, static_argnums=0)


if __name__ == "__main__":
    main()
