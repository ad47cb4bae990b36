"""Trains one image classifier for every width at once and serves each from the same bit planes.

    uv run python train/vision.py --config train/configs/digits_resnet.py

Read the configs: each says what it trains, how long that takes and what comes out. The folder then
holds `model/` (planes of all widths, one Orbax checkpoint; `load` reads those of one width),
`metrics.csv`, `accuracy.png` and `checkpoints/`. The accuracies that are printed are those of the
planes in `model/`. Stopped by a signal or a crash, the same command with --resume goes on and ends
with the very same parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from data_sources import Ahead, Augment, Dataset, Rows, centre, open_dataset
from jax.sharding import Mesh
from loop import State, begin, command_line, data_mesh, fit, global_batch, program
from recipe import VISION_MODELS, VisionRecipe
from vision_step import (
    FLOAT,
    initial_extra,
    make_objective,
    make_optimiser,
    make_step,
    normalise,
)

from mcjax import qat, tree
from mcjax.checkpoint import read_manifest
from mcjax.hosts import everywhere

Predict = Callable[[jax.Array], jax.Array]  # images [B, H, W, C] -> logits [B, classes]


def test_image(recipe: VisionRecipe, image: np.ndarray) -> np.ndarray:
    """An image as the network is tested on it, uint8 [H, W, C]."""
    return image if recipe.image_size is None else centre(image, recipe.image_size)


def judge(
    predictors: Sequence[Predict],
    recipe: VisionRecipe,
    source: Sequence[Any],
    classes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What networks say of all images of a source.

    Args:
      predictors: K jitted functions of normalised images.
      recipe: image and batch size.
      source: N examples.
      classes: those that a prediction may name, None for all.

    Returns:
      Predicted classes int [K, N], largest probabilities float [K, N] among all classes, and labels
      int [N].
    """
    size, predicted, confidence, labels = recipe.batch_size, [], [], []
    for start in range(0, len(source), size):
        examples = [source[i] for i in range(start, min(start + size, len(source)))]
        images = np.stack([test_image(recipe, image) for image, _ in examples])
        # One shape, so one compilation.
        padding = [(0, size - len(images)), *[(0, 0)] * 3]
        batch = normalise(jnp.asarray(np.pad(images, padding)))
        logits = np.stack([np.asarray(predict(batch)) for predict in predictors])
        logits = logits[:, : len(examples)]
        confidence.append(np.asarray(jax.nn.softmax(logits)).max(-1))
        if classes is not None:
            logits = logits[..., classes]
        best = logits.argmax(-1)
        predicted.append(best if classes is None else classes[best])
        labels += [label for _, label in examples]
    return np.concatenate(predicted, 1), np.concatenate(confidence, 1), np.asarray(labels)


def aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under precision and recall of finding what is outside by its low confidence.

    ``sum_n (R_n - R_{n-1}) P_n`` over descending thresholds, ties taken together (average
    precision, without interpolation); outliers are the positives, as for ImageNet-O (arXiv
    1907.07174). Chance gives their share.

    Args:
      inside: confidences of images of known classes, [N].
      outside: of outliers, [M].

    Returns:
      Within 0 to 1.
    """
    confidence = np.concatenate([inside, outside])
    positive = np.arange(len(confidence)) >= len(inside)
    order = np.argsort(confidence, kind="stable")
    confidence, found = confidence[order], np.cumsum(positive[order])
    last = np.append(confidence[1:] != confidence[:-1], True)  # of each group of ties
    found, taken = found[last], np.flatnonzero(last) + 1
    return float(np.sum(np.diff(found, prepend=0) * found / taken) / len(outside))


def robustness(
    predictors: dict[str, Predict], recipe: VisionRecipe, dataset: Dataset
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy on the recipe's shifted datasets and AUPR on its outliers, at every width.

    A shifted dataset's classes must have names that the dataset knows; the prediction is the best
    of those that occur in it, as in the released evaluation of ImageNet-A. Outliers in folders
    whose names are all classes that the dataset knows are set against the test images of these
    classes only (ImageNet-O's folders name the class that each resembles; to restrict to them is
    recalled from its paper), others against all of them.
    """
    results: dict[str, dict[str, dict[str, float]]] = {}
    index = {name: i for i, name in enumerate(dataset.names)}
    every = list(predictors.values())
    for kind, names in (("shifted", recipe.shifted), ("outliers", recipe.outliers)):
        for name in names:
            try:
                other = open_dataset(name)
            except ValueError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            known = np.array([index.get(n, -1) for n in other.names])
            if kind == "shifted":
                if (known < 0).any():
                    strange = other.names[int(np.argmin(known))]
                    raise ValueError(
                        f"{name} has a class {strange!r} that {dataset.identity} lacks"
                    )
                shown = np.unique([other.test[i][1] for i in range(len(other.test))])
                predicted, _, labels = judge(every, recipe, other.test, known[shown])
                values = (predicted == known[labels]).mean(1)
            else:
                _, outside, _ = judge(every, recipe, other.test)
                _, inside, labels = judge(every, recipe, dataset.test)
                if name.startswith("folder:") and (known >= 0).all():
                    inside = inside[:, np.isin(labels, known)]
                values = [aupr(a, b) for a, b in zip(inside, outside, strict=True)]
            named = dict(zip(predictors, map(float, values), strict=True))
            results.setdefault(kind, {})[name] = named
    return results


