"""Once-QAT against dedicated networks, plain slices and Any-Precision DNN on handwritten digits.

    export XLA_FLAGS="--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    uv run python benchmarks/once_digits.py --out benchmarks/results/once_digits_cpu.json

The flags halve the time to compile and slow nothing down here. What a stopped run left in the file
is not run again. Five-fold cross-validation over all
1,797 images of 8x8; every scheme sees the same folds and the same initial kernels, and step for
step the same batches. Test accuracy at 8, 4, 3, 2 and 1 bits of

    once                 one network trained at all widths, served from its frozen planes
    dedicated            a network for each width alone, the same code, as many optimiser steps
    dedicated x5         the same, five times the steps: once computes five widths a step
    slices               prefixes of the code of the dedicated 8-bit network, uniform tables
                         refitted by least squares, the 8-bit normalisation
    slices, renormed     the same, normalisation statistics measured anew on the training images
    any-precision        weights as in Any-Precision DNN (arXiv 1911.07346), and as there all widths
                         but the highest learn from the next higher one's soft targets alone;
                         everything else, 8-bit activations too, as in once
    any-precision, half  the same, soft targets and labels in equal parts
    any-precision, hard  the same, labels alone, as once
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mcjax import qat
from mcjax.models.layers import BatchNorm, Conv, activations
from mcjax.models.resnet import ResNet
from mcjax.qat import QuantSpec
from mcjax.tree import freeze_tree, slice_tree

WIDTHS = (8, 4, 3, 2, 1)
FOLDS = 5
CLASSES = 10
WARMUP = 20
WEIGHT_DECAY = 1e-4
CLIP = 1.0
SLICED = tuple(k for k in WIDTHS if k < WIDTHS[0])


def load_digits():
    """Images float32 [1797, 8, 8, 1] within -1 to 1, labels int32 [1797]."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = np.asarray(digits.images, np.float32) / 8 - 1
    return images[..., None], np.asarray(digits.target, np.int32)


def split(labels, seed):
    """For each fold the indices of its training and test images, classes in equal shares."""
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(len(labels)), labels))


def make_module(channels, spec, bits=None):
    """`resnet8` with as many channels in its first stage."""
    return ResNet(CLASSES, (1, 1, 1), channels, "cifar", spec=spec, bits=bits)


def dorefa(w, bits):
    """A kernel at a width as in Any-Precision DNN's released code, from arXiv 1606.06160.

    tanh(w), scaled to 0..1 by its largest magnitude in the layer, is rounded to 2^bits levels
    (straight through), mapped to -1..1 and multiplied by the mean magnitude of w: at one bit the
    sign of w times its mean magnitude.
    """
    top = 2**bits - 1
    squashed = jnp.tanh(w)
    share = squashed / (2 * jnp.max(jnp.abs(squashed))) + 0.5
    level = share + jax.lax.stop_gradient(jnp.round(share * top) / top - share)
    return (2 * level - 1) * jax.lax.stop_gradient(jnp.mean(jnp.abs(w)))


