"""What the rotation of input features costs a decoded token: the same planes with it and without.

    uv run python benchmarks/rotation.py --out FILE

The model is `mcjax bench`'s, of 195 million parameters, with int8 activations; both take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from mcjax import bench
from mcjax.bitplane import BitPlanes, MixedPlanes

STEPS = 16


def main():
    """Writes one JSON object and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=30)
    arguments = parser.parse_args()

    def is_planes(leaf):
        return isinstance(leaf, BitPlanes | MixedPlanes)

    module, rotated = bench.served_moe()
    plain = jax.tree.map(lambda w: w.unrotated() if is_planes(w) else w, rotated, is_leaf=is_planes)

    def milliseconds(params):
        start = time.perf_counter()
        jax.block_until_ready(bench.write_tokens(module, params, STEPS))
        return 1e3 * (time.perf_counter() - start) / STEPS

    both = {"rotated": rotated, "plain": plain}
    for params in both.values():
        milliseconds(params)
    times: dict[str, list[float]] = {name: [] for name in both}
    for i in range(arguments.pairs):
        for name in both if i % 2 else reversed(both):
            times[name].append(milliseconds(both[name]))
    ratios = np.array(times["rotated"]) / np.array(times["plain"])
    facts = {
        "machine": bench.machine(),
        "ms": {name: float(np.median(values)) for name, values in times.items()},
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.5, 0.75]).tolist(),
        "pairs": arguments.pairs,
    }
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
