"""One step of training an image classifier at all widths, or at some drawn anew each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from loop import State
from recipe import VisionRecipe

from mcjax import lumix, qat

FLOAT = "float"  # what a network without widths is called beside "8", "4" and so on


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
