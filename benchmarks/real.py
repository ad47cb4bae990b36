r"""One artifact against what people would pick instead, on text that nothing was tuned on.

    uv run python benchmarks/real.py MODEL --calibration TEXT --text TEXT --out FILE.json \
        --artifact normal=PATH --artifact best=PATH [--ggml libggml-base.so]

Every linear layer, attention too, is at the width; embeddings, norms and routers are as they were.
For each method and width: perplexity beside the unquantised model's, the mean divergence
KL(unquantised, quantised) in nats a token, how often both predict the same token, and the effective
bits a weight, tables and scales included. Beside the artifacts:

gptq       a dedicated GPTQ model for each width, `mcjax.baseline`, its inputs those of the layers
           already quantised; a 16-bit scale and offset for each group
matgptq    one GPTQ model of the most bits, whose leading bits are the narrower ones (MatQuant,
           arXiv 2502.06786, with GPTQ compensating the mean error): one scale and offset for all
anybcq     one set of binary planes, each the sign of what is left, with free scales of each width
           fitted by least squares (AnyBCQ, arXiv 2510.10467, without its training of scales)
llama.cpp  its own code (--ggml is a file of the llama-cpp-python package) by importance matrix,
           types below 4 bits; where a row is no multiple of a type's block, what it falls back to

The last three see the unquantised model's inputs. FILE.png beside FILE.json shows perplexity
against effective bits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import mcjax
from mcjax import checkpoint, text
from mcjax.baseline import dedicated_gptq
from mcjax.bitplane import resolve_group_size
from mcjax.calibrate import expert_grams, observe
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.language_model import LanguageModel, embed
from mcjax.quantize.gptq import grid
from mcjax.quantize.gram import condition, pad
from mcjax.quantize.nested import inverse_factor

BATCH = 8
SCALE_BITS = 16
METHODS = ("gptq", "matgptq", "anybcq", "llama.cpp")
LLAMA_TYPES = ("Q2_K", "IQ2_S", "Q3_K", "IQ3_S")
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ2_S": "IQ4_NL", "IQ3_S": "IQ4_NL"}

Made = dict[str, tuple[jax.Array, float]]
"""What a method makes of one matrix: by the names of its settings the matrix and its bits."""


def main() -> None:
    """Writes FILE.json and FILE.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--artifact", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of rivals")
    parser.add_argument("--windows", type=int, default=16, help="of the text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--ggml", type=Path, help="libggml-base.so of llama.cpp")
    arguments = parser.parse_args()
    if "llama.cpp" in arguments.methods and arguments.ggml is None:
        print("llama.cpp is left out, for want of --ggml", flush=True)
    folder = Folder(arguments.model)

    def windows(file):
        ends, size = folder.decoder.eos_token_ids, folder.decoder.vocab_size
        tokens = text.encode_file(folder.tokenizer_path, file, size, ends)
        begin = text.beginning(folder.tokenizer_path, size, "auto")
        return text.windows(tokens, arguments.seq_len, begin=begin)

    calibration = text.spread(windows(arguments.calibration), arguments.samples)
    judge = Judge(folder, windows(arguments.text)[: arguments.windows])
    out: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows",
        "text": f"{Path(arguments.text).name}, {len(judge.windows)} windows",
        "seq_len": arguments.seq_len,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "unquantised": judge.perplexity,
        "rows": [],
    }

    def report(method: str, setting: str, bits: float, params: Any, seconds: float | None = None):
        row = {"method": method, "setting": setting, "effective_bits": bits}
        out["rows"].append(row | judge(params) | ({} if seconds is None else {"seconds": seconds}))
        print(json.dumps(out["rows"][-1]), flush=True)
        arguments.out.write_text(json.dumps(out, indent=1) + "\n")
        plot(out, arguments.out.with_suffix(".png"))

    for name, path in (given.split("=", 1) for given in arguments.artifact):
        for bits in arguments.bits:
            model = mcjax.load(path, bits=bits, attention_bits=bits)
            report(name, str(bits), bits_of(path, bits), dequantised(model.params))
    if "gptq" in arguments.methods:
        experts = (len(weights.budgeted_layers(folder.decoder)), _experts_of(folder))
        for bits in arguments.bits:
            start = time.perf_counter()
            uniform = np.full(experts, bits)
            params = dedicated_gptq(folder, calibration, uniform, attention_bits=bits)
            seconds = time.perf_counter() - start
            report("gptq", str(bits), bits_with_scales(folder, bits, 2), params, seconds)
    methods: dict[str, Callable[[jax.Array, jax.Array], Made]] = {
        "matgptq": partial(matgptq, widths=tuple(sorted(arguments.bits))),
        "anybcq": partial(anybcq, widths=tuple(sorted(arguments.bits))),
    }
    if arguments.ggml is not None:
        methods["llama.cpp"] = Ggml(arguments.ggml)
    for name in (n for n in arguments.methods if n in methods):
        start = time.perf_counter()
        every, bits_by = quantised(folder, calibration, methods[name])
        seconds = time.perf_counter() - start
        for setting, params in every.items():
            report(name, setting, bits_by[setting], params, seconds)