def kernels_by(quantise):
    """Lets convolutions with a spec multiply ``quantise(kernel, bits)``, activations as the spec's.

    Args:
      quantise: float [H, W, C, features] and the width to a kernel of the same shape.

    Returns:
      A context in which to apply a module.
    """

    def intercept(method, args, kwargs, context):
        conv = context.module
        if not isinstance(conv, Conv) or conv.spec is None:
            return method(*args, **kwargs)
        w = quantise(conv.get_variable("params", "kernel"), conv.bits)
        x = activations(conv, args[0], conv.spec, conv.bits, (1, 2, 3))
        return jax.lax.conv_general_dilated(
            x, w, (conv.strides,) * 2, conv.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return nn.intercept_methods(intercept)


def forward(module, variables, images, quantise=None, train=False):
    """Logits, and if training the new `batch_stats`; `quantise` as in `kernels_by`."""
    call = partial(
        module.apply, variables, images, train, mutable=["batch_stats"] if train else False
    )
    if quantise is None:
        return call()
    with kernels_by(quantise):
        return call()


def without_tables(params):
    """A parameter tree without its `quantizer` entries."""
    return {
        k: without_tables(v) if isinstance(v, dict) else v
        for k, v in params.items()
        if k != "quantizer"
    }


@partial(jax.jit, static_argnames=("spec", "quantise", "channels", "batch", "distill"))
def train(
    key, images, labels, chosen, count, steps, rate, *, spec, quantise, channels, batch, distill
):
    """Trains one network at all widths of its spec.

    Args:
      key: of initial weights and batches.
      images: float [N, 8, 8, 1].
      labels: int [N].
      chosen: indices of the training images, padded.
      count: how many of them count.
      steps: optimiser steps.
      rate: largest learning rate; it warms up, then falls by a cosine to a hundredth.
      spec: widths.
      quantise: see `kernels_by`; None for once-QAT.
      channels: of the first stage.
      batch: images a step, drawn with replacement.
      distill: see `qat.cascade_losses`.

    Returns:
      Variables and the last step's losses [K].
    """
    module = make_module(channels, spec)
    init_key, train_key = jax.random.split(key)
    variables = module.init(init_key, images[:1])
    params, stats = variables["params"], variables["batch_stats"]
    if quantise is not None:
        params = without_tables(params)
    objective = qat.fixed()

    def schedule(step):
        passed = jnp.clip((step - WARMUP) / (steps - WARMUP), 0, 1)
        falling = 0.01 + 0.99 * (1 + jnp.cos(jnp.pi * passed)) / 2
        return rate * jnp.where(step < WARMUP, (step + 1) / WARMUP, falling)

    decayed = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    optimiser = optax.chain(
        optax.clip_by_global_norm(CLIP * len(spec.widths)),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=decayed),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )

    def step(i, state):
        params, stats, moments, weighing, _ = state
        drawn = jax.random.randint(jax.random.fold_in(train_key, i), (batch,), 0, count)
        x, y = images[chosen[drawn]], labels[chosen[drawn]]

        def losses(params):
            def logits_at(bits, stats):
                variables = {"params": params, "batch_stats": stats}
                logits, new = forward(module.clone(bits=bits), variables, x, quantise, train=True)
                return logits, new["batch_stats"]

            loss = partial(optax.softmax_cross_entropy_with_integer_labels, labels=y)
            values, (_, new) = qat.cascade_losses(
                logits_at, loss, spec.widths, stats, distill=distill
            )
            return values, new

        gradient, values, stats, _, weighing = qat.combine(losses, params, objective, weighing)
        update, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, update), stats, moments, weighing, values

    num = len(spec.widths)
    start = (params, stats, optimiser.init(params), objective.init(num), jnp.zeros(num))
    params, stats, _, _, values = jax.lax.fori_loop(0, steps, step, start)
    return {"params": params, "batch_stats": stats}, values


@partial(jax.jit, static_argnames=("module", "quantise"))
def predict(variables, images, *, module, quantise=None):
    """Predicted classes int [N]."""
    return jnp.argmax(forward(module, variables, images, quantise), axis=-1)


@partial(jax.jit, static_argnames="spec")
def frozen(params, *, spec):
    """`freeze_tree`, compiled."""
    return freeze_tree(params, spec)


@partial(jax.jit, static_argnames=("spec", "bits"))
def sliced(params, *, spec, bits):
    """Parameters with kernels made of the first bits of the trained code.

    For each output channel ``offset + delta * prefix`` is fitted to the trained weight by least
    squares; delta and offset stay float, so nothing is lost to their storage.
    """
    tree = {}
    for name, node in params.items():
        if not isinstance(node, dict):
            tree[name] = node
        elif "quantizer" in node:
            w = node["kernel"].reshape(-1, node["kernel"].shape[-1])
            code = qat.codes(w, node["quantizer"], spec)[: w.shape[0]]
            prefix = qat.cascade(code, spec.widths[0], bits).astype(jnp.float32)
            centred = prefix - prefix.mean(0)
            spread = jnp.sum(centred**2, axis=0)
            delta = jnp.sum(centred * w, axis=0) / jnp.where(spread > 0, spread, 1)
            fitted = w.mean(0) + delta * centred
            tree[name] = {**node, "kernel": fitted.reshape(node["kernel"].shape)}
        else:
            tree[name] = sliced(node, spec=spec, bits=bits)
    return tree


@partial(jax.jit, static_argnames=("module", "quantise"))
def renormed(variables, images, *, module, quantise):
    """`batch_stats` with the statistics of these images in the module's row."""
    # A batch that meets statistics of zero leaves (1 - momentum) times its own.
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, new = forward(module, {**variables, "batch_stats": zeros}, images, quantise, train=True)
    return jax.tree.map(lambda x: x / (1 - BatchNorm.momentum), new["batch_stats"])


