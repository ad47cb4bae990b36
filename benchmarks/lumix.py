"""LUMix against plain mixing: a grid of shares on handwritten digits with few labels.

    export XLA_FLAGS="--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    uv run --extra train python benchmarks/lumix.py --out benchmarks/results/lumix_digits_cpu.json

The flags halve the time to compile and slow nothing down here. Networks, optimisers and random
shifts are those of train/configs/digits_resnet.py and digits_vit.py, at float weights. Each seed
draws its own training images (10 of each digit) and halves the rest: settings are chosen on the
validation half, and the test half says what they are worth. Rows share one compilation for each
model and kind of mixing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax.lumix import lumix, mix

TRAIN = Path(__file__).resolve().parent.parent / "train"
sys.path.append(str(TRAIN))  # the recipes' own imports
from loop import load_recipe  # noqa: E402
from recipe import VisionRecipe  # noqa: E402
from vision_step import make_optimiser, normalise  # noqa: E402

BINS = 15
CLASSES = 10
MODELS = ("resnet", "vit")
PLAIN = {"r_s": 0.0, "r_r": 0.0, "beta": 1.0}
GRID = [
    {"r_s": s, "r_r": r, "beta": b}
    for s, r, b in [
        (0.3, 0.0, 1.0),
        (0.5, 0.0, 1.0),
        (0.7, 0.0, 1.0),
        (0.0, 0.3, 0.5),
        (0.0, 0.3, 1.0),
        (0.0, 0.3, 4.0),
        (0.4, 0.2, 1.0),
    ]
]


def load_digits(path):
    """Images uint8 [N, 8, 8, 1] as train/digits_tfds.py makes them, labels int32 [N]."""
    if path is None:
        from sklearn.datasets import load_digits as load

        digits = load()
        images, labels = digits.images, digits.target
    else:
        with np.load(path) as data:
            images, labels = data["images"], data["labels"]
    images = (np.asarray(images) * 15).astype(np.uint8)
    return images.reshape(*images.shape[:3], 1), np.asarray(labels, np.int32)


def split(labels, seed, per_class):
    """Indices of training, validation and test images; training has `per_class` of each class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.zeros(len(labels), int)
    for c in range(CLASSES):
        mine = order[labels[order] == c]
        rank[mine] = np.arange(len(mine))
    rest = order[rank[order] >= per_class]
    half = len(rest) // 2
    return order[rank[order] < per_class], rest[:half], rest[half : 2 * half]


def expected_calibration_error(logits, labels):
    """Mean |confidence - accuracy| over 15 bins of equal width, weighted by their counts."""
    probabilities = jax.nn.softmax(logits)
    confidence = jnp.max(probabilities, axis=-1)
    right = jnp.argmax(logits, axis=-1) == labels
    where = jnp.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = jnp.zeros(BINS).at[where].add(confidence - right)
    return jnp.sum(jnp.abs(gap)) / len(labels)


def shift(key, images, pad):
    """A random part of each image [B, H, W, C] as large as before, after padding it with zeros."""
    margins = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)

    def cut(wide, corner):
        return jax.lax.dynamic_slice(wide, (*corner, 0), images.shape[1:])

    return jax.vmap(cut)(jnp.pad(images, margins), corners)


@lru_cache
def programs(name, mode, steps, batch):
    """What trains one network and judges it, jitted and mapped over seeds.

    Returns:
      start: keys, images -> state.
      step: state, keys, (images, labels), r_s, r_r, beta -> state.
      judge: state, (images, labels) -> a dict of float32 [seeds]: accuracy, ece, nll.
    """
    recipe = load_recipe(TRAIN / "configs" / f"digits_{name}.py", VisionRecipe)
    recipe = dataclasses.replace(
        recipe, widths=(), mixing="none", r_s=0.0, r_r=0.0, epochs=None, steps=steps
    )
    module, optimiser = recipe.module(CLASSES), make_optimiser(recipe, steps)

    def start(key, images):
        variables = module.init(key, normalise(images[:1]))
        params = variables["params"]
        return params, variables.get("batch_stats", {}), optimiser.init(params)

    def step(state, key, train, r_s, r_r, beta):
        params, stats, moments = state
        images, labels = train
        pick_key, shift_key, mix_key, loss_key = jax.random.split(key, 4)
        picked = jax.random.permutation(pick_key, len(labels))[:batch]
        x, y = normalise(shift(shift_key, images[picked], recipe.pad)), labels[picked]
        if mode == "none":
            loss = partial(optax.softmax_cross_entropy_with_integer_labels, labels=y)
        else:
            x, pair = mix(mix_key, x, y, mode=mode)
            loss = partial(lumix(r_s=r_s, r_r=r_r, beta=beta), loss_key, labels=pair)

        def objective(params):
            variables = {"params": params, "batch_stats": stats}
            logits, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean(loss(logits)), new.get("batch_stats", {})

        gradient, stats = jax.grad(objective, has_aux=True)(params)
        updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), stats, moments

    def judge(state, held_out):
        x, y = held_out
        logits = module.apply({"params": state[0], "batch_stats": state[1]}, normalise(x))
        return {
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == y),
            "ece": expected_calibration_error(logits, y),
            "nll": jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)),
        }

    steps_of_all = jax.vmap(step, in_axes=(0, 0, 0, None, None, None))
    return (
        jax.jit(jax.vmap(start)),
        jax.jit(steps_of_all, donate_argnums=0),
        jax.jit(jax.vmap(judge)),
    )


