"""A model four times the memory that compressing it is given.

    uv run python benchmarks/streaming.py --layers 80 --out FILE.json

Makes a folder of that many layers of eight experts in float32, random, and compresses it with
`--memory` in a control group that is killed past a quarter of the model's bytes (Linux, as root).
Beside it stand the memory that `mcjax.forecast` says and the greatest that the process had that no
file backs, asked for every 20 milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TEXT = Path(__file__).parents[1] / "mcjax" / "embedded" / "calibration.txt"

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 768,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "float32",
}


def make(folder: Path, layers: int) -> int:
    """Writes a model of random weights, a file for each layer; returns their bytes."""
    from safetensors.numpy import save_file
    from tokenizers import ByteLevelBPETokenizer

    rng, where, total = np.random.default_rng(0), {}, 0
    width, hidden = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]

    def matrix(rows, columns, scale=1.0):
        return (scale * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    def save(name, tensors):
        nonlocal total
        save_file(tensors, folder / name)
        for key, value in tensors.items():
            where[key], total = name, total + value.nbytes

    vocab, ones = matrix(CONFIG["vocab_size"], width), np.ones(width, np.float32)
    save("rest.safetensors", {"model.embed_tokens.weight": vocab, "model.norm.weight": ones})
    out = (2 * layers) ** -0.5
    for i in range(layers):
        tensors = {
            "input_layernorm.weight": ones,
            "post_attention_layernorm.weight": ones,
            "self_attn.q_proj.weight": matrix(512, width),
            "self_attn.k_proj.weight": matrix(256, width),
            "self_attn.v_proj.weight": matrix(256, width),
            "self_attn.o_proj.weight": matrix(width, 512, out),
            "self_attn.q_norm.weight": ones[:64],
            "self_attn.k_norm.weight": ones[:64],
            "mlp.gate.weight": matrix(CONFIG["num_experts"], width),
        }
        for e in range(CONFIG["num_experts"]):
            own = f"mlp.experts.{e}"
            tensors[f"{own}.gate_proj.weight"] = matrix(hidden, width)
            tensors[f"{own}.up_proj.weight"] = matrix(hidden, width)
            tensors[f"{own}.down_proj.weight"] = matrix(width, hidden, out)
        tensors = {f"model.layers.{i}.{name}": value for name, value in tensors.items()}
        save(f"layer_{i}.safetensors", tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(TEXT)], vocab_size=CONFIG["vocab_size"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return total


@contextlib.contextmanager
def group(limit: int) -> Iterator[Path]:
    """A control group whose processes have so much memory together, of version 1 or 2.

    Raises:
      OSError: if this user can make none.
    """
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    made = (root / "memory" if version_1 else root) / f"mcjax-{os.getpid()}"
    made.mkdir()
    try:
        most = made / ("memory.limit_in_bytes" if version_1 else "memory.max")
        most.write_text(str(limit))
        yield made / "cgroup.procs"
    finally:
        made.rmdir()


def watched(command: list[str], limit: int) -> dict[str, float]:
    """Runs a command that can have so much memory: the most it had, and seconds.

    Raises:
      RuntimeError: if it fails.
    """
    start, most = time.monotonic(), 0
    with group(limit) as members:
        join = f"echo $$ > {members}; exec "
        process = subprocess.Popen(
            ["bash", "-c", join + shlex.join(command)], stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                fields = dict(line.split(":", 1) for line in status.splitlines())
                most = max(most, int(fields["RssAnon"].split()[0]) * 1024)
            except (OSError, KeyError):
                pass  # it has just ended
            time.sleep(0.02)
        said = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"it ended with {process.returncode}: {said[-2000:]}")
    return {"memory": most, "seconds": time.monotonic() - start}


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a file to write; what is in it is printed anyhow")
    parser.add_argument("--layers", type=int, default=80, help="41.5 MB each (default 80)")
    parser.add_argument("--limit", type=float, help="bytes; by default a quarter of the model's")
    parser.add_argument("--memory", type=float, help="bytes to ask for; by default 0.85 of that")
    arguments = parser.parse_args()
    facts: dict[str, Any] = {"layers": arguments.layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        facts["model"] = make(folder, arguments.layers)
        facts["limit"] = int(arguments.limit or facts["model"] // 4)
        facts["asked"] = int(arguments.memory or 0.85 * facts["limit"])
        how = {"max_bits": 1, "samples": 8, "seq_len": 128, "effort": "fast"}
        options = ["--calibration", str(TEXT)]
        for name, value in how.items():
            options += [f"--{name.replace('_', '-')}", str(value)]
        script = (
            "import sys, json; from mcjax.forecast import forecast, within;"
            "from mcjax.process_memory import sparing; from mcjax.job import prepare;"
            "from mcjax import cli; cli._keep_programs(None);"
            f"sparing(None); job = prepare(sys.argv[1], {str(TEXT)!r}, **{how});"
            f"found = forecast(within(job, {facts['asked']}), timed=False);"
            "print(json.dumps({'memory': found.memory, 'process': found.process,"
            " **{stage.name: stage.bytes for stage in found.stages}}))"
        )
        said = subprocess.run(
            [sys.executable, "-c", script, folder], capture_output=True, text=True
        )
        facts["forecast"] = json.loads(said.stdout.splitlines()[-1])  # HiGHS greets
        print(json.dumps(facts, indent=1), flush=True)
        command = [sys.executable, "-m", "mcjax.cli", "compress", str(folder)]
        command += [str(Path(temporary) / "out"), *options, "--memory", f"{facts['asked'] / 1e6}MB"]
        facts["measured"] = watched(command, facts["limit"])
    facts["ratio"] = facts["measured"]["memory"] / facts["forecast"]["memory"]
    print(json.dumps(facts, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
