"""Time and error of quantising to all widths at once, beside four runs of GPTQ in torch.

    python benchmarks/quantise.py        # in an environment with torch, see peers.py

One expert matrix of `bench.MOE` with random weights, inputs whose features are correlated. GPTQ is
as in arXiv 2210.17323: 128 columns at a time, groups of 128, asymmetric grids.
Errors are ||X (w - W_k)||^2 over ||X w||^2. Then the embedded model by each effort.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import mcjax
from mcjax import bench
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.evaluate import evaluate
from mcjax.job import EFFORTS

GROUP = 128
BLOCK = 128
DAMPING = 0.01
WIDTHS = (1, 2, 3, 4)


def torch_gptq(weight, gram, bits):
    """The dequantised weight [d_out, d_in]; `weight` is [d_out, d_in], `gram` [d_in, d_in]."""
    weight = weight.clone()
    d_in = weight.shape[1]
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(d_in)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    out = torch.zeros_like(weight)
    top = 2**bits - 1
    for start in range(0, d_in, BLOCK):
        stop = min(start + BLOCK, d_in)
        block, corner = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if (start + i) % GROUP == 0:
                group = weight[:, start + i : start + i + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                step = (high - low) / top
                zero = torch.round(-low / step)
            column = block[:, i]
            level = torch.clamp(torch.round(column / step) + zero, 0, top)
            value = step * (level - zero)
            out[:, start + i] = value
            error = (column - value) / corner[i, i]
            block[:, i:] -= error[:, None] * corner[i, i:][None]
            errors[:, i] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return out


def matrices(repeats):
    """Rows of one matrix quantised by GPTQ width for width, and by each effort once."""
    d_in, d_out = bench.MOE.hidden_size, bench.MOE.intermediate_size
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (d_in, d_out)) * d_in**-0.5
    mixing = jnp.eye(d_in) + jax.random.normal(keys[1], (d_in, d_in)) * d_in**-0.5
    x = jax.random.normal(keys[2], (4 * d_in, d_in)) @ mixing
    gram = x.T @ x
    weight, matrix = torch.from_numpy(np.array(w.T)), torch.from_numpy(np.array(gram))
    exact, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)

    def error(quantised):
        change = exact - np.asarray(quantised, np.float64)
        return float(np.sum(change * (h @ change)) / np.sum(exact * (h @ exact)))

    def by_torch():
        return [torch_gptq(weight, matrix, k) for k in WIDTHS]

    candidates = {"four GPTQ runs, torch": by_torch}
    for effort, sweeps in EFFORTS.items():
        candidates[f"mcjax, effort {effort}"] = partial(
            mcjax.quantize, w, 4, GROUP, gram, sweeps=sweeps
        )
    rows = bench.timed(candidates, repeats)
    for row in rows:
        result = candidates[row["name"]]()
        if isinstance(result, list):
            values = [value.numpy().T for value in result]
        else:
            values = [result.slice(k).dequantize() for k in WIDTHS]
        row["errors"] = [error(value) for value in values]
    return rows


def models(repeats):
    """Rows of the embedded model compressed by each effort, with its perplexity at each width."""
    with tempfile.TemporaryDirectory() as folder:

        def make(effort):
            out = Path(folder) / effort
            shutil.rmtree(out, ignore_errors=True)
            text = EMBEDDED / "calibration.txt"
            compress(EMBEDDED, out, text, samples=64, seq_len=256, effort=effort)

        rows = bench.timed({effort: partial(make, effort) for effort in EFFORTS}, repeats)
        for row in rows:
            judge = partial(evaluate, Path(folder) / row["name"], EMBEDDED / "held_out.txt")
            row["perplexity"] = [judge(bits=k, seq_len=256)["perplexity"] for k in WIDTHS]
    return rows


def markdown(facts):
    """A table of each."""
    d_in, d_out = facts["shape"]
    lines = [
        f"| {d_in} x {d_out} | seconds | times GPTQ's | error at 1, 2, 3, 4 bits |",
        "|---|---|---|---|",
    ]
    for row in facts["matrices"]:
        errors = ", ".join(f"{value:.4f}" for value in row["errors"])
        seconds, times = row["ms"] / 1e3, 1 / row["speedup"]
        lines.append(f"| {row['name']} | {seconds:.2f} | {times:.2f} | {errors} |")
    lines += ["", "| `mcjax compress --effort` | seconds | perplexity |", "|---|---|---|"]
    for row in facts["models"]:
        perplexity = ", ".join(f"{value:.2f}" for value in row["perplexity"])
        lines.append(f"| {row['name']} | {row['ms'] / 1e3:.1f} | {perplexity} |")
    return "\n".join(lines)


def main():
    """Prints the tables and writes their JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "quantise_cpu.json"
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    facts = {
        "machine": bench.machine(),
        "shape": [bench.MOE.hidden_size, bench.MOE.intermediate_size],
        "widths": WIDTHS,
        "group_size": GROUP,
        "matrices": matrices(arguments.repeats),
        "models": models(arguments.repeats),
    }
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(markdown(facts))


if __name__ == "__main__":
    main()
