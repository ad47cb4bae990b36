"""One nested artifact against dedicated GPTQ, width by width, on text that nothing was tuned on.

    uv run python benchmarks/nested_vs_gptq.py MODEL ARTIFACT --calibration TEXT --text TEXT

The baseline is `mcjax.baseline`; it uses the artifact's group size and calibration windows.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np

import mcjax
from mcjax import allocate, checkpoint, pmq, text
from mcjax.baseline import dedicated_gptq
from mcjax.hub import Folder
from mcjax.models.language_model import LanguageModel


def main():
    """Prints one JSON object with every perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    folder = Folder(arguments.model)
    manifest = checkpoint.read_manifest(Path(arguments.artifact))
    read = partial(text.encode_file, folder.tokenizer_path, vocab_size=folder.decoder.vocab_size)
    made_of = manifest["calibration"]
    calibration = text.windows(read(text_path=arguments.calibration), made_of["window_tokens"])
    calibration = text.spread(calibration, made_of["windows"])
    windows = text.windows(read(text_path=arguments.text), arguments.seq_len)
    dense = LanguageModel(folder.decoder)
    out = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    out["16 bit"] = text.perplexity(dense, folder.read(np.float32), windows)[0]

    def served(**precision):
        model = mcjax.load(arguments.artifact, **precision)
        value = text.perplexity(model.module, model.params, windows)[0]
        return {"perplexity": value, "effective_bits": model.effective_bits}

    stats = allocate.statistics(manifest, manifest["max_bits"])
    for bits in stats.bits:
        uniform = np.full(stats.frequency.shape, bits)
        params = dedicated_gptq(folder, calibration, uniform, manifest["group_size"])
        out[f"dedicated GPTQ {bits}"] = text.perplexity(dense, params, windows)[0]
        out[f"nested {bits}"] = served(bits=bits)
        print(json.dumps(out), flush=True)
    rng = np.random.default_rng(0)
    for budget in (1.5, 2.0, 2.5):
        allocation = allocate.published(manifest, budget)
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
