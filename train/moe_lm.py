"""Trains a language model with routed experts, of any family, and writes it in Hugging Face form.

    uv run python train/moe_lm.py --config train/configs/moe_minutes.py --out minutes

Read the configs: each says what it trains, how long that takes and what comes out. The folder then
holds `model/` (config.json, model.safetensors, tokenizer.json: what `mcjax compress` reads),
`held_out.txt`, `metrics.csv`, `loss.png` and `checkpoints/`. Stopped by a signal or a crash, the
same command with --resume goes on and ends with the very same parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from data_sources import no_litter
from loop import (
    State,
    adamw,
    begin,
    command_line,
    data_mesh,
    device_mesh,
    fit,
    global_batch,
    meet,
    mesh_sizes,
    program,
    state_shardings,
)
from recipe import LanguageRecipe

from mcjax import checkpoint, sharding
from mcjax.atomic import whole
from mcjax.hosts import everywhere
from mcjax.hub import Folder, write
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.language_model import LanguageModel
from mcjax.text import beginning, encode_file, open_tokenizer, perplexity, spread, windows

MESH = (
    "how devices share the work, such as data=4,expert=2,model=1; by default along data. "
    "Parameters and the optimiser's state are cut along data and expert, experts are whole"
)
"""What --mesh says for itself."""


def losses(module: LanguageModel, params: Any, tokens: jax.Array):
    """Cross-entropy and the router's two losses.

    ``balance = E sum_e f_e P_e`` with f_e the share of routed tokens that expert e got and P_e its
    mean probability (its share of the scores, where they are sigmoids), 1 when even;
    ``z = mean(logsumexp(logits)^2)``; both are means over layers.

    Args:
      module: the model.
      params: its parameters.
      tokens: int [B, T + 1].

    Returns:
      Cross-entropy, balance, z, and the least share of tokens that any expert of any layer got,
      times E; scalars.
    """
    blocks = [layer.block for layer in module.decoder.layers if isinstance(layer.block, Routed)]
    experts, score = blocks[0].experts, blocks[0].routing.score
    wanted = ["router", "experts"]
    logits, seen = module.apply({"params": params}, tokens[:, :-1], mutable=wanted)
    logits = logits.astype(jnp.float32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    # Stacked over the layers of every segment: [L, N, E] and [L, N, K].
    router, index = (jnp.concatenate(jax.tree.leaves(seen[name])) for name in wanted)
    share = jax.nn.one_hot(index, experts).mean((1, 2))
    if score == "softmax":
        probability = jax.nn.softmax(router)
    else:
        probability = jax.nn.sigmoid(router)
        probability = probability / jnp.sum(probability, axis=-1, keepdims=True)
    balance = experts * jnp.sum(share * probability.mean(1), axis=-1).mean()
    z = jnp.mean(jax.nn.logsumexp(router, axis=-1) ** 2)
    return entropy, balance, z, jnp.min(share) * experts


def begun(recipe: LanguageRecipe, module: LanguageModel, optimiser) -> tuple[State, Any]:
    """The first state, made on the devices that hold it, and its shardings; None without a mesh."""

    def state(key):
        params = weights.init(recipe.decoder, key)
        return State(jnp.zeros((), jnp.int32), params, optimiser.init(params))

    key, shared = jax.random.key(recipe.seed), module.shared
    if shared is None:
        return jax.jit(state)(key), None
    like = jax.eval_shape(state, key)
    own = sharding.shardings(recipe.decoder, like.params, shared)
    where = state_shardings(optimiser, like, own, shared.mesh)
    return jax.jit(state, out_shardings=where)(key), where


def make_step(module: LanguageModel, recipe: LanguageRecipe, optimiser):
    """The jitted training step."""

    def objective(params, tokens):
        entropy, balance, z, least = losses(module, params, tokens)
        total = entropy + recipe.balance * balance + recipe.router_z * z
        return total, {"loss": entropy, "balance": balance, "z": z, "least_used": least}

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, tokens: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        derive = jax.grad(objective, has_aux=True)
        if recipe.accumulation == 1:
            gradient, metrics = derive(state.params, tokens)
        else:

            def add(total, part):
                return jax.tree.map(jnp.add, total, derive(state.params, part)), None

            # Rows by turns, so that each part lies on all devices as the batch does.
            parts = jnp.swapaxes(tokens.reshape(-1, recipe.accumulation, tokens.shape[1]), 0, 1)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(derive, state.params, parts[0]),
            )
            total, _ = jax.lax.scan(add, zeros, parts)
            gradient, metrics = jax.tree.map(lambda a: a / recipe.accumulation, total)
        update, opt = optimiser.update(gradient, state.optimiser, state.params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        params = optax.apply_updates(state.params, update)
        return State(state.step + 1, params, opt), metrics

    return step


class FileCorpus:
    """Tokens of whole texts in memory; a row of a batch is a window at a random place.

    It begins with the token that texts begin with, if there is one.
    """

    def __init__(self, tokens: np.ndarray, length: int, begin: int | None = None):
        self.tokens, self.length = tokens, length
        self.first = [] if begin is None else [begin]

    def row(self, seed: int, step: int, i: int) -> np.ndarray:
        """Int32 [length], a pure function of its arguments."""
        own = self.length - len(self.first)
        start = np.random.default_rng((seed, step, i)).integers(len(self.tokens) - own + 1)
        return np.append(self.first, self.tokens[start : start + own]).astype(np.int32)


class TfdsCorpus:
    """Documents of a TFDS data source; a row starts in a random one and runs on into the next."""

    def __init__(self, source: Any, tokenizer: Any, length: int):
        self.source, self.tokenizer, self.length = source, tokenizer, length

    def row(self, seed: int, step: int, i: int) -> np.ndarray:
        """Int32 [length], a pure function of its arguments."""
        rng = np.random.default_rng((seed, step, i))
        document, row = int(rng.integers(len(self.source))), np.empty(0, np.int32)
        while len(row) < self.length:
            ids = self.tokenizer.encode(self.text(document), add_special_tokens=False).ids
            if not len(row) and len(ids) > self.length:
                ids = ids[int(rng.integers(len(ids) - self.length + 1)) :]
            row = np.concatenate([row, np.asarray(ids, np.int32)])
            document = (document + 1) % len(self.source)
        return row[: self.length]

    def text(self, document: int) -> str:
        """One document."""
        text = self.source[document]["text"]
        return (text if isinstance(text, str) else text.decode("utf-8", "replace")) + "\n"


def read_text(paths: list[Path], held_out: float) -> tuple[str, str]:
    """Training and held-out text: files joined, the end held out from a white space on.

    Raises:
      ValueError: if a file cannot be read or nothing is left to train on.
    """
    parts = []
    for path in paths:
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the text {path}: {error}") from None
    text = "\n".join(parts).strip()
    end = int(len(text) * (1 - held_out))
    space = re.compile(r"\s").search(text, end)
    cut = space.start() if space else 0
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(
            f"the training text is too short: {len(text)} characters, of which the last "
            f"{held_out:.0%} are held out"
        )
    return text[:cut], text[cut + 1 :]


def train_tokenizer(texts, vocab_size: int, path: Path) -> None:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens at most, written whole."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    with whole(path) as aside:
        tokenizer.save(str(aside))


def prepare(recipe: LanguageRecipe, text: list[str], tokenizer: Path | None, work: Path):
    """Corpus, validation windows, and the identity of the text, from files or TFDS.

    Writes `tokenizer.json` and `held_out.txt` to `work`.
    """
    length = recipe.seq_len + 1
    if text and text[0].startswith("tfds:"):
        return _prepare_tfds(recipe, text[0].removeprefix("tfds:"), tokenizer, work)
    training, held_out = read_text([Path(path) for path in text], recipe.held_out)
    _tokenizer(tokenizer, [training], recipe, work)
    for name, part in (("training", training), ("held_out", held_out)):
        (work / f"{name}.txt").write_text(part, encoding="utf-8")
    tokens, validation = (
        encode_file(work / "tokenizer.json", work / f"{name}.txt", recipe.decoder.vocab_size)
        for name in ("training", "held_out")
    )
    (work / "training.txt").unlink()
    if len(tokens) < length:
        raise ValueError(
            f"the training text has {len(tokens)} tokens, fewer than one sequence of {length}; "
            "give more text or a smaller seq_len"
        )
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    begin = beginning(work / "tokenizer.json", recipe.decoder.vocab_size, "auto")
    tested = windows(validation, recipe.seq_len, "held-out text", begin)
    return FileCorpus(tokens, length, begin), tested, digest


def _prepare_tfds(recipe, name, tokenizer, work):
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError("tfds: needs the extra: pip install 'mcjax[train]'") from None
    try:
        with no_litter():
            source = tfds.data_source(name, split="train")
    except Exception as error:  # TFDS raises many kinds
        raise ValueError(f"cannot open tfds:{name}: {str(error).splitlines()[0]}") from None
    if len(source) < 2 or "text" not in source[0]:
        raise ValueError(f"tfds:{name} must have at least 2 documents with a feature 'text'")
    count = min(max(1, int(len(source) * recipe.held_out)), 1000)
    documents = TfdsCorpus(source, None, 0)
    held_out = [documents.text(len(source) - 1 - i) for i in range(count)]
    some = range(0, len(source) - count, max(1, (len(source) - count) // 20_000))
    _tokenizer(tokenizer, (documents.text(i) for i in some), recipe, work)
    (work / "held_out.txt").write_text("".join(held_out), encoding="utf-8")
    encoder = open_tokenizer(work / "tokenizer.json")
    validation = encode_file(
        work / "tokenizer.json", work / "held_out.txt", recipe.decoder.vocab_size
    )
    training = _First(source, len(source) - count)
    corpus = TfdsCorpus(training, encoder, recipe.seq_len + 1)
    meaning = hashlib.sha256((work / "tokenizer.json").read_bytes()).hexdigest()
    digest = f"{name}/{len(source)}/{meaning}"
    return corpus, windows(validation, recipe.seq_len, "held-out text"), digest


class _First:
    """The first `count` elements of a source."""

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.source[i]


def _tokenizer(given: Path | None, texts, recipe: LanguageRecipe, work: Path) -> None:
    own = work / "tokenizer.json"
    if given is not None:
        shutil.copyfile(given, own)
    elif not own.exists():
        train_tokenizer(texts, recipe.decoder.vocab_size, own)


def train(
    recipe: LanguageRecipe,
    out: Path,
    *,
    text: list[str],
    tokenizer: Path | None = None,
    resume: bool = False,
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Trains and exports; see the module's docstring for what `out` then holds.

    Args:
      recipe: what to train.
      out: folder to write.
      text: files, or one TFDS name.
      tokenizer: to use; None makes one.
      resume: go on from the last checkpoint in `out`.
      mesh: how long its axes `data`, `expert` and `model` are; None has all devices along `data`.

    Returns:
      The last row of metrics.

    Raises:
      ValueError: for text, recipe or folder that cannot be used.
    """
    devices = data_mesh() if mesh is None else device_mesh(mesh)
    shared = sharding.resolve(devices, fully=True) if devices.size > 1 else None
    check_shared(recipe.decoder, shared, recipe.batch_size, recipe.accumulation)
    if out.exists() and not resume:
        raise ValueError(f"{out} exists; choose another --out, or go on with --resume")
    number = f".{jax.process_index()}" if jax.process_count() > 1 else ""
    work = out.with_name(f"{out.name}.text{number}")
    shutil.rmtree(work, ignore_errors=True)  # what a run that was killed has left
    work.mkdir(parents=True)
    try:
        corpus, validation, digest = prepare(recipe, text, tokenizer, work)
        module = LanguageModel(
            recipe.decoder, dtype=jnp.dtype(recipe.dtype), shared=shared, remat=recipe.remat
        )
        optimiser = adamw(
            learning_rate=recipe.learning_rate,
            warmup=recipe.warmup,
            steps=recipe.steps,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            decays=weights.labels(recipe.decoder, lambda role: len(role.shape) > 1),
        )
        state, where = begun(recipe, module, optimiser)
        axes = ("data",) if shared is None else shared.batch
        shape = (recipe.batch_size, recipe.seq_len + 1)
        last: dict[str, Any] = {}

        def evaluate(state):
            some = spread(validation, 64)
            last["perplexity"] = perplexity(module, state.params, some)[0]
            return dict(last)

        state = fit(
            out,
            state,
            make_step(module, recipe, optimiser),
            lambda i: global_batch(devices, shape, partial(corpus.row, recipe.seed, i), axes),
            mesh=devices,
            steps=recipe.steps,
            identity=recipe.to_dict() | {"text": digest},
            shardings=where,
            resume=resume,
            save_every=recipe.save_every,
            log_every=recipe.log_every,
            evaluate=evaluate,
            evaluate_every=recipe.evaluate_every,
        )
        params = everywhere(state.params)
        if jax.process_index() == 0:
            export(out, work, recipe.model, params)
        meet("written")  # a process that ended would not wait long for the first one
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return last


