"""What depth costs: the first text of a process, with models of 4 and of 32 layers.

    uv run python benchmarks/depth.py --out benchmarks/results/depth_cpu.json

Random Mixtrals of width 128 with 8 experts of 256, compressed, then continued by
`mcjax generate --act-bits 8` at a budget with several widths a layer. Each run is a process of its
own; the cold ones have an empty compilation cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from mcjax import bench
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.hub import read_json, write
from mcjax.models import weights
from mcjax.models.families import describe

RUNS = ("cold", "another budget", "again")
BUDGETS = {"cold": 2.25, "another budget": 2.625, "again": 2.25}


def make(folder: Path, layers: int) -> Path:
    """Compresses a random model of so many layers; returns the artifact."""
    config = read_json(EMBEDDED / "config.json") | {"num_hidden_layers": layers}
    source, out = folder / f"model_{layers}", folder / f"artifact_{layers}"
    source.mkdir()
    write(source, config, weights.init(describe(config)[1], jax.random.key(0)))
    (source / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
    text = EMBEDDED / "calibration.txt"
    compress(source, out, text, samples=4, seq_len=128, effort="fast")
    return out


def first_text(artifact: Path, budget: float, cache: Path) -> dict[str, float]:
    """Seconds and peak memory of one `mcjax generate` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(artifact), str(budget)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def child(artifact: str, budget: str) -> None:
    """Generates and prints what it took, what JAX says of compiling with it."""
    seconds = {"trace": 0.0, "lower": 0.0, "compile": 0.0}
    names = {
        "/jax/core/compile/jaxpr_trace_duration": "trace",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
        "/jax/core/compile/backend_compile_duration": "compile",
    }

    def listen(event, duration, **_):
        if event in names:
            seconds[names[event]] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    from mcjax.generate import generate_text

    start = time.perf_counter()
    generate_text(artifact, ["And it came"], budget=float(budget), act_bits=8, max_new_tokens=8)
    facts = {"seconds": time.perf_counter() - start, **seconds}
    status = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
    facts["peak_mb"] = int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1e3
    print(json.dumps(facts))


def main():
    """Writes one JSON object and prints its rows."""
    if "--child" in sys.argv:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in arguments.layers:
            artifact, cache = make(Path(folder), layers), Path(folder) / f"cache_{layers}"
            for run in RUNS:
                row = {"layers": layers, "run": run}
                rows.append(row | first_text(artifact, BUDGETS[run], cache))
                print(rows[-1], flush=True)
    facts = {"machine": bench.machine(), "rows": rows}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