class Judge:
    """Compares parameters with the unquantised model's, a window at a time."""

    def __init__(self, folder: Folder, windows: np.ndarray):
        self.module, self.dense = LanguageModel(folder.decoder), folder.read(np.float32)
        self.windows = windows
        self.perplexity = float(np.exp(self(self.dense)["own"]))

    def __call__(self, params: Any) -> dict[str, float]:
        """What `_compare` finds, on average over windows."""
        each = [_compare(self.module, self.dense, params, row[None]) for row in self.windows]
        own, loss, divergence, same = np.mean(np.array(each, np.float64), axis=0)
        return {
            "own": own,
            "perplexity": float(np.exp(loss)),
            "ratio": float(np.exp(loss - own)),
            "divergence": divergence,
            "same_token": same,
        }


@partial(jax.jit, static_argnums=0)
def _compare(module, dense, params, tokens):
    """Mean loss of both, their divergence, and how often they predict the same token."""
    a, b = (
        jax.nn.log_softmax(module.apply({"params": p}, tokens[:, :-1]).astype(jnp.float32))
        for p in (dense, params)
    )
    loss = [-jnp.mean(jnp.take_along_axis(x, tokens[:, 1:, None], -1)) for x in (a, b)]
    divergence = jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1))
    return *loss, divergence, jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1))


def dequantised(params: Any) -> Any:
    """Parameters with planes as the weights that they stand for."""

    def is_planes(leaf):
        return hasattr(leaf, "dequantize")

    return jax.tree.map(lambda w: w.dequantize() if is_planes(w) else w, params, is_leaf=is_planes)


def _experts_of(folder: Folder) -> int:
    first = folder.decoder.layers[weights.budgeted_layers(folder.decoder)[0]]
    roles = weights.budgeted(folder.decoder, first)
    return roles[0].shape[0] if roles[0].routed else 1


def _roles(folder: Folder) -> Iterator[weights.Role]:
    for layer in folder.decoder.layers:
        yield from (r for r in weights.roles(layer, folder.decoder.width) if r.tap is not None)


def bits_of(path: str, width: int) -> float:
    """Planes and tables of an artifact's linear layers at a width, bits a weight."""
    from mcjax import allocate

    reader = checkpoint.ArtifactReader(path)
    every = allocate.parts(reader.decoder, reader.manifest)
    size = sum(p.bytes(width, reader.manifest["group_size"]) * (p.experts or 1) for p in every)
    return 8 * size / sum(p.weights() * (p.experts or 1) for p in every)


def bits_with_scales(folder: Folder, width: int, scales: int) -> float:
    """Bits a weight with so many 16-bit scales for each group."""
    total = count = 0.0
    for role in _roles(folder):
        size = math.prod(role.shape)
        total += size * (width + SCALE_BITS * scales / resolve_group_size(role.shape[-2], None))
        count += size
    return total / count


