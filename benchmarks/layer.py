"""A Mixtral-8x7B-shaped block of experts from planes, beside the same in bfloat16.

    python benchmarks/layer.py --out FILE [--only layer|quantise]

For a GPU: about 40 GB of its memory, torch, bitsandbytes and hqq being measured too where they are
installed. Everything is random but the arithmetic. `--hidden 256 --inner 512` runs it anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mcjax
from mcjax import bench
from mcjax.models import weights
from mcjax.models.experts import routed
from mcjax.models.families import describe

WIDTHS = (3, 2, 2, 2, 2, 2, 2, 2)
"""Bits of the experts: 2.125 on average, the fewest above 2.05 that eight experts can have."""


CHUNK = 1 << 27
"""Weights that are quantised at once; what that takes is no trouble to 80 GB."""

STEPS = {1: 64, 16: 16, 64: 8, 2048: 4}
"""Blocks in a row that one measurement runs, as a model's layers would follow each other."""


def models(decoder):
    """The block dense in bfloat16 and from planes: activation bits and parameters by name."""
    params, dense = (
        weights.of_layer(decoder, bench.random_params(decoder, jnp.bfloat16, widths), 0)["block"]
        for widths in (WIDTHS, ())
    )
    return {
        "mcjax dense bfloat16": (None, dense | {"router": params["router"]}),
        "mcjax 2.125 bits": (None, params),
        "mcjax 2.125 bits, int8 activations": (8, params),
    }


def repeated(block, steps):
    """`steps` blocks of a model in one program, and what the first of them gave.

    Each adds to the stream, which is then normalised.
    """

    def run(params, x):
        def step(i, carry):
            x, first = carry
            y = block(params, x)
            x = x.astype(jnp.float32) + y.astype(jnp.float32)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True))
            return x.astype(y.dtype), jnp.where(i == 0, y, first)

        return jax.lax.fori_loop(0, steps, step, (x, jnp.zeros_like(x)))

    return jax.jit(run)