def export(out: Path, recipe: VisionRecipe, num_classes: int, state: State) -> None:
    """Writes `model/`, whole or not at all."""
    params = jax.device_get(state.params)
    if recipe.spec is not None:
        params = tree.freeze_tree(params, recipe.spec)
    made_of = {
        "model": recipe.model,
        "model_fields": dict(recipe.model_fields),
        "num_classes": num_classes,
        "dtype": recipe.dtype,
        "spec": None if recipe.spec is None else dataclasses.asdict(recipe.spec),
    }
    shutil.rmtree(out / "model", ignore_errors=True)
    variables = {"params": params, "batch_stats": jax.device_get(state.extra["batch_stats"])}
    tree.save(out / "model", variables, note=made_of)


def load(directory: Path, bits: int | None) -> tuple[Any, dict[str, Any]]:
    """An exported network at one width, reading only that width's planes and tables.

    Args:
      directory: `model/` of a run.
      bits: the width; None for a network that was trained without widths.

    Returns:
      The module and its variables: ``module.apply(variables, images)``.

    Raises:
      ValueError: if it is no such folder, is damaged, or has no such width.
    """
    made_of = read_manifest(Path(directory), tree.KIND)["note"]
    if not isinstance(made_of, dict) or made_of.get("model") not in VISION_MODELS:
        raise ValueError(f"{directory} holds no image classifier")
    spec = made_of["spec"]
    if spec is not None:
        spec = qat.QuantSpec(**{**spec, "widths": tuple(spec["widths"]), "frozen": True})
    if (spec is None) != (bits is None):
        has = "float weights" if spec is None else f"the widths {spec.widths}"
        raise ValueError(f"{directory} has {has}, not {bits}")
    if spec is not None:
        spec.check(bits)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in made_of["model_fields"].items()}
    make = VISION_MODELS[made_of["model"]]
    module = make(made_of["num_classes"], spec=spec, bits=bits, dtype=made_of["dtype"], **fields)
    return module, tree.load(directory, bits)


