"""One nested artifact against dedicated GPTQ, width by width, on text that nothing was tuned on.

    uv run python benchmarks/nested_vs_gptq.py MODEL ARTIFACT --calibration TEXT --text TEXT

The baseline is built as usual for GPTQ: layer by layer, each layer calibrated on the outputs of the
layers already quantised, attention at 4 bits, full error compensation, float32 scales. It uses the
artifact's group size and calibration windows.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mcjax
from mcjax import checkpoint, pmq, serving, text
from mcjax.bitplane import resolve_group_size
from mcjax.calibrate import capture, combine_weights
from mcjax.convert import HuggingFaceFolder
from mcjax.models import Mixtral
from mcjax.models.mixtral import layer as layer_module
from mcjax.quantize import gptq
from mcjax.quantize.gram import condition


@partial(jax.jit, static_argnames="layer")
def routed_grams(layer, params, x):
    """Plain sums of x x' over the tokens that reach each weight."""
    y, seen = capture(layer, params, x)
    tokens = seen["moe_input"].reshape(-1, x.shape[-1])
    routed = (combine_weights(tokens, params["moe"]["router"], layer.config) > 0).astype(x.dtype)
    experts = params["moe"]["experts"]

    def one_expert(expert):
        gate, up, routed = expert
        hidden = jax.nn.silu(tokens @ gate) * (tokens @ up)
        return (tokens.T * routed) @ tokens, (hidden.T * routed) @ hidden

    expert_grams = jax.lax.map(one_expert, (experts["gate"], experts["up"], routed.T))
    flat = [seen[n].reshape(-1, seen[n].shape[-1]) for n in ("attention_input", "attention_output")]
    return y, (*(a.T @ a for a in flat), *expert_grams)


def dedicated(folder, windows, bits, group_size):
    """A dense parameter tree whose experts went through GPTQ at one width."""
    params = folder.read(np.float32)
    x = params["embedding"][windows]
    for i in range(folder.config.num_hidden_layers):
        layer, p = layer_module(folder.config, None, i), params[f"layer_{i}"]
        batches = [x[s : s + 16] for s in range(0, len(x), 16)]
        grams = [routed_grams(layer, p, b)[1] for b in batches]
        into, out, expert_in, expert_hidden = (sum(g) for g in zip(*grams, strict=True))

        def one(w, gram, bits):
            size = resolve_group_size(w.shape[-2], group_size)
            function = partial(gptq, bits=bits, group_size=size)
            return (jax.vmap(function) if w.ndim == 3 else function)(w, condition(gram))

        attention = {n: one(w, out if n == "o" else into, 4) for n, w in p["attention"].items()}
        experts = {
            n: one(w, expert_hidden if n == "down" else expert_in, bits)
            for n, w in p["moe"]["experts"].items()
        }
        p = {**p, "attention": attention, "moe": {**p["moe"], "experts": experts}}
        params[f"layer_{i}"] = p
        x = jnp.concatenate([routed_grams(layer, p, b)[0] for b in batches])
    return params


def main():
    """Prints one JSON object with every perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    folder = HuggingFaceFolder(arguments.model)
    manifest = checkpoint.read_manifest(Path(arguments.artifact))
    read = partial(text.encode_file, folder.tokenizer_path, vocab_size=folder.config.vocab_size)
    made_of = manifest["calibration"]
    calibration = text.windows(read(text_path=arguments.calibration), made_of["window_tokens"])
    calibration = text.spread(calibration, made_of["windows"])
    windows = text.windows(read(text_path=arguments.text), arguments.seq_len)
    dense = Mixtral(folder.config)
    out = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    out["16 bit"] = text.perplexity(dense, folder.read(np.float32), windows)[0]

    def served(**precision):
        model = mcjax.load(arguments.artifact, **precision)
        value = text.perplexity(model.module, model.params, windows)[0]
        return {"perplexity": value, "effective_bits": model.effective_bits}

    stats = serving.statistics(manifest)
    for bits in stats.bits:
        params = dedicated(folder, calibration, bits, manifest["group_size"])
        out[f"dedicated GPTQ {bits}"] = text.perplexity(dense, params, windows)[0]
        out[f"nested {bits}"] = served(bits=bits)
        print(json.dumps(out), flush=True)
    published = pmq.ExpertStatistics(
        frequency=stats.frequency,
        routing_weight=stats.routing_weight,
        error=stats.error[..., :3],
        bits=(1, 2, 3),
    )
    rng = np.random.default_rng(0)
    for budget in (1.5, 2.0, 2.5):
        allocation = pmq.allocate(published, budget)
        out[f"budget {budget}"] = served(budget=budget)
        out[f"published rule {budget}"] = served(allocation=allocation)
        out[f"random {budget}"] = served(allocation=rng.permuted(allocation, axis=1))
        for scope in pmq.SCOPES:
            for gamma in (1.0, 2.0):
                rule = {"alpha": 0.0, "beta": 0.0, "published_rows": False}
                chosen = pmq.allocate(stats, budget, scope, gamma=gamma, **rule)
                out[f"error only, {scope}, gamma {gamma:g}, {budget}"] = served(allocation=chosen)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
