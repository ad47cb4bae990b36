"""A Mixtral-8x7B-shaped block of experts from planes, beside the same in bfloat16.

    python benchmarks/layer.py [--out FILE]

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
from mcjax.models.config import MixtralConfig
from mcjax.models.mixtral import MoE

WIDTHS = (3, 2, 2, 2, 2, 2, 2, 2)
"""Bits of the experts: 2.125 on average, the fewest above 2.05 that eight experts can have."""


def models(config):
    """The block dense in bfloat16 and from planes: modules and parameters by name."""
    dense, planes = MoE(config), MoE(config, WIDTHS)
    rounded = MoE(config, WIDTHS, act_bits=8)
    x = jax.ShapeDtypeStruct((1, 1, config.hidden_size), jnp.bfloat16)
    params = bench.random_params(planes, x, jnp.bfloat16)
    return {
        "mcjax dense bfloat16": (dense, bench.random_params(dense, x, jnp.bfloat16)),
        "mcjax 2.125 bits": (planes, params),
        "mcjax 2.125 bits, int8 activations": (rounded, params),
    }


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


def torch_layers(params, x, device):
    """One token's two experts by torch in bfloat16, and by bitsandbytes and HQQ at 4 and 2 bits."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    weights, index = _route(params, x.reshape(-1, x.shape[-1]))
    rows = torch.from_numpy(np.array(x.astype(jnp.float32))).reshape(-1, x.shape[-1])
    rows = rows.to(device, torch.bfloat16)
    scale = torch.from_numpy(np.array(weights)).to(device, torch.bfloat16)

    def linear(array):
        layer = torch.nn.Linear(array.shape[0], array.shape[1], bias=False)
        layer.weight.data = torch.from_numpy(np.array(array.astype(jnp.float32)).T.copy())
        return layer.bfloat16().to(device)

    def run(experts):
        y = 0
        for i, (gate, up, down) in enumerate(experts):
            hidden = torch.nn.functional.silu(gate(rows)) * up(rows)
            y = y + down(hidden) * scale[:, i : i + 1]
        return float(y[0, 0])

    def make(wrap):
        with torch.no_grad():
            return [
                [wrap(linear(params["experts"][n][int(e)])) for n in ("gate", "up", "down")]
                for e in np.asarray(index[0])
            ]

    found = {"torch bfloat16": partial(run, make(lambda layer: layer))}
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        def four_bits(layer):
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            new.load_state_dict(layer.state_dict())
            return new.to(device)

        found["bitsandbytes 4 bits"] = partial(run, make(four_bits))
    if importlib.util.find_spec("hqq"):
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        for bits in (2, 4):
            settings = BaseQuantizeConfig(nbits=bits, group_size=64)
            wrap = partial(
                HQQLinear, quant_config=settings, compute_dtype=torch.bfloat16, device=device
            )
            found[f"HQQ {bits} bits"] = partial(run, make(wrap))
    return found


def layers(config, repeats, bandwidth):
    """Rows for 1, 16 and 2048 tokens, with the roofline of reading the routed experts once."""
    every = models(config)
    dense = every["mcjax dense bfloat16"][1]
    key, rows = jax.random.key(0), []
    size = {
        name: [
            sum(jax.tree.leaves(jax.tree.map(lambda a: a.nbytes / len(a), stack)))
            for stack in _stacks(params, config)
        ]
        for name, (_, params) in every.items()
    }
    for tokens in (1, 16, 2048):
        shape = (1, tokens, config.hidden_size)
        x = jax.random.normal(jax.random.fold_in(key, tokens), shape, jnp.bfloat16)
        candidates = {"ragged_dot": partial(jax.jit(ragged), dense, x)}
        if tokens <= 16:
            candidates["einsum of gathered experts"] = partial(jax.jit(gathered), dense, x)
        for name, (module, params) in every.items():
            apply = jax.jit(lambda p, x, module=module: module.apply({"params": p}, x))
            candidates[name] = partial(apply, params, x)
        if tokens == 1:
            device = "cuda" if jax.default_backend() == "gpu" else "cpu"
            candidates |= torch_layers(dense, x, device)
        routed = np.unique(np.asarray(_route(dense, x[0])[1]))
        timed = bench.timed(candidates, repeats, tokens=tokens)
        best = min(row["ms"] for row in timed if row["name"] in JAX_PEERS)
        for row in timed:
            moved = sum(np.array(size.get(row["name"], size["mcjax dense bfloat16"]))[routed])
            row |= {"bytes": float(moved), "speedup": best / row["ms"]}
            row["of_roofline"] = moved / bandwidth / 1e6 / row["ms"]
        rows += timed
    return rows


JAX_PEERS = ("ragged_dot", "einsum of gathered experts", "mcjax dense bfloat16")
"""Of these the quickest is what the others' speed-up is over."""


def _stacks(params, config):
    """What holds each expert's weights, expert by expert."""
    stacks = [None] * config.num_local_experts
    for expert in range(config.num_local_experts):
        held = []
        for weight in params["experts"].values():
            if isinstance(weight, jax.Array):
                held.append(weight)
            else:
                held.append(weight.stacks[weight.location[expert][0]])
        stacks[expert] = held
    return stacks


def quantising(config):
    """Seconds to quantise all experts' weights to 1 to 4 bits, compilation not counted."""
    e, d, f = config.num_local_experts, config.hidden_size, config.intermediate_size
    seconds = {}
    for effort, sweeps in (("fast", 1), ("normal", 6)):
        total = 0.0
        for i, (d_in, d_out) in enumerate(((d, f), (d, f), (f, d))):
            key = jax.random.key(i)
            w = jax.random.normal(key, (e, d_in, d_out)) * d_in**-0.5
            mix = jax.random.normal(jax.random.fold_in(key, 1), (e, 2 * d_in, d_in))
            gram = jnp.einsum("eni,enj->eij", mix, mix)
            quantise = partial(mcjax.quantize, w, 4, 128, gram, sweeps=sweeps)
            jax.block_until_ready(quantise())
            start = time.perf_counter()
            jax.block_until_ready(quantise())
            total += time.perf_counter() - start
        seconds[effort] = total
    return seconds


def table(rows):
    """The layer's rows as Markdown."""
    lines = [
        "| tokens | | ms (quartiles) | of the best in bfloat16 | of roofline |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["spread_ms"]
        cells = [str(row["tokens"]), row["name"], f"{row['ms']:.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{row['speedup']:.2f}x", f"{row['of_roofline']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Writes one JSON object and prints it as tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    facts = {"machine": bench.machine()}
    facts["layer"] = layers(config, arguments.repeats, facts["machine"]["bandwidth_gb_s"])
    facts["quantise_seconds"] = quantising(config)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts["layer"]), bench.caption(facts["machine"]), sep="\n\n")
    print("all experts to 1 to 4 bits, seconds:", facts["quantise_seconds"])


if __name__ == "__main__":
    main()
