"""Networks that know nothing of mcjax, on handwritten digits: shrunk, tuned, trained once.

    uv run --with qwix --with scikit-learn python benchmarks/network.py --out FILE.json

A residual network and a vision transformer of plain Flax layers, each trained in float on two
thirds of scikit-learn's 1,797 digits, tested on the other third, for each of three folds. Of one
tree of planes each width; then with its tables and whatever else is floating point tuned against
the float network; a budget of 2.5 bits and both widths beside it; the same network trained once for
all widths; and qwix's int8 and int4. Bytes are those of the whole tree, norms and biases too.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax import qat, tree, tune
from mcjax.leaves import named
from mcjax.tree.kernel import is_kernel

WIDTHS = (8, 4, 3, 2)
BATCH = 64


class ResNet(nn.Module):
    """Three stages of two blocks, group-normalised."""

    features: int = 16

    @nn.compact
    def __call__(self, x):
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        x = nn.Conv(self.features, (3, 3))(x)
        for stage in range(3):
            for block in range(2):
                size, strides = self.features * 2**stage, 2 if stage and not block else 1
                y = nn.Conv(size, (3, 3), strides)(nn.relu(nn.GroupNorm(8)(x)))
                y = nn.Conv(size, (3, 3))(nn.relu(nn.GroupNorm(8)(y)))
                x = y + (x if x.shape == y.shape else nn.Conv(size, (1, 1), strides)(x))
        return nn.Dense(10)(jnp.mean(nn.relu(nn.GroupNorm(8)(x)), axis=(1, 2)))


class Layer(nn.Module):
    """One of a transformer, for `nn.scan`."""

    @nn.compact
    def __call__(self, x, _=None):
        """What a scan carries on, and nothing else."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Sixteen patches of 2 x 2, four scanned layers."""

    @nn.compact
    def __call__(self, x):
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        x = nn.Conv(96, (2, 2), (2, 2))(x).reshape(len(x), 16, 96)
        x = x + self.param("place", nn.initializers.normal(0.02), (16, 96))
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = layers()(x, None)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


NETWORKS = {"resnet": ResNet, "transformer": Transformer}


