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
import optax
from data_sources import Ahead, Augment, Dataset, Rows, centre, open_dataset
from jax.sharding import Mesh
from loop import State, begin, command_line, data_mesh, fit, global_batch, program
from recipe import VISION_MODELS, VisionRecipe

from mcjax import lumix, qat, tree
from mcjax.checkpoint import read_manifest

FLOAT = "float"  # what a network without widths is called beside "8", "4" and so on

Predict = Callable[[jax.Array], jax.Array]  # images [B, H, W, C] -> logits [B, classes]


def normalise(images: jax.Array) -> jax.Array:
    """Pixels uint8 to float32 of -1 to 1."""
    return images.astype(jnp.float32) / 127.5 - 1


def losses(
    module: Any,
    recipe: VisionRecipe,
    params: Any,
    stats: Any,
    images: jax.Array,
    labels: Any,
    key: jax.Array,
    widths: Sequence[int | None] | None = None,
    teacher: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Every width's loss on one batch.

    Args:
      module: the network.
      recipe: its widths, distillation and mixing.
      params: of the network.
      stats: its `batch_stats`.
      images: float [B, H, W, C].
      labels: int [B]; or `mcjax.lumix.MixedLabels` if the recipe mixes.
      key: of LUMix's draws, which all widths share.
      widths: some of the recipe's, descending; by default all.
      teacher: see `qat.cascade_losses`.

    Returns:
      Losses [K], then logits [B, classes] of the last width and the new `batch_stats`; K is 1 for a
      plain float network.
    """
    if recipe.mixing == "none":
        loss = partial(optax.softmax_cross_entropy_with_integer_labels, labels=labels)
    else:
        mixed = lumix.lumix(r_s=recipe.r_s, r_r=recipe.r_r)
        loss = lambda logits: mixed(key, logits, labels)  # noqa: E731

    def logits_at(bits, stats):
        variables = {"params": params, "batch_stats": stats}
        logits, new = module.clone(bits=bits).apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return logits, new.get("batch_stats", {})

    return qat.cascade_losses(
        logits_at,
        loss,
        widths or recipe.widths or (None,),
        stats,
        distill=recipe.distill,
        teacher=teacher,
    )


def sampled_gradient(
    losses_at: Callable[..., tuple[jax.Array, tuple[jax.Array, Any]]],
    params: Any,
    stats: Any,
    widths: Sequence[int],
    index: jax.Array,
    weights: jax.Array,
    logits: jax.Array,
) -> tuple[Any, jax.Array, Any]:
    """The losses of some widths, which may be traced, and the gradient of their weighted sum.

    Each width is differentiated within its own branch: to differentiate the choice of a branch
    would keep, for each width that is chosen, what the backward pass needs of all that are not.

    Args:
      losses_at: (params, stats, widths, teacher) -> what `losses` returns.
      params: of the network.
      stats: its `batch_stats`.
      widths: all K, descending.
      index: int [S], ascending indices into `widths`, from `qat.sample_widths`.
      weights: float [K].
      logits: any array like the network's logits.

    Returns:
      The gradient, losses [S] and the new `batch_stats`, of which the rows of other widths stay.
    """

    def branch(i):
        def run(stats, teacher):
            def own(params):
                # The first of those chosen has no teacher; of several it is the widest there is.
                given = teacher if i and len(index) > 1 else None
                values, rest = losses_at(params, stats, widths[i : i + 1], given)
                return values[0], rest

            return jax.value_and_grad(own, has_aux=True)(params)

        return run

    branches = [branch(i) for i in range(len(widths))]

    def one(carry, chosen):
        stats, teacher, total = carry
        (value, (logits, stats)), own = jax.lax.switch(chosen, branches, stats, teacher)
        total = jax.tree.map(lambda t, g: t + weights[chosen].astype(g.dtype) * g, total, own)
        return (stats, logits, total), value

    start = (stats, jnp.zeros_like(logits), jax.tree.map(jnp.zeros_like, params))
    (stats, _, gradient), values = jax.lax.scan(one, start, index)
    return gradient, values, stats


def make_objective(recipe: VisionRecipe) -> qat.Objective:
    """How the recipe combines losses."""
    if recipe.objective == "fixed":
        return qat.fixed(recipe.weights or None)
    return {"uncertainty": qat.uncertainty, "mgda": qat.mgda}[recipe.objective]()


def make_optimiser(recipe: VisionRecipe, steps: int) -> optax.GradientTransformation:
    """The recipe's optimiser; only kernels decay, not tables, norms, positions or biases."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if recipe.warmup else recipe.learning_rate,
        recipe.learning_rate,
        recipe.warmup,
        max(steps, recipe.warmup + 1),
        recipe.learning_rate / 100,
    )

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", None) == "kernel", params
        )

    if recipe.optimiser == "adamw":
        own = optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=kernels)
    else:
        own = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay, mask=kernels),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
    trained = recipe.sampled or max(1, len(recipe.widths))
    return optax.chain(optax.clip_by_global_norm(recipe.clip * trained), own)


