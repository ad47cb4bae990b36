"""Time and error of quantising to all widths at once, beside four runs of GPTQ in torch.

    python benchmarks/quantise.py        # in an environment with torch, see peers.py

One expert matrix of `bench.MOE` with random weights, inputs whose features are correlated. GPTQ is
as in arXiv 2210.17323: 128 columns at a time, groups of 128, asymmetric grids.
Errors are ||X (w - W_k)||^2 over ||X w||^2.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import mcjax
from mcjax import bench
from mcjax.compress import EFFORTS

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


def main():
    """Prints a table and writes its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "quantise_cpu.json"
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    d_in, d_out = bench.MOE.hidden_size, bench.MOE.intermediate_size
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (d_in, d_out)) * d_in**-0.5
    mixing = jnp.eye(d_in) + jax.random.normal(keys[1], (d_in, d_in)) * d_in**-0.5
    x = jax.random.normal(keys[2], (4 * d_in, d_in)) @ mixing
    gram = x.T @ x
    weight, matrix = torch.from_numpy(np.array(w.T)), torch.from_numpy(np.array(gram))

    def error(quantised):
        change = np.asarray(w, np.float64) - np.asarray(quantised, np.float64)
        h = np.asarray(gram, np.float64)
        return float(np.sum(change * (h @ change)) / np.sum(w * (h @ np.asarray(w))))

    def run_torch():
        return [torch_gptq(weight, matrix, k) for k in WIDTHS]

    def run_ours(sweeps):
        return jax.block_until_ready(
            mcjax.quantize(w, bits=4, group_size=GROUP, gram=gram, sweeps=sweeps)
        )

    candidates = {"four GPTQ runs, torch": run_torch}
    for effort, sweeps in EFFORTS.items():
        candidates[f"mcjax, effort {effort}"] = lambda sweeps=sweeps: run_ours(sweeps)
    seconds = {name: [] for name in candidates}
    results = {name: run() for name, run in candidates.items()}  # compiles, too
    for _ in range(arguments.repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, result in results.items():
        if name.startswith("mcjax"):
            errors = [error(result.slice(k).dequantize()) for k in WIDTHS]
        else:
            errors = [error(value.numpy().T) for value in result]
        rows.append({"name": name, "seconds": seconds[name], "errors": errors})
    facts = {
        "machine": bench.machine(),
        "shape": [d_in, d_out],
        "widths": WIDTHS,
        "group_size": GROUP,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    first = np.median(rows[0]["seconds"])
    print(f"| {d_in} x {d_out} | seconds | times GPTQ's | error at 1, 2, 3, 4 bits |")
    print("|---|---|---|---|")
    for row in rows:
        middle = np.median(row["seconds"])
        errors = ", ".join(f"{value:.4f}" for value in row["errors"])
        print(f"| {row['name']} | {middle:.2f} | {middle / first:.2f} | {errors} |")


if __name__ == "__main__":
    main()
