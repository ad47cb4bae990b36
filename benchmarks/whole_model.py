"""One artifact at 4, 3 and 2 bits in every product, attention included, beside dedicated GPTQ.

    uv run python benchmarks/whole_model.py MODEL --calibration TEXT --text TEXT --out FILE

MODEL is a Hugging Face folder of any family. The figures that count are ratios to the model as it
is, on the same windows; the baseline, `mcjax.baseline`, is made anew for each width.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import mcjax
from mcjax import bench, checkpoint, serving, text
from mcjax.baseline import dedicated_gptq
from mcjax.compress import compress
from mcjax.hub import Folder

WIDTHS = (4, 3, 2)


def main():
    """Writes one JSON object and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    folder = Folder(arguments.model)
    vocab_size, tokenizer = folder.decoder.vocab_size, folder.tokenizer_path
    begin = text.beginning(tokenizer, vocab_size, "auto")

    def windows(file, count):
        tokens = text.encode_file(tokenizer, file, vocab_size)[:count]
        return text.windows(tokens, arguments.seq_len, begin=begin)

    held_out = windows(arguments.text, arguments.max_tokens)
    dense = mcjax.load(arguments.model)
    full = text.perplexity(dense.module, dense.params, held_out)[0]
    del dense
    rows = [{"name": "16 bits", "perplexity": full, "ratio": 1.0}]

    def add(name, module, params, **more):
        value = text.perplexity(module, params, held_out)[0]
        rows.append({"name": name, "perplexity": value, "ratio": value / full, **more})
        print(rows[-1], flush=True)
        return module

    with tempfile.TemporaryDirectory() as place:
        artifact, start = Path(place) / "artifact", time.perf_counter()
        compress(
            arguments.model,
            artifact,
            arguments.calibration,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
        )
        seconds = time.perf_counter() - start
        for bits in WIDTHS:
            model = mcjax.load(artifact, bits=bits, attention_bits=bits)
            more = {"bytes_read": model.bytes_read, "effective_bits": model.effective_bits}
            module = add(f"one artifact, {bits} bits", model.module, model.params, **more)
        stats = serving.statistics(checkpoint.read_manifest(artifact))
    calibration = text.spread(windows(arguments.calibration, None), arguments.samples)
    for bits in WIDTHS:
        uniform = np.full(stats.frequency.shape, bits)
        params = dedicated_gptq(folder, calibration, uniform, batch=8, attention_bits=bits)
        add(f"dedicated GPTQ, {bits} bits", module, params)
    facts = {"machine": bench.machine(), "rows": rows, "compress_seconds": seconds}
    facts |= {"windows": len(held_out), "seq_len": arguments.seq_len}
    facts["calibration_windows"] = len(calibration)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
