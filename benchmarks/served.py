"""A dense network of 100 million numbers, one row at a time: planes beside its own float32.

    uv run python benchmarks/served.py --out FILE.json

Six layers of 4096 x 4096 of plain Flax, one after another and scanned, under `jax.jit`; the same
function by `mcjax.tree.serving` with int8 activations; and beside them one product of that size by
itself. Planes are random, which costs what any do. All take turns.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import mcjax
from mcjax import tree
from mcjax.bench import random_planes, timed
from mcjax.leaves import named
from mcjax.tree import Kernel

WIDTH = 4096
LAYERS = 6


class Layer(nn.Module):
    """One of a stack, for `nn.scan`."""

    @nn.compact
    def __call__(self, x, _=None):
        """What a scan carries on, and nothing else."""
        return nn.gelu(nn.Dense(WIDTH)(x)), None


class Network(nn.Module):
    """Layers one after another, or scanned."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        """Reads x [B, WIDTH]."""
        if self.scanned:
            split = {"params": True}
            x, _ = nn.scan(Layer, {"params": 0}, split_rngs=split, length=LAYERS)()(x, None)
            return x
        for _ in range(LAYERS):
            x, _ = Layer()(x)
        return x


def main() -> None:
    """Writes FILE.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a file to write; the table is printed anyhow")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    out: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    x = jax.random.normal(jax.random.key(0), (1, WIDTH))
    w = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) / WIDTH**0.5
    product = partial(mcjax.dot, act_bits=8)
    rows = {"float32": partial(jax.jit(jnp.dot), x, w)}
    for bits in arguments.bits:
        planes = random_planes(jax.random.key(2), w.shape, bits)
        rows[f"{bits} bits"] = partial(jax.jit(product), x, planes)
    out["one product"] = timed(rows, arguments.repeats)
    for scanned in (False, True):
        name = "scanned" if scanned else "one after another"
        out[name] = network(Network(scanned), x, arguments)
        for kind, single in zip(out[name], out["one product"], strict=True):
            kind["of one product's"] = kind["speedup"] / single["speedup"]
    text = json.dumps(out, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def network(module: nn.Module, x: jax.Array, arguments) -> list[dict[str, Any]]:
    """Rows of `mcjax.bench.timed`."""
    params = module.init(jax.random.key(0), x)["params"]

    def apply(params, x):
        return module.apply({"params": params}, x)

    watched = tree.watch(apply, params, [x])
    rows = {"float32": partial(jax.jit(apply), params, x)}
    served = jax.jit(tree.serving(apply, act_bits=8))
    for bits in arguments.bits:
        names, leaves, structure = named(params)
        made = [
            Kernel(
                planes=random_planes(jax.random.key(n), watched[name].found.matrices, bits),
                layout=watched[name].found,
                dtype=leaf.dtype,
            )
            if watched[name].layout is not None
            else leaf
            for n, (name, leaf) in enumerate(zip(names, leaves, strict=True))
        ]
        rows[f"{bits} bits"] = partial(served, jax.tree.unflatten(structure, made), x)
    return timed(rows, arguments.repeats)


if __name__ == "__main__":
    main()
