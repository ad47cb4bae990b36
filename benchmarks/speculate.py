"""Self-speculative decoding: what is accepted, and what that does for speed.

    uv run python benchmarks/speculate.py [--artifact DIR] [--out FILE]

On the embedded model, and on one of the sizes of `mcjax bench` with a head of its own: its weights
are random, which is nothing to learn the acceptance of few planes from, so it drafts with all of
them and differs from its drafts in the rounding of activations alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

import mcjax
from mcjax import bench, text
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.generate import generate_blocks
from mcjax.sampling import Sampling
from mcjax.speculate import Draft, Tally, self_draft

PROMPT = 64
DRAFTS = ((1, 2), (2, 1), (2, 3), (3, 3), (3, 5), (4, 4), (4, 8))
"""Bits and tokens at once of the embedded model's drafts."""


def decode(module, params, prompts, new_tokens, sampling, draft=None, tally=None):
    """Writes once: the tokens [B, N], and how many a second of wall and of CPU time.

    The prefill and the first run after it, which may compile, are not counted.
    """
    blocks, wall, cpu = [], 0.0, 0.0
    for run, block in enumerate(
        generate_blocks(
            module,
            params,
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
    """Writes one JSON object with rows of model, activations, draft, batch and temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artifact", help="the embedded model, compressed; made if not given")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "speculate_cpu.json"
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompts", type=int, default=8, help="of batch 1, one by one")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = arguments.artifact
        if artifact is None:
            artifact = Path(folder) / "artifact"
            compress(EMBEDDED, artifact, EMBEDDED / "calibration.txt", samples=64, seq_len=256)
        for act_bits in (None, 8):
            model = mcjax.load(artifact, bits=arguments.bits, act_bits=act_bits)
            tokens = text.encode_file(
                EMBEDDED / "tokenizer.json",
                EMBEDDED / "held_out.txt",
                model.module.config.vocab_size,
            )
            prompts = text.spread(text.windows(tokens, PROMPT), arguments.prompts).tolist()
            drafts = {
                (bits, length): self_draft(model, bits, length)
                for bits, length in DRAFTS
                if act_bits is None or bits < arguments.bits
            }
            rows += measure("embedded", model.module, model.params, prompts, drafts, arguments)
    config = bench.MOE | {"tie_word_embeddings": False}
    module, params = bench.served_moe(act_bits=None, config=config)
    rounded = module.clone(act_bits=8)
    prompts = np.random.default_rng(0).integers(
        0, config["vocab_size"], (arguments.prompts, PROMPT)
    )
    drafts = {
        (bench.BUDGET + 1, length): Draft(module=rounded, params=params, length=length)
        for length in (2, 4, 8)
    }
    rows += measure("200M, random", module, params, prompts.tolist(), drafts, arguments)
    facts = {"machine": bench.machine(), "rows": rows}
    facts |= {"new_tokens": arguments.new_tokens, "prompt_tokens": PROMPT}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(rows))


def measure(name, module, params, prompts, drafts, arguments):
    """Rows of every draft beside plain decoding, run in turns."""
    rows = []
    for batch in arguments.batches:
        for temperature in arguments.temperatures:
            # The likeliest tokens of every prompt; for draws, one prompt tells as much.
            count = len(prompts) // batch if temperature == 0 else 1
            groups = [prompts[i * batch : (i + 1) * batch] for i in range(count)]
            variants = [None, *drafts.values()]
            tallies = [Tally() for _ in variants]
            same = [0] * len(variants)
            speeds = []
            for group in groups:
                common = module, params, group, arguments.new_tokens
                common += (Sampling(temperature=temperature),)
                written = [
                    decode(*common, draft, tally)[0]
                    for draft, tally in zip(variants, tallies, strict=True)
                ]
                same = [
                    n + (w == written[0]).all(1).sum() for n, w in zip(same, written, strict=True)
                ]
                # In turns, so that whatever else the machine does slows all of them.
                speeds += [
                    [decode(*common, draft)[1:] for draft in variants]
                    for _ in range(arguments.repeats)
                ]
            speeds = np.array(speeds)
            for i, (bits, length) in enumerate(drafts, start=1):
                ratio = speeds[:, i] / speeds[:, 0]
                row = {
                    "model": name,
                    "act_bits": module.act_bits,
                    "batch": batch,
                    "temperature": temperature,
                    "draft_bits": bits,
                    "draft_act_bits": drafts[bits, length].module.act_bits,
                    "draft_length": length,
                    "acceptance": tallies[i].acceptance,
                    "tokens_per_second": float(np.median(speeds[:, i, 0])),
                    "plain_tokens_per_second": float(np.median(speeds[:, 0, 0])),
                    "speed_ratio": float(np.median(ratio[:, 0])),
                    "spread_of_ratio": np.percentile(ratio[:, 0], [25, 75]).tolist(),
                    "cpu_time_ratio": float(np.median(ratio[:, 1])),
                }
                if temperature == 0:
                    row |= {"prompts": count * batch, "same_tokens": int(same[i])}
                rows.append(row)
                print(row, flush=True)
    return rows


def table(rows):
    """The greedy rows at batch 1 as Markdown."""
    lines = [
        "| model | draft | drafted at once | accepted | speed (quartiles) | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (row["batch"], row["temperature"]) != (1, 0):
            continue
        low, high = row["spread_of_ratio"]
        activations = "float" if row["act_bits"] is None else "int8"
        cells = [
            f"{row['model']}, {activations} activations",
            f"{row['draft_bits']} bits, int8",
            str(row["draft_length"]),
            f"{row['acceptance']:.0%}",
            f"{row['speed_ratio']:.2f}x ({low:.2f} to {high:.2f})",
            f"{row['tokens_per_second']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
