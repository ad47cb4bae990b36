"""What compressing layers of 128 experts takes: seconds a layer and the most memory.

    uv run python benchmarks/many_experts.py --out benchmarks/results/many_experts_cpu.json

A Qwen3-MoE of random bfloat16 weights, two layers of 128 experts of 2048 x 768, top-8, 2.6 GB, made
in --work and left there; 16 calibration windows of 512 tokens of the embedded text.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mcjax import bench
from mcjax.compress import compress
from mcjax.demo import EMBEDDED

LAYERS, EXPERTS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = (
    2,
    128,
    2048,
    768,
    32,
    4,
    128,
    2048,
)
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 6144,
    "moe_intermediate_size": HIDDEN,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def make(folder: Path) -> Path:
    """Writes the model, a shard a layer."""
    folder.mkdir(parents=True)
    rng, where = np.random.default_rng(0), {}

    def matrix(rows, columns):
        values = rng.standard_normal((rows, columns), np.float32) * columns**-0.5
        return values.astype(ml_dtypes.bfloat16)

    def ones(size):
        return np.ones(size, ml_dtypes.bfloat16)

    def shard(name, tensors):
        save_file(tensors, folder / name)
        where.update(dict.fromkeys(tensors, name))

    outside = {"model.embed_tokens.weight": matrix(VOCAB, WIDTH), "model.norm.weight": ones(WIDTH)}
    shard("model-rest.safetensors", outside)
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
            "mlp.gate": (EXPERTS, WIDTH),
        }
        for e in range(EXPERTS):
            shapes[f"mlp.experts.{e}.gate_proj"] = shapes[f"mlp.experts.{e}.up_proj"] = (
                HIDDEN,
                WIDTH,
            )
            shapes[f"mlp.experts.{e}.down_proj"] = (WIDTH, HIDDEN)
        tensors = {name: matrix(*shape) for name, shape in shapes.items()}
        tensors |= {name: ones(WIDTH) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {f"self_attn.{name}_norm": ones(HEAD_DIM) for name in ("q", "k")}
        prefix = f"model.layers.{layer}."
        shard(f"model-{layer}.safetensors", {f"{prefix}{n}.weight": t for n, t in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copyfile(EMBEDDED / "tokenizer.json", folder / "tokenizer.json")
    return folder


def peak_gb() -> float:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1e6


def main():
    """Writes one JSON object and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "many_experts")
    parser.add_argument("--effort", default="fast")
    arguments = parser.parse_args()
    model = arguments.work / "model"
    if not model.exists():
        make(model)
    rows = []

    def layers(items, description):
        for layer in items:
            start = time.perf_counter()
            yield layer
            seconds = time.perf_counter() - start
            row = {"work": description, "step": layer, "seconds": seconds, "peak_gb": peak_gb()}
            rows.append(row)
            print(row, flush=True)

    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        text, out = EMBEDDED / "calibration.txt", Path(folder) / "artifact"
        common = {"samples": 16, "seq_len": 512, "effort": arguments.effort}
        compress(model, out, text, **common, progress=layers)
    facts = {"machine": bench.machine(), "effort": arguments.effort, "rows": rows}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