def quantised(
    folder: Folder, windows: np.ndarray, method: Callable[[jax.Array, jax.Array], Made]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Parameters by the names of a method's settings, and their bits a weight."""
    decoder, rest = folder.decoder, folder.read_rest(np.float32)
    x = np.array(embed(decoder, rest, windows, jnp.float32))
    layers: dict[str, list[Any]] = {}
    bits: dict[str, float] = {}
    count = 0
    for i, layer in enumerate(decoder.layers):
        own: dict[str, Any] = {}
        for name, value in folder.read_layer(i, np.float32):
            weights.put(own, tuple(name.split(".")), jnp.asarray(value))
        starts = range(0, len(x), BATCH)
        run = partial(observe, layer, decoder.width, decoder.norm_eps, own)
        each = [run(x[s : s + BATCH]) for s in starts]
        x = np.concatenate([np.asarray(y) for y, _, _ in each])
        grams = jax.tree.map(lambda *parts: sum(parts), *(g for _, g, _ in each))
        seen = [s for _, _, s in each]
        made: dict[str, Any] = {}
        for role in weights.roles(layer, decoder.width):
            if role.tap is None:
                continue
            w = weights.get(own, role.path)
            if role.routed:
                experts = weights.get(own, role.path[:-1])
                both = expert_grams(layer.block.activation, experts, seen, 0, None, floor=0)
                gram = both[1 if role.path[-1] == "down" else 0]
                parts = [method(*pair) for pair in zip(w, gram, strict=True)]
                result = {
                    k: (jnp.stack([p[k][0] for p in parts]), parts[0][k][1]) for k in parts[0]
                }
            else:
                result = method(w, grams[role.name][0])
            count += math.prod(role.shape)
            for setting, (value, cost) in result.items():
                bits[setting] = bits.get(setting, 0.0) + cost * math.prod(role.shape)
                made.setdefault(setting, {})[role.path] = value
        for setting, values in made.items():
            copy = jax.tree.map(lambda a: a, own)
            for path, value in values.items():
                weights.put(copy, path, value)
            layers.setdefault(setting, []).append(copy)
    params = {k: rest | weights.stacked(decoder, v) for k, v in layers.items()}
    return params, {k: total / count for k, total in bits.items()}


def matgptq(w: jax.Array, gram: jax.Array, widths: tuple[int, ...]) -> Made:
    """One GPTQ model of the most bits, whose leading bits are the others'."""
    group = resolve_group_size(w.shape[0], None)
    rows = -(-w.shape[0] // group) * group
    wide = jnp.pad(w, ((0, rows - w.shape[0]), (0, 0)))
    values = _matgptq(wide, pad(condition(gram), rows), widths, group)
    cost = {k: k + 2 * SCALE_BITS / group for k in widths}
    return {str(k): (v[: w.shape[0]], cost[k]) for k, v in zip(widths, values, strict=True)}


@partial(jax.jit, static_argnames=("widths", "group"))
def _matgptq(w, gram, widths, group):
    top, factor = widths[-1], inverse_factor(gram)
    codes = np.arange(2**top)
    # A width's code is the top one's leading bits, rounded; it stands for the same grid.
    levels = [
        np.clip(np.floor(codes / 2 ** (top - k) + 0.5), 0, 2**k - 1) * 2 ** (top - k)
        for k in widths
    ]
    levels = jnp.asarray(np.stack(levels), jnp.float32)  # [widths, codes]

    def one_group(w, g):
        start = g * group
        block = lax.dynamic_slice_in_dim(w, start, group, axis=0)
        rows = lax.dynamic_slice_in_dim(factor, start, group, axis=0)
        corner = lax.dynamic_slice_in_dim(rows, start, group, axis=1)
        low, step = grid(block, top)

        def one_feature(block, i):
            every = low + step * levels[..., None]  # [widths, codes, d_out]
            best = jnp.argmin(jnp.mean((block[i] - every) ** 2, axis=0), axis=0)
            value = jnp.take_along_axis(every, best[None, None], axis=1)[:, 0]
            error = (block[i] - jnp.mean(value, axis=0)) / corner[i, i]
            return block - corner[i][:, None] * error, (value, error)

        _, (values, errors) = lax.scan(one_feature, block, jnp.arange(group))
        return w - rows.T @ errors, values

    _, values = lax.scan(one_group, w, jnp.arange(len(w) // group))
    return jnp.moveaxis(values.reshape(len(w), len(widths), -1), 1, 0)


def anybcq(w: jax.Array, gram: jax.Array, widths: tuple[int, ...]) -> Made:
    """Binary planes, each the sign of what those before leave, with scales of each width."""
    group = resolve_group_size(w.shape[0], None)
    diagonal, pad = jnp.diagonal(gram), -w.shape[0] % group
    mean = jnp.mean(diagonal)  # 0 of an expert that no token reached
    diagonal = jnp.where(mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1.0)
    diagonal = jnp.pad(diagonal + 0.01, (0, pad))
    values = _anybcq(jnp.pad(w, ((0, pad), (0, 0))), diagonal, widths, group)
    return {
        str(k): (v[: w.shape[0]], k + SCALE_BITS * k / group)
        for k, v in zip(widths, values, strict=True)
    }


@partial(jax.jit, static_argnames=("widths", "group"))
def _anybcq(w, diagonal, widths, group):
    grouped = w.reshape(-1, group, w.shape[1])
    weight = diagonal.reshape(-1, group)

    def one(group_of):
        w, h = group_of
        planes, found, value = [], [], jnp.zeros_like(w)
        for k in range(1, widths[-1] + 1):
            planes.append(jnp.where(w - value >= 0, 1.0, -1.0))
            value = _fitted(w, h, planes)
            if k == widths[0]:  # the narrowest width's planes and scales in turn, then frozen
                for _ in range(10):
                    planes = _nearest_signs(w, h, planes)
                    value = _fitted(w, h, planes)
            if k in widths:
                found.append(value)
        return jnp.stack(found)

    values = lax.map(one, (grouped, weight))  # [groups, widths, group, d_out]
    return jnp.moveaxis(values, 1, 0).reshape(len(widths), *w.shape)


def _scales(w, h, planes):
    """Least squares: scales [bits, d_out] of planes [group, d_out] each."""
    design = jnp.stack(planes)
    square = jnp.einsum("pgo,qgo,g->opq", design, design, h)
    right = jnp.einsum("pgo,go,g->op", design, w, h)
    ridge = 1e-5 * jnp.eye(len(planes)) * jnp.sum(h)
    return jnp.linalg.solve(square + ridge, right[..., None])[..., 0].T


def _fitted(w, h, planes):
    return jnp.einsum("po,pgo->go", _scales(w, h, planes), jnp.stack(planes))


def _nearest_signs(w, h, planes):
    """For each weight the signs whose sum, under fitted scales, comes closest."""
    bits = len(planes)
    signs = 2.0 * ((np.arange(2**bits)[:, None] >> np.arange(bits)) & 1) - 1  # [codes, bits]
    levels = jnp.asarray(signs, jnp.float32) @ _scales(w, h, planes)  # [codes, d_out]
    best = jnp.argmin(jnp.abs(w[None] - levels[:, None]), axis=0)
    return [jnp.asarray(signs[:, p], jnp.float32)[best] for p in range(bits)]


class Ggml:
    """llama.cpp's quantiser."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def __call__(self, w: jax.Array, gram: jax.Array) -> Made:
        """A matrix in each of the types, by the diagonal of its Gram matrix."""
        import gguf

        rows = np.ascontiguousarray(np.asarray(w, np.float32).T)  # [d_out, d_in]
        importance = np.ascontiguousarray(np.diagonal(np.asarray(gram, np.float32)))
        made: Made = {}
        for name in LLAMA_TYPES:
            kind = gguf.GGMLQuantizationType[name]
            if rows.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType[FALLBACK[name]]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            packed = np.zeros((rows.shape[0], rows.shape[1] // block * size), np.uint8)
            pointers = (a.ctypes.data_as(ctypes.c_void_p) for a in (rows, packed, importance))
            source, target, matrix = pointers
            self.library.ggml_quantize_chunk(
                ctypes.c_int(kind),
                source,
                target,
                ctypes.c_int64(0),
                ctypes.c_int64(rows.shape[0]),
                ctypes.c_int64(rows.shape[1]),
                matrix,
            )
            value = gguf.quants.dequantize(packed, kind)
            made[name] = jnp.asarray(value.T), 8 * size / block
        return made


def plot(out: dict[str, Any], file: Path) -> None:
    """Draws perplexity, in those of the unquantised model, against effective bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in out["rows"]):
        rows = sorted(
            (r for r in out["rows"] if r["method"] == method), key=lambda r: r["effective_bits"]
        )
        axis.plot(
            [r["effective_bits"] for r in rows], [r["ratio"] for r in rows], "o-", label=method
        )
    axis.set(yscale="log", xlabel="effective bits a weight", ylabel="perplexity, unquantised = 1")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