def check_shared(
    decoder: Decoder, shared: sharding.Sharding | None, batch_size: int, accumulation: int = 1
) -> None:
    """Raises ValueError if a mesh cannot share a batch or experts evenly."""
    if shared is None:
        return
    rows, experts = shared.size(*shared.batch), shared.size(shared.expert)
    if batch_size % (rows * accumulation):
        parts = f", in {accumulation} parts" if accumulation > 1 else ""
        raise ValueError(f"a batch of {batch_size} cannot be shared by {rows} devices{parts}")
    for layer in decoder.layers:
        if isinstance(layer.block, Routed) and layer.block.experts % experts:
            raise ValueError(f"{layer.block.experts} experts cannot be shared by {experts} devices")


def manifest_of(artifact: Path, model: Folder) -> dict[str, Any]:
    """The manifest of an artifact, which must have been made of a model.

    Raises:
      ValueError: if it was made of another one, or is none.
    """
    manifest = checkpoint.read_manifest(artifact)
    if manifest["source_sha256"] != model.source_hash():
        raise ValueError(f"{artifact} was made of another model than {model.path}")
    return manifest


def export(out: Path, work: Path, config: Mapping[str, Any], params: Any) -> None:
    """Writes `model/`, `held_out.txt` and `loss.png`."""
    shutil.copyfile(work / "held_out.txt", out / "held_out.txt")
    with whole(out / "model") as aside:
        aside.mkdir()
        write(aside, config, params)
        shutil.copyfile(work / "tokenizer.json", aside / "tokenizer.json")
        shutil.rmtree(out / "model", ignore_errors=True)
    plot(out / "metrics.csv", out / "loss.png")