def gathered(params, x):
    """The block as a JAX user writes it for few tokens: weights of the routed experts gathered."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, index = _route(params, tokens)
    gate, up, down = (params["experts"][name][index] for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(jnp.einsum("td,tkdf->tkf", tokens, gate))
    hidden = hidden * jnp.einsum("td,tkdf->tkf", tokens, up)
    y = jnp.einsum("tkf,tkfd,tk->td", hidden, down, weights.astype(x.dtype))
    return y.reshape(x.shape)


def ragged(params, x):
    """The block as a JAX user writes it for many tokens: rows sorted by expert, `ragged_dot`."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, index = _route(params, tokens)
    k = index.shape[1]
    order = jnp.argsort(index.reshape(-1))
    rows = tokens[order // k]
    sizes = jnp.bincount(index.reshape(-1), length=params["router"].shape[1]).astype(jnp.int32)
    product = partial(jax.lax.ragged_dot, group_sizes=sizes)
    experts = params["experts"]
    hidden = jax.nn.silu(product(rows, experts["gate"])) * product(rows, experts["up"])
    y = product(hidden, experts["down"])[jnp.argsort(order)].reshape(*index.shape, -1)
    return jnp.sum(y * weights[..., None].astype(x.dtype), axis=1).reshape(x.shape)


def _route(params, tokens):
    logits = (tokens @ params["router"]).astype(jnp.float32)
    weights, index = jax.lax.top_k(jax.nn.softmax(logits), 2)
    return weights / jnp.sum(weights, axis=-1, keepdims=True), index


def torch_layers(params, x, steps):
    """The block by torch in bfloat16, by bitsandbytes at 4 bits and by HQQ at 4 and 2 bits.

    Which rows go to which expert is settled beforehand, and on a GPU all is replayed as a graph.
    """
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"

    def tensor(array):
        return torch.from_numpy(np.array(array.astype(jnp.float32))).to(device, torch.bfloat16)

    rows = tensor(x).reshape(-1, x.shape[-1])
    weights, index = (np.asarray(a) for a in _route(params, x.reshape(-1, x.shape[-1])))
    routed = {}
    for expert in np.unique(index):
        token, rank = np.nonzero(index == expert)
        scale = torch.from_numpy(weights[token, rank].copy())[:, None].to(device, torch.bfloat16)
        routed[int(expert)] = torch.from_numpy(token).to(device), scale

    def linear(array):
        layer = torch.nn.Linear(*array.shape, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(tensor(array).T.contiguous(), requires_grad=False)
        return layer

    def runner(wrap):
        names = ("gate", "up", "down")
        experts = {e: [wrap(linear(params["experts"][name][e])) for name in names] for e in routed}

        def one():
            y = torch.zeros_like(rows)
            for e, (token, scale) in routed.items():
                gate, up, down = experts[e]
                own = rows[token]
                hidden = torch.nn.functional.silu(gate(own)) * up(own)
                y.index_add_(0, token, down(hidden) * scale)
            return y

        def wait(y):
            return float(y[0, 0])

        with torch.no_grad():
            one()
            if device == "cpu":
                return lambda: [wait(one()) for _ in range(steps)]
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                one()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = one()

        def replay():
            for _ in range(steps):
                graph.replay()
            return wait(y)

        return replay

    found = {"torch bfloat16": runner(lambda layer: layer)}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        def four_bits(layer):
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            new.load_state_dict(layer.state_dict())
            return new.to(device)

        found["bitsandbytes 4 bits"] = runner(four_bits)
    if importlib.util.find_spec("hqq"):
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        for bits in (2, 4):
            settings = BaseQuantizeConfig(nbits=bits, group_size=64)
            wrap = partial(
                HQQLinear, quant_config=settings, compute_dtype=torch.bfloat16, device=device
            )
            found[f"HQQ {bits} bits"] = runner(wrap)
    return found


def exact(params, x):
    """The block with dequantised float32 weights, every product at the highest precision."""
    tokens = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weights, index = _route(params, x.reshape(-1, x.shape[-1]))
    multiply = partial(jnp.dot, precision="highest")
    y = jnp.zeros_like(tokens)
    for expert in np.unique(np.asarray(index)):
        gate, up, down = (
            _expert(params["experts"][name], expert) for name in ("gate", "up", "down")
        )
        hidden = jax.nn.silu(multiply(tokens, gate)) * multiply(tokens, up)
        share = jnp.sum(jnp.where(index == expert, weights, 0), axis=1, keepdims=True)
        y = y + multiply(hidden, down) * share
    return np.asarray(y.reshape(x.shape))


def _expert(weight, expert):
    if isinstance(weight, jax.Array):
        return weight[expert].astype(jnp.float32)
    return weight.at(expert).choose(lambda one: one.dequantize())


def layers(decoder, repeats, bandwidth):
    """Rows for 1, 16, 64 and 2048 tokens, with the roofline of reading the routed experts once."""
    every, spec = models(decoder), decoder.layers[0].block
    dense, served = every["mcjax dense bfloat16"][1], every["mcjax 2.125 bits"][1]
    key, rows = jax.random.key(0), []
    size = {
        name: sum(a.nbytes for a in jax.tree.leaves(params["experts"])) / spec.experts
        for name, (_, params) in every.items()
    }
    for tokens, steps in STEPS.items():
        shape = (1, tokens, decoder.width)
        x = jax.random.normal(jax.random.fold_in(key, tokens), shape, jnp.bfloat16)
        blocks = {"ragged_dot": (ragged, dense)}
        if tokens == 1:
            blocks["einsum of gathered experts"] = gathered, dense
        for name, (act_bits, params) in every.items():
            blocks[name] = partial(_apply, spec, act_bits), params
        candidates = {
            name: partial(repeated(block, steps), params, x)
            for name, (block, params) in blocks.items()
        }
        expected = {id(params): exact(params, x) for params in (dense, served)}
        deviation = {}
        for name, (_, params) in blocks.items():
            got, wanted = np.asarray(candidates[name]()[1], np.float32), expected[id(params)]
            deviation[name] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        candidates |= torch_layers(dense, x, steps)
        routed = len(np.unique(np.asarray(_route(dense, x[0])[1])))
        timed = bench.timed(candidates, repeats, tokens=tokens)
        for row in timed:
            row["ms"] /= steps
            row["spread_ms"] = [value / steps for value in row["spread_ms"]]
        best = min(row["ms"] for row in timed if row["name"] in PEERS)
        for row in timed:
            moved = routed * size.get(row["name"], size["mcjax dense bfloat16"])
            row |= {"bytes": moved, "speedup": best / row["ms"]}
            row["of_roofline"] = moved / bandwidth / 1e6 / row["ms"]
            row["error"] = deviation.get(row["name"])
        rows += timed
        print(table(timed), flush=True)
    return rows


def _apply(spec, act_bits, params, x):
    return routed(spec, params, x, act_bits)[0]


PEERS = ("ragged_dot", "einsum of gathered experts", "mcjax dense bfloat16", "torch bfloat16")
"""Of these the quickest is what the others' speed-up is over."""


def quantising(decoder):
    """Seconds to quantise all experts' weights to 1 to 4 bits, compilation not counted."""
    spec = decoder.layers[0].block
    e, d, f = spec.experts, decoder.width, spec.width
    seconds = {"fast": 0.0, "normal": 0.0}
    for count, (d_in, d_out) in ((2, (d, f)), (1, (f, d))):
        w = jax.random.normal(jax.random.key(0), (e, d_in, d_out)) * d_in**-0.5
        spread = jnp.exp(jax.random.normal(jax.random.key(1), (e, d_in)))
        gram = jax.vmap(jnp.diag)(spread) + 0.1 * spread[:, :, None] * spread[:, None]
        quantise = partial(mcjax.quantize, w, 4, 128, gram, chunk=CHUNK)
        jax.block_until_ready(quantise(sweeps=0))
        for effort, sweeps in (("fast", 1), ("normal", 6)):
            start = time.perf_counter()
            jax.block_until_ready(quantise(sweeps=sweeps))
            seconds[effort] += count * (time.perf_counter() - start)
            print("seconds to quantise the experts to 1 to 4 bits, so far", seconds, flush=True)
    return seconds


def table(rows):
    """The layer's rows as Markdown."""
    lines = [
        "| tokens | | ms (quartiles) | speed-up over the best in bfloat16 | of roofline | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["spread_ms"]
        cells = [str(row["tokens"]), row["name"], f"{row['ms']:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{row['speedup']:.2f}x", f"{row['of_roofline']:.0%}"]
        cells.append("" if row["error"] is None else f"{row['error']:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Writes one JSON object and prints it as tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", choices=("layer", "quantise"), help="this part alone")
    arguments = parser.parse_args()
    more = {"hidden_size": arguments.hidden, "intermediate_size": arguments.inner}
    _, decoder = describe(bench.MOE | more | {"vocab_size": 32, "num_hidden_layers": 1})
    facts = {"machine": bench.machine()}
    if arguments.only != "quantise":
        facts["layer"] = layers(decoder, arguments.repeats, facts["machine"]["bandwidth_gb_s"])
    if arguments.only != "layer":
        facts["quantise_seconds"] = quantising(decoder)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(bench.caption(facts["machine"]))


if __name__ == "__main__":
    main()
