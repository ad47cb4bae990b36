"""Self-speculative decoding on the embedded model: what is accepted, and what that does for speed.

uv run python benchmarks/speculate.py [--artifact DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import mcjax
from mcjax import text
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.generate import generate_blocks
from mcjax.sampling import Sampling
from mcjax.speculate import Tally, self_draft


def decode(model, prompts, new_tokens, sampling, draft=None, tally=None):
    """Writes once: the tokens [B, N], and how many a second of wall and of CPU time.

    The prefill and the first run after it, which may compile, are not counted.
    """
    blocks, wall, cpu = [], 0.0, 0.0
    for run, block in enumerate(
        generate_blocks(
            model.module,
            model.params,
            prompts,
            new_tokens,
            sampling=sampling,
            draft=draft,
            tally=tally,
        )
    ):
        if run == 1:
            wall, cpu = time.perf_counter(), time.process_time()
        blocks.append(block)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    counted = len(prompts) * sum(block.shape[1] for block in blocks[2:])
    return np.concatenate(blocks, axis=1), counted / wall, counted / cpu


def main():
    """Writes one JSON object: rows of draft width and length, batch and temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artifact", help="the embedded model, compressed; made if not given")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "speculate_embedded_cpu.json",
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--draft-bits", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact
        if artifact is None:
            artifact = Path(folder) / "artifact"
            compress(EMBEDDED, artifact, EMBEDDED / "calibration.txt", samples=64, seq_len=256)
        out = measure(artifact, arguments)
    arguments.out.write_text(json.dumps(out, indent=1) + "\n")


def measure(artifact, arguments):
    """The facts: every draft beside plain decoding, run in turns."""
    model = mcjax.load(artifact, bits=arguments.bits)
    tokens = text.encode_file(
        EMBEDDED / "tokenizer.json", EMBEDDED / "held_out.txt", model.module.config.vocab_size
    )
    prompts = text.spread(text.windows(tokens, arguments.prompt_tokens), max(arguments.batches))
    drafts = [
        self_draft(model, bits, length)
        for bits in arguments.draft_bits
        for length in arguments.draft_lengths
    ]
    rows = []
    for batch in arguments.batches:
        for temperature in arguments.temperatures:
            sampling = Sampling(temperature=temperature)
            common = (model, prompts[:batch].tolist(), arguments.new_tokens, sampling)
            tallies = [Tally() for _ in drafts]
            variants = [(None, None), *zip(drafts, tallies, strict=True)]
            written = [decode(*common, draft, tally)[0] for draft, tally in variants]
            # In turns, so that whatever else the machine does slows all of them.
            speeds = np.array(
                [
                    [decode(*common, draft)[1:] for draft, _ in variants]
                    for _ in range(arguments.repetitions)
                ]
            )
            for i, (draft, tally) in enumerate(variants[1:], start=1):
                ratio = np.median(speeds[:, i] / speeds[:, 0], axis=0)
                row = {
                    "batch": batch,
                    "temperature": temperature,
                    "draft_bits": draft.module.planes.draft,
                    "draft_length": draft.length,
                    "acceptance": tally.acceptance,
                    "tokens_per_second": float(np.median(speeds[:, i, 0])),
                    "plain_tokens_per_second": float(np.median(speeds[:, 0, 0])),
                    "speed_ratio": float(ratio[0]),
                    "cpu_time_ratio": float(ratio[1]),
                }
                if temperature == 0:
                    row["same_tokens"] = bool((written[i] == written[0]).all())
                rows.append(row)
                print(row, flush=True)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bits": arguments.bits,
        "new_tokens": arguments.new_tokens,
        "prompt_tokens": arguments.prompt_tokens,
        "repetitions": arguments.repetitions,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
