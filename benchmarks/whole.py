r"""Whole models of random weights on one accelerator: decoding at three batch sizes, and prefill.

    uv run python benchmarks/whole.py --out FILE.json                   on the device that is here
    uv run python benchmarks/whole.py --out FILE.json --ahead v5e v6e v7x   compiled for what is not

A Mixtral-8x7B from planes, and a model of the shape of Qwen3-30B-A3B from planes and dense in
bfloat16. Each program serves all layers. Beside the time of a step stands what it must read: what
every token needs, the experts that so many tokens are expected to meet, and the cache; and the
share of the roofline, which is reading that at the bandwidth that adding one array to another
reaches.

With `--ahead` nothing runs and no weights are made: XLA compiles the same programs for a TPU's or a
GPU's chip and says what memory they take beside their arguments, and what arrays they copy. TPUs
need `jax[tpu]`'s libtpu, GPUs `jax[cuda12]`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from mcjax import bench
from mcjax.generate import decode, prefill
from mcjax.models import weights
from mcjax.models.decoder import Routed
from mcjax.models.families import describe
from mcjax.models.language_model import LanguageModel
from mcjax.ops import layout
from mcjax.sampling import Sampling

MIXTRAL: dict[str, Any] = bench.MOE | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}

WIDTHS = (3, 2)
"""Bits of the experts, half of them each: 2.5 on average."""

BATCHES = (1, 16, 64)
PROMPT = 2048
STEPS = 32

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What libtpu would otherwise ask a cloud's machine."""

GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 3_352_000_000_000, 52_428_800, 85_000_000_000),
    "h200": ("NVIDIA H200", 4_800_000_000_000, 62_914_560, 150_000_000_000),
}
"""Name, bytes a second of memory, bytes of the second cache and of memory."""

GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory}
  clock_rate_ghz: 1.98 cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }} device_description_str: "{name}"