def as_is(w, bits):
    """The kernel itself, for `kernels_by`."""
    return w


class Fold:
    """One fold's data and how often its networks are right."""

    def __init__(self, images, labels, indices, index, arguments):
        """Pads the training indices to one shape for all folds.

        Args:
          images: all of them.
          labels: all of them.
          indices: of this fold's training and test images.
          index: of the fold; its seed, too.
          arguments: the command line's.
        """
        largest = len(labels) - len(labels) // FOLDS
        chosen, self.test = indices
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.count = len(chosen)
        self.chosen = jnp.asarray(np.resize(chosen, largest))
        self.key = jax.random.fold_in(jax.random.key(arguments.seed), index)
        self.arguments = arguments

    def train(self, widths, distill=0.0, quantise=None, times=1):
        """Variables of a network trained at `widths`."""
        a = self.arguments
        variables, losses = train(
            self.key,
            self.images,
            self.labels,
            self.chosen,
            self.count,
            times * a.steps,
            a.rate,
            spec=QuantSpec(widths=widths),
            quantise=quantise,
            channels=a.channels,
            batch=a.batch,
            distill=distill,
        )
        if not np.isfinite(np.asarray(losses)).all():
            raise FloatingPointError(f"training at {widths} diverged")
        return variables

    def right(self, variables, spec, bits, quantise=None):
        """Share of the test images named rightly at a width."""
        module = make_module(self.arguments.channels, spec, bits)
        # All images, so that one compilation serves all folds.
        named = np.asarray(predict(variables, self.images, module=module, quantise=quantise))
        return float(np.mean(named[self.test] == np.asarray(self.labels)[self.test]))

    def served(self, variables, widths):
        """Accuracy at every width from frozen planes."""
        spec = QuantSpec(widths=widths)
        planes = frozen(variables["params"], spec=spec)
        spec = QuantSpec(widths=widths, frozen=True)
        return {
            k: self.right({**variables, "params": slice_tree(planes, k)}, spec, k) for k in widths
        }

    def once(self):
        """One network at all widths."""
        return self.served(self.train(WIDTHS), WIDTHS)

    def dedicated(self, times=1):
        """A network for each width; then the slices of the 8-bit one, plain and renormed."""
        out, first = {}, None
        for k in WIDTHS:
            variables = self.train((k,), times=times)
            first = first or variables
            out |= self.served(variables, (k,))
        top = WIDTHS[0]
        spec = QuantSpec(widths=(top,))
        plain, anew = {top: out[top]}, {top: out[top]}
        module = make_module(self.arguments.channels, spec, top)
        for k in SLICED:
            cut = {**first, "params": sliced(first["params"], spec=spec, bits=k)}
            plain[k] = self.right(cut, spec, top, as_is)
            training = self.images[self.chosen]
            cut["batch_stats"] = renormed(cut, training, module=module, quantise=as_is)
            anew[k] = self.right(cut, spec, top, as_is)
        return out, plain, anew

    def any_precision(self, distill):
        """Any-Precision DNN's weights."""
        variables = self.train(WIDTHS, distill, dorefa)
        spec = QuantSpec(widths=WIDTHS)
        return {k: self.right(variables, spec, k, dorefa) for k in WIDTHS}


def mean_and_error(values):
    """Mean and standard error over folds, in points; the error of one fold is None."""
    values = 100 * np.asarray(values)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return [round(float(values.mean()), 3), None if error is None else round(float(error), 3)]


def summary(folds):
    """Means by scheme and width, and paired differences of once from every other scheme.

    Args:
      folds: for each fold scheme -> width -> accuracy; later folds may lack some schemes.
    """
    schemes = list(dict.fromkeys(name for fold in folds for name in fold))
    means, differences = {}, {}
    for name in schemes:
        mine = [fold for fold in folds if name in fold]
        means[name] = {k: mean_and_error([f[name][k] for f in mine]) for k in WIDTHS}
        if name != "once":
            differences[name] = {
                k: mean_and_error([f["once"][k] - f[name][k] for f in mine]) for k in WIDTHS
            }
    counts = {name: sum(name in fold for fold in folds) for name in schemes}
    return {"folds_run": counts, "mean": means, "once_minus": differences}


