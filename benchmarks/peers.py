"""mcjax beside llama.cpp, torch, Hugging Face and qwix on this machine's CPU.

    python -m venv peers && . peers/bin/activate
    pip install torch==2.13.0 transformers qwix llama-cpp-python . && python benchmarks/peers.py

Peers that are not installed are left out. Products are 4096 x 14336 with one token, as in
`mcjax bench`; decoding is of `bench.MOE`, greedy, batch 1; memory is what a process holds
after decoding, above one that has only started JAX.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from speed import markdown

from mcjax import bench, dot

GGML_TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_0": 2, "Q4_K": 12, "TQ1_0": 34, "TQ2_0": 35}
NEW_TOKENS = 32
HELD = ("nothing", "mcjax", "dense bfloat16")
# glibc's own thresholds, which setting one keeps from growing: past 32 MB it would put weights
# among what making random ones leaves behind, and that could not be given back.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


class Ggml:
    """The products of llama.cpp's library, through ctypes."""

    def __init__(self, threads):
        """Opens the library that llama-cpp-python brings, for products on `threads` threads."""
        folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
        self.base = ctypes.CDLL(folder / "libggml-base.so", mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(folder / "libggml-cpu.so", mode=ctypes.RTLD_GLOBAL)
        self.threads = threads
        size, pointer = ctypes.c_size_t, ctypes.c_void_p

        class Parameters(ctypes.Structure):
            _fields_ = [("size", size), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

        self.parameters = Parameters
        long, kind = ctypes.c_int64, ctypes.c_int
        signatures = {
            "ggml_init": (pointer, [Parameters]),
            "ggml_new_tensor_2d": (pointer, [pointer, kind, long, long]),
            "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
            "ggml_new_graph": (pointer, [pointer]),
            "ggml_build_forward_expand": (None, [pointer, pointer]),
            "ggml_get_data": (pointer, [pointer]),
            "ggml_nbytes": (size, [pointer]),
            "ggml_quantize_chunk": (size, [kind, pointer, pointer, long, long, long, pointer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
        self.cpu.ggml_cpu_init()

    def product(self, x, weight, kind):
        """What multiplies x [1, d_in] by weight [d_in, d_out], and the weight's bytes."""
        d_in, d_out = weight.shape
        rows = np.ascontiguousarray(weight.T)
        context = self.base.ggml_init(self.parameters((64 << 20) + rows.nbytes, None, False))
        w = self.base.ggml_new_tensor_2d(context, kind, d_in, d_out)
        v = self.base.ggml_new_tensor_2d(context, 0, d_in, 1)
        data = self.base.ggml_get_data
        self.base.ggml_quantize_chunk(kind, rows.ctypes.data, data(w), 0, d_out, d_in, None)
        ctypes.memmove(data(v), x.ctypes.data, x.nbytes)
        y = self.base.ggml_mul_mat(context, w, v)
        graph = self.base.ggml_new_graph(context)
        self.base.ggml_build_forward_expand(graph, y)
        out = np.ctypeslib.as_array(ctypes.cast(data(y), ctypes.POINTER(ctypes.c_float)), (d_out,))

        def run():
            if self.cpu.ggml_graph_compute_with_ctx(context, graph, self.threads):
                raise RuntimeError("ggml could not compute the product")
            return out

        return run, self.base.ggml_nbytes(w)


def products(repeats):
    """One token by every library that is here."""
    key = jax.random.key(0)
    weight = jax.random.normal(key, bench.SHAPE) * bench.SHAPE[0] ** -0.5
    x = jax.random.normal(jax.random.fold_in(key, 1), (1, bench.SHAPE[0]))
    multiply = jax.jit(jnp.dot)
    candidates = {"jnp.dot float32": partial(multiply, x, weight)}
    held = {"jnp.dot float32": 4 * weight.size}
    if importlib.util.find_spec("torch"):
        import torch

        rows, matrix = (torch.from_numpy(np.array(a)).bfloat16() for a in (x, weight))
        # As torch.nn.Linear keeps a weight, [d_out, d_in].
        turned = matrix.T.contiguous()
        candidates["torch bfloat16"] = lambda: float((rows @ matrix)[0, 0])
        candidates["torch bfloat16, Linear"] = lambda: float(
            torch.nn.functional.linear(rows, turned)[0, 0]
        )
        held |= dict.fromkeys(("torch bfloat16", "torch bfloat16, Linear"), 2 * weight.size)
    if importlib.util.find_spec("qwix"):
        import qwix

        for kind in ("int8", "int4"):
            q = qwix.quantize(weight, kind, channelwise_axes=(1,), tiled_axes={0: 128})
            # Weights alone; the activations stay float, its accurate mode.
            product = jax.jit(lambda x, q: qwix.dot(x, q))
            candidates[f"qwix {kind}"] = partial(product, x, q)
            held[f"qwix {kind}"] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(q))
    if importlib.util.find_spec("llama_cpp"):
        ggml = Ggml(os.cpu_count())
        exact = np.asarray(x) @ np.asarray(weight)
        for name, kind in GGML_TYPES.items():
            run, size = ggml.product(np.asarray(x), np.asarray(weight), kind)
            off = np.linalg.norm(run() - exact[0]) / np.linalg.norm(exact)
            if not off < 1:
                raise RuntimeError(f"ggml's {name} product is off by {off:.2f}")
            candidates[f"llama.cpp {name}"], held[f"llama.cpp {name}"] = run, size
    ours = jax.jit(partial(dot, act_bits=8))
    for k in (1, 2, 3, 4):
        planes = bench.random_planes(jax.random.fold_in(key, k), bench.SHAPE, k)
        name = f"mcjax {k} bits, int8 activations"
        candidates[name], held[name] = partial(ours, x, planes), planes.nbytes
    rows = bench.timed(candidates, repeats, at_once=True, tokens=1, error=None)
    for row in rows:
        row["bytes"] = held[row["name"]]
        row["name"] += f", {8 * row['bytes'] / weight.size:.2f} bits"
    return rows


def decoding(repeats):
    """Rows of `bench.decoding`, with Hugging Face's experts by each way that it offers."""
    others = {}
    if importlib.util.find_spec("transformers"):
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        prompt = torch.zeros((1, 1), dtype=torch.long)
        more = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        for way in ("eager", "batched_mm", "grouped_mm"):
            for kind in (torch.float32, torch.bfloat16):
                config = MixtralConfig(**bench.MOE, bos_token_id=None, eos_token_id=None)
                config._experts_implementation = way
                model = MixtralForCausalLM(config).to(kind).eval()
                run = partial(model.generate, prompt, attention_mask=prompt + 1, **more)
                name = f"Hugging Face generate, {str(kind)[6:]}, {way}"
                if run().shape[1] != NEW_TOKENS + 1:
                    raise RuntimeError(f"{name} stopped early")
                size = sum(p.nbytes for p in model.parameters())
                others[name] = lambda run=run: run().numpy(), size
    return bench.decoding(repeats, NEW_TOKENS, others)


def hold(what):
    """Bytes that this process holds after decoding with `what`, and without compiled programs."""

    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was given back
        # Less what files lend, whose pages come and go with the machine's load.
        pages, of_files = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (pages - of_files) * os.sysconf("SC_PAGE_SIZE")

    jax.block_until_ready(jax.jit(jnp.add)(1.0, 2.0))
    if what != HELD[0]:
        module, params = bench.served_moe() if what == "mcjax" else bench.dense_moe()
        if what == "dense bfloat16":
            module = module.clone(dtype=jnp.bfloat16)
            params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        jax.clear_caches()  # of making random weights
        bench.write_tokens(module, params, 8).block_until_ready()
    whole = resident()
    jax.clear_caches()
    return whole, resident()


def memory():
    """`hold` of everything, in processes of their own that compile, and in some that need not."""

    def run(what, **more):
        command = [sys.executable, __file__, "--hold", what]
        environment = os.environ | ALLOCATOR | more
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
        return np.array(json.loads(done.stdout))

    with tempfile.TemporaryDirectory() as folder:
        cached = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        compiling = {what: run(what) for what in HELD}
        for what in HELD:
            run(what, **cached)
        loading = {what: run(what, **cached) for what in HELD}
    rows = []
    for what in HELD[1:]:
        whole, without = (compiling[what] - compiling[HELD[0]]).tolist()
        from_cache = int((loading[what] - loading[HELD[0]])[0])
        rows.append(
            {
                "name": what,
                "bytes_above_empty": whole,
                "without_programs": without,
                "from_compilation_cache": from_cache,
            }
        )
    return rows


def table(rows):
    """What processes hold, as Markdown."""
    lines = [
        "| the same model, decoding | MB above an empty JAX process | compiled before | "
        "without programs |",
        "|---|---|---|---|",
    ]
    for row in rows:
        keys = ("bytes_above_empty", "from_compilation_cache", "without_programs")
        cells = [f"{row[key] / 1e6:.0f}" for key in keys]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def main():
    """Writes one JSON object and prints it as tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "peers_cpu.json"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hold", choices=HELD, help="print the bytes held and end")
    arguments = parser.parse_args()
    if arguments.hold:
        print(json.dumps(hold(arguments.hold)))
        return
    facts = {"machine": bench.machine(), "memory": memory()}
    packages = ("transformers", "qwix", "llama_cpp_python")
    facts["machine"]["versions"] |= {
        p: version(p) for p in packages if importlib.util.find_spec(p.removesuffix("_python"))
    }
    facts["products"] = products(arguments.repeats)
    facts["decode"] = decoding(arguments.repeats)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts["memory"]), markdown(facts), sep="\n\n")


if __name__ == "__main__":
    main()