def train(
    recipe: VisionRecipe, out: Path, *, cache: Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """Trains, exports and tests; see the module's docstring for what `out` then holds.

    Args:
      recipe: what to train.
      out: folder to write.
      cache: see `data_sources.open_dataset`.
      resume: go on from the last checkpoint in `out`.

    Returns:
      "accuracy" of every width, as served from `model/`; with them, if the recipe names such
      datasets and they are there, "shifted" accuracies and "outliers" AUPR by dataset and width.

    Raises:
      ValueError: for a dataset, recipe or folder that cannot be used.
    """
    if out.exists() and not resume:
        raise ValueError(f"{out} exists; choose another --out, or go on with --resume")
    mesh = data_mesh()
    dataset = open_dataset(recipe.dataset, cache)
    steps, shape = _plan(recipe, dataset, mesh)
    num_classes = len(dataset.names)
    module = recipe.module(num_classes)
    optimiser, objective = make_optimiser(recipe, steps), make_objective(recipe)
    names = [str(k) for k in recipe.widths] or [FLOAT]
    sample = jnp.zeros((1, *shape))
    # Not jitted: fitting the tables then compiles once a shape rather than once a layer.
    variables = module.init(jax.random.key(recipe.seed), sample)
    params = variables["params"]
    extra = initial_extra(recipe, objective, variables)
    state = State(jnp.zeros((), jnp.int32), params, optimiser.init(params), extra)

    augment = Augment(size=recipe.image_size, pad=recipe.pad, mirror=recipe.flip and dataset.mirror)
    row = Ahead(Rows(dataset.train, augment, recipe.batch_size, recipe.seed).row)

    def batch(step):
        images = global_batch(mesh, (recipe.batch_size, *shape), lambda i: row(step, i)[0])
        labels = global_batch(mesh, (recipe.batch_size,), lambda i: np.int32(row(step, i)[1]))
        return images, labels

    apply = {
        name: jax.jit(module.clone(bits=bits).apply)
        for name, bits in zip(names, recipe.widths or (None,), strict=True)
    }

    def evaluate(state):
        variables = jax.device_get(
            {"params": state.params, "batch_stats": state.extra["batch_stats"]}
        )
        return {
            f"accuracy_{name}": value
            for name, value in accuracy(
                {name: partial(function, variables) for name, function in apply.items()},
                recipe,
                dataset,
            ).items()
        }

    try:
        state = fit(
            out,
            state,
            make_step(module, recipe, optimiser, objective),
            batch,
            mesh=mesh,
            steps=steps,
            identity=recipe.to_dict() | {"data": dataset.identity},
            resume=resume,
            save_every=recipe.save_every,
            log_every=recipe.log_every,
            evaluate=evaluate,
            evaluate_every=recipe.evaluate_every,
        )
    finally:
        row.close()
    state, first = everywhere(state), jax.process_index() == 0
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # the rest takes the first process longer than others may wait
    if not first:
        return {}
    export(out, recipe, num_classes, state)
    predictors = {}
    for name, bits in zip(names, recipe.widths or (None,), strict=True):
        served, variables = load(out / "model", bits)
        predictors[name] = partial(jax.jit(served.apply), variables)
    result: dict[str, Any] = {"accuracy": accuracy(predictors, recipe, dataset)}
    result |= robustness(predictors, recipe, dataset)
    plot(result["accuracy"], out / "accuracy.png")
    return result


def _plan(recipe: VisionRecipe, dataset: Dataset, mesh: Mesh) -> tuple[int, tuple[int, ...]]:
    """Steps, and the shape of a training image, of a recipe on a dataset."""
    if dataset.train is None:
        raise ValueError(f"{recipe.dataset} has no images to train on")
    part = recipe.batch_size // recipe.accumulation
    if part % mesh.size:
        raise ValueError(f"recipe: {part} images cannot be shared by {mesh.size} devices")
    if recipe.image_size is not None:
        channels = dataset.train[0][0].shape[-1]
        shape: tuple[int, ...] = (recipe.image_size, recipe.image_size, channels)
    elif dataset.shape is None:
        raise ValueError(f"{recipe.dataset} has images of many sizes; give image_size")
    else:
        shape = dataset.shape
    if recipe.steps is not None:
        return recipe.steps, shape
    return max(1, math.ceil(recipe.epochs * len(dataset.train) / recipe.batch_size)), shape


def accuracy(
    predictors: dict[str, Predict], recipe: VisionRecipe, dataset: Dataset
) -> dict[str, float]:
    """Share of the test images that each predictor names rightly."""
    predicted, _, labels = judge(list(predictors.values()), recipe, dataset.test)
    return dict(zip(predictors, (predicted == labels).mean(1).tolist(), strict=True))


def plot(accuracies: dict[str, float], file: Path) -> None:
    """Draws accuracy against bits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    narrow = sorted(accuracies, key=lambda name: (name == FLOAT, name))
    axis.plot(narrow, [100 * accuracies[name] for name in narrow], "o-")
    axis.set(xlabel="bits of a weight", ylabel="test accuracy (%)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads the command line and trains."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--dataset", metavar="digits|tfds:NAME|npz:FILE", help="instead of the config's"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    recipe, out = begin(arguments, VisionRecipe)
    if arguments.dataset is not None:
        recipe = dataclasses.replace(recipe, dataset=arguments.dataset)
    if arguments.steps is not None:
        recipe = dataclasses.replace(recipe, steps=arguments.steps, epochs=None)
    result = train(recipe, out, resume=arguments.resume)
    if jax.process_index():
        return
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result["accuracy"].items():
        print(f"{name:>5}{' bits' if name != FLOAT else ''}: accuracy {value:.2%}")


if __name__ == "__main__":
    program(main, "vision")