"""
"""What XLA asks about a GPU that it compiles for."""


class Shape(NamedTuple):
    """A model that is measured: its name, its module, and the widths of its experts, if any."""

    name: str
    module: LanguageModel
    widths: tuple[int, ...]

    def params(self) -> Any:
        """Random parameters."""
        return bench.random_params(self.module.decoder, jnp.bfloat16, self.widths)


def shapes(scale: int = 1) -> Iterator[Shape]:
    """The models, their sizes divided by `scale`."""
    for name, config in (("Mixtral-8x7B", MIXTRAL), ("Qwen3-30B-A3B", QWEN)):
        small = {k: v // scale for k, v in config.items() if k.endswith("_size")}
        if scale > 1:
            small |= {"num_hidden_layers": 2, "head_dim": config["head_dim"] // 4}
        decoder = describe(config | small)[1]
        bits = f"{np.mean(WIDTHS):g} bits"
        for label, act_bits in ((bits, None), (f"{bits}, int8 activations", 8)):
            module = LanguageModel(decoder, jnp.bfloat16, act_bits)
            yield Shape(f"{name}, {label}", module, WIDTHS)
        if name.startswith("Qwen3"):
            yield Shape(f"{name}, bfloat16", LanguageModel(decoder, jnp.bfloat16), ())


class Program(NamedTuple):
    """What is measured of a model: `batch` sequences, a token each, or a prompt of `tokens`."""

    module: LanguageModel
    batch: int
    tokens: int
    prompt: int

    @property
    def name(self) -> str:
        """In a word or two."""
        return f"batch {self.batch}" if self.tokens == 1 else f"prefill of {self.tokens}"

    def cache(self) -> Any:
        """Room for a prompt."""
        return self.module.empty_cache(self.batch, self.prompt)

    def trace(self, params: Any, cache: Any, token: Any, place: Any) -> Any:
        """The program, traced: tokens int32 [batch] at places [batch], or prompts of lengths."""
        greedy = Sampling()
        if self.tokens == 1:
            return decode.trace(self.module, params, token, place, cache, None, greedy)
        given = params, token, place, cache, None, greedy
        return prefill.trace(self.module, *given, chunk=self.tokens)

    def run(self, params: Any, steps: int) -> float:
        """Seconds of one of so many runs in a row, compiled before."""
        greedy, seconds = Sampling(), math.inf
        for _ in range(3):
            cache, start = jax.block_until_ready(self.cache()), time.perf_counter()
            token = np.zeros(self.batch, np.int32)
            for i in range(steps):
                if self.tokens == 1:
                    place = np.full(self.batch, self.prompt - steps + i, np.int32)
                    token, cache = decode(self.module, params, token, place, cache, None, greedy)
                else:
                    prompt = np.zeros((self.batch, self.tokens), np.int32)
                    prompt += np.arange(self.tokens, dtype=np.int32) % self.module.config.vocab_size
                    length = np.full(self.batch, self.tokens, np.int32)
                    given = params, prompt, length, cache, None, greedy
                    token, cache = prefill(self.module, *given, chunk=self.tokens)
            jax.block_until_ready(token)
            seconds = min(seconds, (time.perf_counter() - start) / steps)
        return seconds


def programs(module: LanguageModel, prompt: int) -> Iterator[Program]:
    """Every program of a model."""
    for batch in BATCHES:
        yield Program(module, batch, 1, prompt)
    yield Program(module, 1, prompt, prompt)


def must_read(shape: Shape, params: Any, program: Program) -> float:
    """Bytes that a run reads at least, tokens choosing their experts evenly."""
    decoder, total = shape.module.decoder, 0.0
    tokens = program.batch * program.tokens
    for member in weights.members(decoder):
        of_member = weights.get(params, member.path)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(of_member))
        if isinstance(member.layer.block, Routed):
            spec = member.layer.block
            experts = weights.get(of_member, weights.EXPERTS)
            routed = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
            missed = (1 - spec.routing.top_k / spec.experts) ** tokens
            size -= routed * missed
        total += size
    head = params["embedding" if decoder.tied else "head"]
    return total + head.nbytes + shape.module.cache_bytes(program.batch, program.prompt)


def measured(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each program, run here."""
    bandwidth = bench.machine()["bandwidth_gb_s"]
    prompt = max(32, PROMPT // arguments.scale)
    begin = time.perf_counter()
    for shape in shapes(arguments.scale):
        if time.perf_counter() - begin > arguments.seconds:
            print(f"{shape.name} is left out, for want of time", flush=True)
            continue
        mine = [
            program
            for program in programs(shape.module, prompt)
            if arguments.only in f"{shape.name}, {program.name}"
        ]
        if not mine:
            continue
        start = time.perf_counter()
        params = jax.block_until_ready(layout.put(shape.params()))
        made = time.perf_counter() - start
        for program in mine:
            start = time.perf_counter()
            program.run(params, 1)
            compiling = time.perf_counter() - start
            steps = STEPS if program.tokens == 1 else 2
            seconds = program.run(params, steps)
            size = must_read(shape, params, program)
            yield {
                "model": shape.name,
                "program": program.name,
                "ms": 1e3 * seconds,
                "tokens_per_second": program.batch * program.tokens / seconds,
                "must_read_bytes": size,
                "of_roofline": size / bandwidth / 1e9 / seconds,
                "params_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
                "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
                "seconds_to_draw": made,
                "seconds_to_compile_and_run": compiling,
            }
        del params


def described(target: str) -> Any:
    """A device that is not here."""
    if target in TOPOLOGIES:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(TOPOLOGIES[target], "tpu").devices[0]
    name, bandwidth, cache, memory = GPUS[target]
    config = GPU.format(name=name, bandwidth=bandwidth, cache=cache, memory=memory)
    given = {"target_config": config, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", **given).devices[0]


def on(device: Any, tree: Any) -> Any:
    """Shapes as they lie on a device."""
    where = SingleDeviceSharding(device)

    def one(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.row_by_row(leaf, where))

    return jax.tree.map(one, tree)


COPIED = re.compile(r"= (\w+?)(\d*)\[([\d,]+)\]\S* copy\(")
"""A copy's type, its bits if it says them, and its sizes."""


def compiled(shape: Shape, program: Program, device: Any) -> dict[str, Any]:
    """What a device's compiler makes of a program."""
    token = (program.batch,) if program.tokens == 1 else (program.batch, program.tokens)
    given = (jax.ShapeDtypeStruct(s, np.int32) for s in (token, token[:1]))
    start = time.perf_counter()
    with jax.default_device(device):
        params = on(device, jax.eval_shape(shape.params))
        cache = on(device, jax.eval_shape(program.cache))
        made = program.trace(params, cache, *on(device, tuple(given))).lower().compile()
    memory = made.memory_analysis()
    copied = [
        math.prod(map(int, sizes.split(","))) * int(bits or 8) // 8
        for _, bits, sizes in COPIED.findall(made.as_text())
    ]
    return {
        "model": shape.name,
        "program": program.name,
        "params_bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "largest_copy_bytes": max(copied, default=0),
        "seconds_to_compile": time.perf_counter() - start,
    }


def ahead(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each program and target, or why there is none."""
    prompt = max(32, PROMPT // arguments.scale)
    for target in arguments.ahead:
        device = described(target)
        for shape in shapes(arguments.scale):
            for program in programs(shape.module, prompt):
                if arguments.only not in f"{shape.name}, {program.name}":
                    continue
                what = {"target": device.device_kind}
                try:
                    yield what | compiled(shape, program, device)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    why = {"model": shape.name, "program": program.name}
                    yield what | why | {"error": str(error).splitlines()[0][:300]}


def main() -> None:
    """Writes FILE.json, after each row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ahead", nargs="+", choices=[*TOPOLOGIES, *GPUS], default=[])
    parser.add_argument("--scale", type=int, default=1, help="divide sizes, to try it anywhere")
    parser.add_argument(
        "--seconds", type=float, default=400, help="begin no model after so many (default 400)"
    )
    parser.add_argument(
        "--only", default="", help="of MODEL, PROGRAM as a row names them, what contains this"
    )
    arguments = parser.parse_args()
    out: dict[str, Any] = {"jax": jax.__version__, "rows": []}
    out |= {} if arguments.ahead else {"machine": bench.machine()}
    for row in ahead(arguments) if arguments.ahead else measured(arguments):
        out["rows"].append(row)
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
