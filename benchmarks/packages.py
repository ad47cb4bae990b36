"""Networks from other people's packages, shrunk and served as they are.

    uv run --no-project --with . --with "transformers<5" --with flaxmodels --with flaxdiff \
        --with dm-haiku --with scikit-learn python benchmarks/packages.py --out FILE.json

Small configurations with random weights, since nothing is downloaded. For each network: how many
leaves there are and how many are planes, how far the served network is from the dequantised one,
the change of its result at each width on inputs that were not watched, at 4 bits also with planes
that were made blindly, and how far gradients by inputs are from the dequantised network's, under
`jit`, and the result under `vmap` and `scan`. A package that is missing is told of.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import tree

WIDTHS = (1, 2, 3, 4)
Made = tuple[Callable[[Any, Any], jax.Array], Any, Callable[[int], Any]]
"""A function of weights and a batch, the weights, and what draws the n-th batch."""


def images(*shape: int) -> Callable[[int], Any]:
    """Smooth random images, whose pixels hang together as those of photographs do."""

    def draw(n):
        rough = jax.random.normal(jax.random.key(n), shape)
        low = jax.random.normal(jax.random.key(n + 100), (shape[0], 4, 4, shape[-1]))
        return jax.image.resize(low, shape, "linear") + 0.3 * rough

    return draw


def tokens(size: int, *shape: int) -> Callable[[int], Any]:
    """Random tokens, rarer the higher."""
    return lambda n: (np.random.default_rng(n).random(shape) ** 3 * size).astype(np.int32)


def vit() -> Made:
    """The Flax vision transformer of transformers 4."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    model = FlaxViTForImageClassification(config)
    draw = images(32, 32, 32, 3)  # of each image only the first token reaches the end

    def first(n):  # channels first, as its face has them
        return jnp.moveaxis(draw(n), -1, 1)

    return (lambda p, x: model(pixel_values=x, params=p).logits), model.params, first


def bert() -> Made:
    """The Flax encoder of transformers 4."""
    from transformers import BertConfig, FlaxBertForMaskedLM

    config = BertConfig(
        vocab_size=300,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
    )
    model = FlaxBertForMaskedLM(config)
    return (lambda p, x: model(input_ids=x, params=p).logits), model.params, tokens(300, 8, 32)


def gpt2() -> Made:
    """The Flax decoder of transformers 4, whose kernels lie the other way round."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(vocab_size=300, n_embd=96, n_layer=3, n_head=4, n_positions=64)
    model = FlaxGPT2LMHeadModel(config)
    return (lambda p, x: model(input_ids=x, params=p).logits), model.params, tokens(300, 8, 32)


def resnet() -> Made:
    """ResNet-18 of flaxmodels, batch-normalised."""
    import flaxmodels

    model = flaxmodels.ResNet18(output="logits", pretrained=None, normalize=False, num_classes=10)
    draw = images(2, 64, 64, 3)
    variables = model.init(jax.random.key(0), draw(0), train=False)
    return (lambda p, x: model.apply(p, x, train=False)), variables, draw


def unet() -> Made:
    """The U-Net of flaxdiff, with attention and transposed convolutions."""
    from flaxdiff.models.simple_unet import Unet

    model = Unet(
        emb_features=64,
        feature_depths=[32, 64],
        attention_configs=[None, {"heads": 4}],
        num_res_blocks=1,
        norm_groups=8,
    )
    draw = images(2, 16, 16, 3)
    time_, text = jnp.array([0.2, 0.7]), jax.random.normal(jax.random.key(3), (2, 5, 48))
    variables = model.init(jax.random.key(0), draw(0), time_, text)
    return (lambda p, x: model.apply(p, x, time_, text)), variables, draw


def lstm() -> Made:
    """A recurrent network of Haiku, unrolled by its scan."""
    import haiku

    def network(x):
        core = haiku.LSTM(64)
        y, _ = haiku.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return haiku.Linear(10)(y)

    made = haiku.without_apply_rng(haiku.transform(network))
    draw = lambda n: jax.random.normal(jax.random.key(n), (8, 12, 32))  # noqa: E731
    return made.apply, made.init(jax.random.key(0), draw(0)), draw


NETWORKS = {"vit": vit, "bert": bert, "gpt2": gpt2, "resnet": resnet, "unet": unet, "lstm": lstm}


def main() -> None:
    """Writes FILE.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a file to write; the table is printed anyhow")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    arguments = parser.parse_args()
    out: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name in arguments.networks:
        try:
            made = NETWORKS[name]()
        except ImportError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        out[name] = measured(*made)
        print(name, json.dumps(out[name], indent=1), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(out, indent=1) + "\n")


def measured(function, params: Any, draw: Callable[[int], Any]) -> dict[str, Any]:
    """What the module's docstring says."""
    watched = tree.watch(function, params, [draw(n) for n in range(4)])
    planes, report = tree.shrink(params, watched)
    blind = {name: one._replace(gram=None) for name, one in watched.items()}
    unseen, _ = tree.shrink(params, blind)
    x, served = draw(99), jax.jit(tree.serving(function))
    exact = function(params, x)

    def change(result):
        return float(jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact))

    found = {
        "leaves": len(report.leaves),
        "planes": sum(leaf.bits is not None for leaf in report.leaves),
        "coverage": report.coverage,
        "left": sorted({leaf.why for leaf in report.leaves if leaf.bits is None}),
        "changes": [change(served(tree.slice_tree(planes, k), x)) for k in WIDTHS],
        "blindly at 4 bits": change(served(unseen, x)),
    }
    at = tree.slice_tree(planes, 2)
    dense = tree.dequantize_tree(at)
    got, expected = served(at, x), function(dense, x)

    def apart(a, b):
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    found["served against dequantised"] = apart(got, expected)
    pair = jnp.stack([jnp.asarray(x), jnp.asarray(x)])
    found["under vmap"] = apart(jax.vmap(lambda one: served(at, one))(pair)[1], expected)
    scanned = jax.lax.scan(lambda carry, one: (carry, served(at, one)), 0, pair)[1]
    found["under scan"] = apart(scanned[1], expected)
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        mine, theirs = (
            jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(x)
            for f, p in ((served, at), (function, dense))
        )
        found["gradients"] = apart(mine, theirs)
    return found


if __name__ == "__main__":
    main()