def initial_extra(recipe: VisionRecipe, objective: qat.Objective, variables: Any) -> dict[str, Any]:
    """What `State.extra` holds before the first step.

    "batch_stats"; the objective's state; if widths are sampled, "losses" float32 [K] with the
    newest one of each, NaN before its first.
    """
    num = max(1, len(recipe.widths))
    extra = {
        "batch_stats": variables.get("batch_stats", {}),
        "objective": objective.init(num),
    }
    if recipe.sampled is not None:
        extra["losses"] = jnp.full(num, jnp.nan)
    return extra


def make_step(module: Any, recipe: VisionRecipe, optimiser, objective: qat.Objective):
    """The jitted training step on images uint8 [B, H, W, C] and labels int [B]."""
    names = [str(k) for k in recipe.widths] or [FLOAT]

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch) -> tuple[State, dict[str, jax.Array]]:
        # Neighbours go to different parts, so that each part is still shared among devices.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, recipe.accumulation, *x.shape[1:]), 1, 0), batch
        )
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(recipe.seed), state.step), recipe.accumulation + 1
        )
        index = None
        if recipe.sampled is not None:
            index = qat.sample_widths(keys[-1], len(names), recipe.sampled)

        def part(carry, inputs):
            extra, total = carry
            key, (images, labels) = inputs
            images = normalise(images)
            if recipe.mixing != "none":
                mix_key, key = jax.random.split(key)
                images, labels = lumix.mix(
                    mix_key, images, labels, alpha=recipe.alpha, mode=recipe.mixing
                )

            def losses_at(params, stats, widths=None, teacher=None):
                return losses(module, recipe, params, stats, images, labels, key, widths, teacher)

            if index is None:
                gradient, values, (_, stats), weights, weighing = qat.combine(
                    lambda params: losses_at(params, extra["batch_stats"]),
                    state.params,
                    objective,
                    extra["objective"],
                )
            else:
                weights, weighing = objective.weigh(extra["objective"], None, None)
                gradient, values, stats = sampled_gradient(
                    losses_at,
                    state.params,
                    extra["batch_stats"],
                    recipe.widths,
                    index,
                    weights,
                    jnp.zeros((len(images), module.num_classes)),
                )
            extra = {**extra, "batch_stats": stats, "objective": weighing}
            return (extra, jax.tree.map(jnp.add, total, gradient)), (values, weights)

        start = state.extra, jax.tree.map(jnp.zeros_like, state.params)
        if recipe.accumulation > 1:
            (extra, gradient), every = jax.lax.scan(part, start, (keys[:-1], parts))
            values, weights = jax.tree.map(lambda x: x.mean(0), every)
        else:  # not a loop: within one, convolutions on CPU take eight times as long
            first = jax.tree.map(lambda x: x[0], parts)
            (extra, gradient), (values, weights) = part(start, (keys[0], first))
        gradient = jax.tree.map(lambda g: g / recipe.accumulation, gradient)
        update, opt = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, update)
        metrics = {"loss": values.mean(), "gradient_norm": optax.tree.norm(gradient)}
        if index is not None:
            values = extra["losses"].at[index].set(values)
            extra = {**extra, "losses": values}
        metrics |= {f"loss_{name}": values[i] for i, name in enumerate(names)}
        if recipe.objective != "fixed":
            metrics |= {f"weight_{name}": weights[i] for i, name in enumerate(names)}
        return State(state.step + 1, params, opt, extra), metrics

    return step


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
    if jax.process_index():
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