def main() -> None:
    """Writes FILE.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--folds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=600, help="of training; a third for tuning")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    arguments = parser.parse_args()
    out: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name in arguments.networks:
        rows: dict[str, list[Any]] = {}
        for fold in range(arguments.folds):
            start = time.perf_counter()
            for setting, *found in measured(NETWORKS[name](), fold, arguments.steps):
                rows.setdefault(setting, []).append(found)
            print(f"{name}, fold {fold}: {time.perf_counter() - start:.0f} s", flush=True)
            kinds = ("bytes", "accuracy", "loss")
            out[name] = {
                setting: dict(zip(kinds, np.mean(each, axis=0).tolist(), strict=True))
                for setting, each in rows.items()
            }
            arguments.out.write_text(json.dumps(out, indent=1) + "\n")
    for name in arguments.networks:
        print(name)
        for setting, row in out[name].items():
            print(f"  {setting:24} {row['bytes']:9.0f} {row['accuracy']:7.2f} {row['loss']:8.4f}")


def measured(module: nn.Module, fold: int, steps: int):
    """Yields (setting, bytes, accuracy in %, mean loss on images that nothing has seen)."""
    (x, y), test = digits(fold)
    params = module.init(jax.random.key(fold), x[:1])["params"]

    def apply(params, x):
        return module.apply({"params": params}, x)

    def of_labels(params, x, y):
        logits = apply(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    params = trained(of_labels, params, (x, y), steps, adam(2e-3, steps))
    judge = jax.jit(partial(_judge, apply))
    served = jax.jit(partial(_judge, tree.serving(apply)))
    yield "float32", nbytes(params), *judge(params, *test)

    seen = [x[n : n + 128] for n in range(0, 512, 128)]
    watched = tree.watch(apply, params, seen)
    planes, _ = tree.shrink(params, watched, [tree.Rule(bits=8)])
    blind = {name: one._replace(gram=None) for name, one in watched.items()}
    unseen, _ = tree.shrink(params, blind, [tree.Rule(bits=8)])
    for k in WIDTHS:
        at = tree.slice_tree(planes, k)
        yield f"{k} bits", nbytes(at), *served(at, *test)
        at = tree.slice_tree(unseen, k)
        yield f"{k} bits, inputs unseen", nbytes(at), *served(at, *test)

    costs = tree.costs(apply, params, planes, seen[:2], tree.divergence)
    logits = apply(params, x)
    for budget in (2.0, 2.5, 3.0):
        at = tree.slice_tree(planes, tree.allocate(planes, costs, budget))
        yield f"budget {budget}", nbytes(at), *served(at, *test)
        if budget == 2.5:
            at = tuned(apply, at, x, logits, steps // 3)
            yield f"budget {budget}, tuned", nbytes(at), *served(at, *test)
    for k in WIDTHS:
        at = tuned(apply, tree.slice_tree(planes, k), x, logits, steps // 3)
        yield f"{k} bits, tuned", nbytes(at), *served(at, *test)

    spec = qat.QuantSpec(widths=WIDTHS, act_bits=None)
    quantizers = tree.once.init(params, watched, spec)

    def of_widths(both, x, y):
        return sum(of_labels(tree.once.apply(*both, k), x, y) for k in WIDTHS)

    both, labels = (params, quantizers), tree.once.labels(params, quantizers)
    rates = {"weight": 1e-3, "other": 1e-3, "table": 3e-3}
    optimiser = optax.multi_transform({k: adam(rate, steps) for k, rate in rates.items()}, labels)
    both = trained(of_widths, both, (x, y), steps, optimiser)
    planes = tree.once.freeze(*both)
    for k in WIDTHS:
        at = tree.slice_tree(planes, k)
        yield f"{k} bits, trained once", nbytes(at), *served(at, *test)

    for kind in ("int8", "int4"):
        made, size = of_qwix(params, watched, kind)
        yield f"qwix {kind}", size, *judge(made, *test)


def digits(fold: int):
    """Images [N, 8, 8, 1] of 0 to 1 and labels: two thirds to learn from, one third held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    held = np.isin(np.arange(len(images)) % 3, fold)
    return tuple((images[some], labels[some]) for some in (order[~held], order[held]))


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose rate rises for a tenth of the steps and falls for the others."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0, rate, steps // 10, steps))


def trained(loss, params: Any, data, steps: int, optimiser: optax.GradientTransformation) -> Any:
    """What an optimiser makes of a tree."""

    @jax.jit
    def step(params, state, *batch):
        gradient = jax.grad(loss)(params, *batch)
        change, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, change), state

    state, generator = optimiser.init(params), np.random.default_rng(1)
    for _ in range(steps):
        some = generator.choice(len(data[0]), BATCH, replace=False)
        params, state = step(params, state, *(a[some] for a in data))
    return params


def tuned(apply, planes: Any, x, logits, steps: int) -> Any:
    """Planes of one width each with tables, norms and biases learned from the float network."""

    def loss(tuned, x, logits):
        return tree.divergence(logits, apply(tune.apply(planes, tuned), x))

    found = trained(loss, tune.init(planes), (x, np.asarray(logits)), steps, adam(5e-3, steps))
    return tune.write(planes, found)


def of_qwix(params: Any, watched, kind: str):
    """The same weights by qwix, a scale for each output feature, and the tree's bytes."""
    import qwix

    names, leaves, structure = named(params)
    made, size = [], 0
    for name, leaf in zip(names, leaves, strict=True):
        layout = watched[name].layout
        if layout is None or watched[name].uses:
            made, size = [*made, leaf], size + leaf.nbytes
            continue
        matrices = layout.to_matrices(leaf)
        axes = [n for n in range(matrices.ndim) if n != matrices.ndim - 2]
        held = qwix.quantize(matrices, kind, channelwise_axes=axes)
        size += held.qvalue.size * int(kind[3:]) // 8 + held.scale.nbytes
        made.append(layout.to_weight(qwix.dequantize(held)))
    return jax.tree.unflatten(structure, made), size


def nbytes(params: Any) -> int:
    """Of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=is_kernel))


def _judge(apply, params, x, y):
    logits = apply(params, x)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
    return 100 * jnp.mean(jnp.argmax(logits, -1) == y), loss


if __name__ == "__main__":
    main()