def run(keys, train, held_out, r_s, r_r, beta, *, name, mode, steps, batch):
    """Trains every seed; held_out is a list of (images, labels), with seeds in front.

    Returns:
      For each of `held_out` a dict of float32 [seeds]: accuracy, ece, nll.
    """
    start, step, judge = programs(name, mode, steps, batch)
    init_keys, train_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    every = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, steps))(train_keys), 1, 0)
    state = start(init_keys, train[0])
    # A loop of Python's: inside one of XLA's, convolutions took eight times as long on CPU.
    for now in every:
        state = step(state, now, train, r_s, r_r, beta)
    return [judge(state, part) for part in held_out]


def ablate(images, labels, arguments):
    """Rows of every model, kind of mixing and setting, with values for each seed."""
    splits = [split(labels, seed, arguments.per_class) for seed in range(arguments.seeds)]
    train, *held_out = ((images[i], labels[i]) for i in map(np.stack, zip(*splits, strict=True)))
    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    rows = []
    for name in arguments.models:
        for mode in ("none", "mixup", "cutmix"):
            settings = [PLAIN] if mode == "none" else [PLAIN, *GRID[: arguments.grid]]
            for setting in settings:
                begin = time.perf_counter()
                validation, test = run(
                    keys,
                    train,
                    held_out,
                    **setting,
                    name=name,
                    mode=mode,
                    steps=arguments.steps,
                    batch=arguments.batch,
                )
                row = {"model": name, "mode": mode, **setting}
                row["validation"] = {k: np.asarray(v).tolist() for k, v in validation.items()}
                row["test"] = {k: np.asarray(v).tolist() for k, v in test.items()}
                rows.append(row)
                print(describe(row), f"{time.perf_counter() - begin:.1f} s", flush=True)
    return rows


def describe(row):
    """One line of the table, on the test half: mean and standard deviation over seeds."""
    plain = row["r_s"] == row["r_r"] == 0
    label = row["mode"] if plain else f"LUMix on {row['mode']}"
    cells = [row["model"], label]
    cells += ["", "", ""] if plain else [f"{row[k]:g}" for k in ("r_s", "r_r", "beta")]
    for key in ("accuracy", "ece"):
        values = 100 * np.array(row["test"][key])
        cells.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}")
    cells.append(f"{np.mean(row['test']['nll']):.3f}")
    return "| " + " | ".join(cells) + " |"


def paired(rows, which):
    """LUMix minus the same mixing without it, seed by seed, over both models and kinds of mixing.

    Returns:
      For each setting: mean and standard error of the difference in accuracy, ECE (both in points)
      and negative log-likelihood on the half `which`.
    """
    plain = {(r["model"], r["mode"]): r for r in rows if r["r_s"] == r["r_r"] == 0}
    out = []
    for setting in GRID:
        mine = [r for r in rows if all(r[k] == v for k, v in setting.items())]
        if not mine:
            continue
        facts = dict(setting)
        for key, scale in (("accuracy", 100), ("ece", 100), ("nll", 1)):
            # Seeds share their images across rows, so a seed is the unit, not a run.
            difference = scale * np.mean(
                [
                    np.subtract(r[which][key], plain[r["model"], r["mode"]][which][key])
                    for r in mine
                ],
                axis=0,
            )
            error = difference.std(ddof=1) / np.sqrt(len(difference))
            facts[key] = [round(float(difference.mean()), 4), round(float(error), 4)]
        out.append(facts)
    return out


def draw(rows, path):
    """Accuracy against calibration, one panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    colours = {"none": "black", "mixup": "tab:blue", "cutmix": "tab:orange"}
    for panel, model in zip(panels[0], models, strict=True):
        seen = set()
        for row in (r for r in rows if r["model"] == model):
            plain = row["r_s"] == row["r_r"] == 0
            label = row["mode"] if plain else f"LUMix on {row['mode']}"
            values = [100 * np.array(row["test"][k]) for k in ("accuracy", "ece")]
            panel.errorbar(
                *(v.mean() for v in values),
                *(v.std(ddof=1) / np.sqrt(len(v)) for v in reversed(values)),
                fmt="s" if plain else "o",
                markersize=8 if plain else 4,
                elinewidth=0.5,
                alpha=1 if plain else 0.6,
                color=colours[row["mode"]],
                label=None if label in seen else label,
            )
            seen.add(label)
        panel.set(title=model, xlabel="test accuracy (%)", ylabel="calibration error (%)")
        panel.legend(fontsize=8)
    figure.suptitle("Digits with few labels; bars are standard errors over seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Prints the table; writes one JSON object and a plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--data", help="an npz of images [N, 8, 8] and labels [N]")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--grid", type=int, default=len(GRID), help="how many settings of LUMix")
    arguments = parser.parse_args()
    images, labels = load_digits(arguments.data)
    print("| model | training | r_s | r_r | beta | accuracy | ECE | NLL |")
    print("|---|---|---|---|---|---|---|---|")
    rows = ablate(images, labels, arguments)
    out = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **{k: getattr(arguments, k) for k in ("seeds", "per_class", "steps", "batch")},
        "rows": rows,
        "lumix_minus_plain": {which: paired(rows, which) for which in ("validation", "test")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(out, indent=1) + "\n")
    draw(rows, arguments.out.with_suffix(".png"))
    for which, table in out["lumix_minus_plain"].items():
        print(f"\nLUMix minus plain mixing, {which}, mean ± standard error over seeds:\n")
        print("| r_s | r_r | beta | accuracy | ECE | NLL |\n|---|---|---|---|---|---|")
        for facts in table:
            cells = [f"{facts[k]:g}" for k in ("r_s", "r_r", "beta")]
            cells += [f"{facts[k][0]:+.2f} ± {facts[k][1]:.2f}" for k in ("accuracy", "ece")]
            cells.append(f"{facts['nll'][0]:+.3f} ± {facts['nll'][1]:.3f}")
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