def table(facts):
    """The summary as Markdown."""

    def row(name, values, sign):
        cells = [f"{m:{sign}.2f}" + ("" if e is None else f" ± {e:.2f}") for m, e in values]
        return "| " + " | ".join([name, *cells]) + " |"

    head = "| | " + " | ".join(f"{k}" for k in WIDTHS) + " |\n|" + "---|" * (len(WIDTHS) + 1)
    lines = ["accuracy (%), mean ± standard error over folds, by bits", "", head]
    for name, values in facts["mean"].items():
        lines.append(row(f"{name} ({facts['folds_run'][name]} folds)", values.values(), ""))
    lines += ["", "once minus the other scheme (points), paired", "", head]
    lines += [row(name, values.values(), "+") for name, values in facts["once_minus"].items()]
    return "\n".join(lines)


def draw(facts, path):
    """Accuracy against bits; the right panel leaves out what plain slices lose."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, values) in enumerate(facts["mean"].items()):
        places = np.arange(len(WIDTHS))[::-1] + 0.05 * (i - 3)
        mean, error = zip(*values.values(), strict=True)
        for panel in panels:
            panel.errorbar(
                places,
                mean,
                [e or 0 for e in error],
                marker="o",
                markersize=4,
                linestyle="--" if name.startswith("slices") else "-",
                elinewidth=0.8,
                capsize=2,
                color=f"C{i}",
                label=f"{name} ({facts['folds_run'][name]} folds)",
            )
    for panel in panels:
        panel.set_xticks(np.arange(len(WIDTHS)), [f"{k}" for k in reversed(WIDTHS)])
        panel.set(xlabel="bits of a weight", ylabel="test accuracy (%)")
    close = [
        m for n, v in facts["mean"].items() if not n.startswith("slices") for m, _ in v.values()
    ]
    panels[1].set_ylim(min(close) - 0.7, max(close) + 0.7)
    panels[1].set_title("the same, close up")
    panels[0].legend(fontsize=8)
    figure.suptitle("Digits, five-fold cross-validation; bars are standard errors over folds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Prints the table; writes one JSON object after every fold and a plot beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many of the five to run")
    parser.add_argument("--channels", type=int, default=8, help="of the first stage")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.1, help="largest learning rate")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="start no dedicated x5 after them"
    )
    arguments = parser.parse_args()
    begin = time.perf_counter()
    images, labels = load_digits()
    indices = split(labels, arguments.seed)[: arguments.folds]
    folds = [Fold(images, labels, mine, i, arguments) for i, mine in enumerate(indices)]
    results = [{} for _ in folds]
    settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "seconds")}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if any(earlier.get(k) != v for k, v in settings.items()):
            raise SystemExit(f"{arguments.out} holds a run with other settings; move it away")
        for mine, before in zip(results, earlier["per_fold"], strict=True):
            mine |= {name: {int(k): v for k, v in of.items()} for name, of in before.items()}

    def note(index, names, accuracies, since):
        seconds = time.perf_counter() - since
        for name, accuracy in zip(names, accuracies, strict=True):
            results[index][name] = accuracy
            shown = " ".join(f"{100 * accuracy[k]:.2f}" for k in WIDTHS)
            print(f"fold {index} {name}: {shown} ({seconds:.1f} s)", flush=True)
        out = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            **settings,
            "warmup": WARMUP,
            "weight_decay": WEIGHT_DECAY,
            "clip": CLIP,
            "per_fold": results,
            **summary([fold for fold in results if "once" in fold]),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(out, indent=1) + "\n")
        return out

    plan = {
        ("once",): lambda fold: [fold.once()],
        ("dedicated", "slices", "slices, renormed"): lambda fold: fold.dedicated(),
        ("any-precision",): lambda fold: [fold.any_precision(1.0)],
        ("any-precision, half",): lambda fold: [fold.any_precision(0.5)],
        ("any-precision, hard",): lambda fold: [fold.any_precision(0.0)],
    }
    extra = {
        ("dedicated x5",): lambda fold: fold.dedicated(len(WIDTHS))[:1],
    }
    out = None
    for some, limit in ((plan, float("inf")), (extra, arguments.seconds)):
        for i, fold in enumerate(folds):
            for names, work in some.items():
                since = time.perf_counter()
                if names[0] not in results[i] and since - begin < limit:
                    out = note(i, names, work(fold), since)
    if out is None:
        raise SystemExit(f"{arguments.out} has everything already")
    draw(out, arguments.out.with_suffix(".png"))
    print(table(out))


if __name__ == "__main__":
    main()