def plot(metrics: Path, file: Path) -> None:
    """Draws the loss, and the validation's, against the steps."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with metrics.open(newline="") as source:
        rows = list(csv.DictReader(source))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.plot([int(r["step"]) for r in rows], [float(r["loss"]) for r in rows], label="training")
    tested = [(int(r["step"]), np.log(float(r["perplexity"]))) for r in rows if r.get("perplexity")]
    if tested:
        axis.plot(*zip(*tested, strict=True), "o-", label="held out")
    axis.set(xlabel="step", ylabel="cross-entropy (nats a token)")
    axis.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Reads the command line and trains."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE|tfds:NAME",
        help="train on this instead of the config's text; repeat for more files",
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use")
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help=MESH,
    )
    arguments = parser.parse_args()
    recipe, out = begin(arguments, LanguageRecipe)
    if arguments.steps is not None:
        recipe = dataclasses.replace(recipe, steps=arguments.steps)
    beside = arguments.config.parent
    text = arguments.text or [t if ":" in t else str(beside / t) for t in recipe.text]
    if not text:
        raise ValueError(f"{arguments.config} names no text; give --text FILE or tfds:NAME")
    mesh = None if arguments.mesh is None else mesh_sizes(arguments.mesh)
    last = train(
        recipe,
        out,
        text=text,
        tokenizer=arguments.tokenizer,
        resume=arguments.resume,
        mesh=mesh,
    )
    print(f"{out}/model: held-out perplexity {last.get('perplexity', float('nan')):.2f}")


if __name__ == "__main__":
    program(main, "moe_lm")
