"""What depth costs: the first text of a process, with models of 4 and of 32 layers.

    uv run python benchmarks/depth.py --out benchmarks/results/depth_cpu.json
    uv run python benchmarks/depth.py --kinds indexed chunked convolutional dense --out FILE

Random models of width 128, with 8 experts of 256 unless they are dense: Mixtrals, or of another
kind. They are compressed, then continued by `mcjax generate --act-bits 8` at a budget with several
widths a layer. Each run is a process of its own; the cold ones have an empty compilation cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from mcjax import bench
from mcjax.compress import compress
from mcjax.demo import EMBEDDED
from mcjax.hub import read_json, write
from mcjax.models import weights
from mcjax.models.families import describe

RUNS = ("cold", "another budget", "again")
BUDGETS = {"cold": 2.25, "another budget": 2.625, "again": 2.25}


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
ROUTED = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}

KINDS: dict[str, dict[str, Any]] = {
    "routed": {},
    "indexed": ROUTED
    | {"model_type": "deepseek_v32", "intermediate_size": 256, "n_routed_experts": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64}
    | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "n_group": 2}
    | {"topk_group": 1, "first_k_dense_replace": 1, "index_topk": 16, "index_n_heads": 4}
    | {"index_head_dim": 32},
    "chunked": HEADS
    | {"model_type": "llama4_text", "intermediate_size": 256, "intermediate_size_mlp": 256}
    | {"num_local_experts": 8, "attention_chunk_size": 16},
    "convolutional": ROUTED
    | {"model_type": "lfm2_moe", "intermediate_size": 256, "num_experts": 8}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_dense_layers": 0},
    "dense": HEADS | {"model_type": "llama", "intermediate_size": 256},
}
"""What a config says beside the sizes that all have; a routed one is the embedded Mixtral's."""


def make(folder: Path, kind: str, layers: int) -> Path:
    """Compresses a random model of so many layers; returns the artifact."""
    config = read_json(EMBEDDED / "config.json")
    if kind != "routed":
        shared = ("vocab_size", "hidden_size", "max_position_embeddings")
        config = {name: config[name] for name in shared} | KINDS[kind]
    if kind == "convolutional":
        config["layer_types"] = ["conv", "conv", "full_attention", "conv"] * (layers // 4)
    config["num_hidden_layers"] = layers
    source, out = folder / f"{kind}_{layers}", folder / f"{kind}_{layers}.mcjax"
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
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=["routed"])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, layers in itertools.product(arguments.kinds, arguments.layers):
            artifact = make(Path(folder), kind, layers)
            for run in RUNS:
                row = {"kind": kind, "layers": layers, "run": run}
                rows.append(
                    row | first_text(artifact, BUDGETS[run], artifact.with_suffix(".cache"))
                )
                print(rows[-1], flush=True)
    facts = {"machine": bench.machine(), "rows": rows}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
