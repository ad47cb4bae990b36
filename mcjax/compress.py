"""From a Hugging Face folder to an artifact: calibrate, quantise and save, a layer at a time."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax import allocate, checkpoint, importance, passes, sensitivity
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, resolve_group_size
from mcjax.calibrate import Seen, observe
from mcjax.forecast import within
from mcjax.hub import Folder, read_json
from mcjax.job import Job, prepare
from mcjax.leaves import added
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.families import describe
from mcjax.process_memory import sparing
from mcjax.quantize_layer import Options, quantize_layer
from mcjax.tune_artifact import dense_at, first_tables, outputs, read_layer, tune_artifact
from mcjax.work import Work, keeping, write_json

TRAVELS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that an artifact takes over from the folder it is made of."""

RARE_SHARE = 0.1
"""An expert is rare if it gets less than this share of the tokens that an even split would give."""

GRAMS = "grams.npz"
"""Where sums over a layer's inputs are kept."""

AT_ONCE = ("batch_tokens", "most_kept", "chunk", "gram_bytes")

WHEN = ("compressed", "tuned")
"""When it is measured what parts cost."""


def compress(
    model: str | Path,
    out: str | Path,
    calibration: str | Path,
    *,
    memory: int | None = None,
    resume: bool = False,
    experts: Sequence[Mapping[str, BitPlanes]] | None = None,
    progress: Callable[..., Any] = lambda items, **_: items,
    **options: Any,
) -> dict[str, Any]:
    """Compresses a language model into one artifact that serves every width up to `max_bits`.

    The model runs over the calibration windows and back, for the importance of each token, see
    `mcjax.importance`. Then the layers run once more with their own weights; each is quantised on
    the inputs it sees there and saved before the next is read, so memory holds one layer. What
    tokens are between layers lies in files beside `out` meanwhile. The best effort then trains
    tables, for which it holds all planes, see `mcjax.tune_artifact`. What all this takes
    `mcjax.forecast` says. What is written is beside `out` until it is whole.

    Args:
      model: a Hugging Face folder, or a name on the hub, see `mcjax.hub.local`.
      out: the artifact to write; must not exist.
      calibration: a text, see `mcjax.documents.read_documents`.
      memory: bytes that this process may take; less is worked on at once to keep to them, and
        programs are forgotten between stages, see `mcjax.forecast`. None for the usual.
      resume: go on from where an interrupted run with the same inputs was, and keep what is done
        if this one is interrupted.
      experts: planes of each layer's `gate`, `up` and `down` that were made otherwise, by once-QAT
        for instance, rotated and with a table for each width up to `max_bits`; None quantises the
        model's.
      progress: wraps the iterations over layers, and that over steps of tuning, called with (items,
        description=...).
      **options: `max_bits`, `effort` and others, see `mcjax.job.prepare`.

    Returns:
      The artifact's manifest.

    Raises:
      ValueError: for input that cannot be compressed; nothing is left at `out`.
      OSError: if the artifact cannot be written.
    """
    out = Path(out).absolute()
    work = Work.of(out)
    if out.exists() and not (resume and work.identity.exists()):
        raise ValueError(f"{out} exists; remove it or choose another place")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder")
    job = prepare(model, calibration, **options)
    if experts is not None:
        _check_experts(experts, job.folder.decoder, job.how)
        leaves = jax.tree.leaves(list(experts))
        sums = [checkpoint.crc32(np.asarray(leaf)) for leaf in leaves]
        job = job._replace(identity={**job.identity, "experts_crc32": sums})
    if out.exists():
        if not work.is_of(job.identity):
            raise ValueError(f"{out} exists; remove it or choose another place")
        work.clear()  # all that an earlier run had left to do
        return checkpoint.read_manifest(out)
    try:
        work.prepare(job.identity, resume)
        if memory is not None:
            progress = sparing(progress)
            job = _at_once(job, work, memory)
        manifest, sample, target = _run(job, work, experts, progress)
        _copy_beside(job.folder.path, work.out)
        if job.plan:
            manifest = _tune(job, work, manifest, sample, target, progress)
        checkpoint.write_manifest(work.out, manifest)
        os.replace(work.out, out)
    except BaseException as error:
        if not resume:
            work.clear()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(f"no space left to write {out}") from error
        raise
    work.clear()
    return manifest


def _at_once(job: Job, work: Work, memory: int) -> Job:
    """The job within so much memory: the one that an interrupted run of as much began, if any."""
    begun = read_json(work.at_once) if work.at_once.exists() else {}
    if begun.get("memory") != memory:
        found = within(job, memory)
        kept = found.batch_tokens, found.most_kept, found.how.chunk, found.how.gram_bytes
        begun = {"memory": memory, **dict(zip(AT_ONCE, kept, strict=True))}
        write_json(work.at_once, begun)
    batch_tokens, most_kept, chunk, gram_bytes = (begun[name] for name in AT_ONCE)
    how = job.how._replace(chunk=chunk, gram_bytes=gram_bytes)
    return job._replace(batch_tokens=batch_tokens, most_kept=most_kept, how=how)


def _copy_beside(source: Path, out: Path) -> None:
    """Copies what belongs to a model beside its weights."""
    for pattern in TRAVELS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, out / file.name)


def coverage(manifest: dict[str, Any]) -> list[tuple[int, int, int]]:
    """The experts that calibration hardly reached: (layer, expert, tokens routed to it)."""
    frequency = np.array(manifest["statistics"]["frequency"])
    even = frequency.sum(axis=1, keepdims=True) / frequency.shape[1]
    where = np.argwhere(frequency < RARE_SHARE * even)
    layers = weights.budgeted_layers(describe(manifest["config"])[1])
    return [(layers[i], int(e), int(frequency[i, e])) for i, e in where]


def _check_experts(experts, decoder: Decoder, how: Options) -> None:
    layers = weights.budgeted_layers(decoder)
    if len(experts) != len(layers):
        raise ValueError(f"experts of {len(experts)} layers for {len(layers)}")
    for i, given in zip(layers, experts, strict=True):
        for role in weights.budgeted(decoder, decoder.layers[i]):
            name, planes = role.path[-1], given[role.path[-1]]
            group = resolve_group_size(role.shape[-2], how.group_size)
            expected = role.shape, tuple(range(1, how.max_bits + 1)), group, True
            got = planes.shape, planes.widths, planes.group_size, planes.rotated
            if got != expected:
                raise ValueError(
                    f"experts' {name} has shape {got[0]}, widths {got[1]}, groups of {got[2]} and "
                    f"rotated={got[3]}, want {expected[0]}, {expected[1]}, {group} and True"
                )


def _run(job: Job, work: Work, given, progress):
    """Works through the layers, from the first that is not saved.

    Returns:
      The manifest, some of the windows, see `mcjax.sensitivity`, and what the dense model's last
      layer gives for those to tune on, float32 [N, T, D].
    """
    folder, windows = job.folder, job.windows
    decoder, outside = folder.decoder, folder.read_rest()
    narrow = _narrow(outside)
    rest_sums = checkpoint.save_tree(work.out / "rest", narrow, ())
    plain = sum(leaf.nbytes for leaf in jax.tree.leaves(narrow))
    del narrow
    dense, where = partial(_read_dense, folder), work.beside / "importance"
    matter = importance.measure(decoder, outside, dense, windows, job.batch, where, progress)
    places = weights.budgeted_layers(decoder)
    count = len(decoder.layers)
    first = next((i for i in range(count) if not work.record(i).exists()), count)
    if not work.entering(first).exists():
        tokens = np.concatenate([windows, job.lessons])
        passes.embed_all(decoder, outside, tokens, job.batch, work.entering(0))
    del outside
    for i in progress(range(count), description="layers"):
        if i >= first:
            given_here = given[places.index(i)] if given is not None and i in places else None
            _one_layer(job, i, work, matter[i], given_here)
    records = [read_json(work.record(i)) for i in range(count)]
    x = np.load(work.entering(count), mmap_mode="r")
    names = ("frequency", "routing_weight", "error", "ratio", "slope")
    manifest = {
        **job.identity,
        "statistics": {
            "bits": list(range(1, job.how.max_bits + 1)),
            **{name: [r[name] for r in records if name in r] for name in names},
            "parts": [record["parts"] for record in records],
            "plain_bytes": plain + sum(record["plain_bytes"] for record in records),
            "tokens": windows.size,
        },
        "checksums": {
            "rest": rest_sums,
            **{f"layers/{i}": record["checksums"] for i, record in enumerate(records)},
        },
    }
    checkpoint.write_manifest(work.out, manifest)
    reader = checkpoint.ArtifactReader(work.out)

    @lru_cache(maxsize=1)
    def layer(i):
        own = read_layer(reader, i)
        return own, first_tables(own)

    def at(k, i):
        own, tables = layer(i)
        return dense_at(own, tables, k)

    sample = sensitivity.some_of(decoder, windows, x[: len(windows)])
    manifest = _measured(job, manifest, sample, at, work, WHEN[0], progress)
    return manifest, sample, x[len(windows) :]


def _measured(
    job: Job,
    manifest: dict[str, Any],
    sample: sensitivity.Text,
    at: sensitivity.At,
    work: Work,
    when: str,
    progress: Callable[..., Any],
) -> dict[str, Any]:
    """The manifest with what parts cost, measured unless that is there already."""
    folder, file = job.folder, work.costs(when)
    decoder = folder.decoder
    if not file.exists():
        stored: list[dict[str, tuple[int, ...]]] = [{} for _ in decoder.layers]
        for part in allocate.parts(decoder, manifest):
            stored[part.layer][part.tap] = part.widths
        outside, read = folder.read_rest(), partial(_read_dense, folder)
        batch = max(1, job.batch_tokens // sample.windows.shape[1])
        where = file.with_suffix("")
        found = sensitivity.costs(
            decoder, stored, outside, read, at, sample, batch, where, progress
        )
        write_json(file, {"layers": jax.tree.map(np.ndarray.tolist, found)})
    statistics, kept = manifest["statistics"], read_json(file)["layers"]
    parts = [
        {tap: part | {"cost": costs[tap]} for tap, part in of_layer.items()}
        for of_layer, costs in zip(statistics["parts"], kept, strict=True)
    ]
    return {**manifest, "statistics": {**statistics, "parts": parts}}


def _tune(
    job: Job,
    work: Work,
    manifest: dict[str, Any],
    sample: sensitivity.Text,
    target: np.ndarray,
    progress: Callable[..., Any],
) -> dict[str, Any]:
    """Trains the tables of an artifact that is whole but for its place; its manifest as it is now.

    The layers as they were stay beside those written anew until all of these are there.
    """
    checkpoint.write_manifest(work.out, manifest)
    reader = checkpoint.ArtifactReader(work.out)
    layers, tuned = work.out / "layers", work.beside / "tuned"

    def measure(state):
        def at(k, i):
            return dense_at(state.layers[i], state.tables[i], k)

        return _measured(job, manifest, sample, at, work, WHEN[1], progress)

    arguments = job.plan, job.lessons, target, work.tuning, job.most_kept, measure, progress
    tables, manifest = tune_artifact(reader, *arguments)
    shutil.rmtree(tuned, ignore_errors=True)
    tuned.mkdir()
    sums = dict(manifest["checksums"])
    for i, of_layer in enumerate(tables):
        leaves = reader.read_all(f"layers/{i}") | of_layer
        sums[f"layers/{i}"] = checkpoint.save_tree(tuned / str(i), leaves, checkpoint.BY_EXPERT)
    layers.rename(work.untuned)
    tuned.rename(layers)
    kept, bits = manifest["statistics"], manifest["statistics"]["bits"]
    factors = sum(v.nbytes for of in tables for name, v in of.items() if ".factor_" in name)
    kept = {**kept, "plain_bytes": kept["plain_bytes"] + factors // len(bits)}
    return {**manifest, "checksums": sums, "statistics": kept}


def _one_layer(job: Job, i: int, work: Work, matter: Path, given) -> None:
    """Saves a layer, and its output for all windows."""
    folder, directory, kept = job.folder, work.out / "layers" / str(i), work.seen(i)
    decoder, own = folder.decoder, _read_dense(folder, i)
    if not (kept / GRAMS).exists():  # as it does once all else is there
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        x = np.load(work.entering(i), mmap_mode="r")
        with passes.written(work.entering(i + 1), x.shape, np.float32) as y:
            grams = _observe(job, i, own, x, y, passes.read_found(matter), kept)
        with whole(kept / GRAMS) as aside:
            np.savez(aside, **jax.tree.map(np.asarray, grams))
        del grams
    grams, seen = _seen(kept)
    shutil.rmtree(directory, ignore_errors=True)
    of_layer = decoder, decoder.layers[i], own, grams, seen, job.how, given
    record, planes = quantize_layer(*of_layer, keeping(work.made(i)))
    del own, grams, seen
    tree = _narrow(_stored(folder, i))
    plain = (r for r in weights.roles(decoder.layers[i], decoder.width) if r.tap is None)
    record["plain_bytes"] = sum(weights.get(tree, role.path).nbytes for role in plain)
    for path, value in planes.items():
        weights.put(tree, path, value)
    directory.parent.mkdir(exist_ok=True)
    record["checksums"] = checkpoint.save_tree(directory, tree, checkpoint.BY_EXPERT)
    write_json(work.record(i), record)
    work.entering(i).unlink()
    shutil.rmtree(kept)
    shutil.rmtree(work.made(i), ignore_errors=True)


def _stored(folder, i: int) -> dict[str, Any]:
    """A layer's weights as they are stored."""
    stored: dict[str, Any] = {}
    for name, value in folder.read_layer(i):
        weights.put(stored, tuple(name.split(".")), value)
    folder.unmap()
    return stored


def _read_dense(folder: Folder, i: int) -> Any:
    """A layer's weights in float32."""
    own: dict[str, Any] = {}
    for name, value in folder.read_layer(i):
        weights.put(own, tuple(name.split(".")), jnp.asarray(value, jnp.float32))
    folder.unmap()
    return own


def _observe(job: Job, i: int, own, x, y, matter: importance.Importance, kept: Path):
    """Puts a layer's output for all windows into y; returns sums over those to calibrate on.

    What goes into the layer's experts lies in files of the folder `kept`, two for each batch.
    """
    decoder, batch, watched = job.folder.decoder, job.batch, len(job.windows)
    layer, eps, grams = decoder.layers[i], decoder.norm_eps, None
    for start in range(0, watched, batch):
        some = slice(start, min(start + batch, watched))
        mine = {name: value[some] for name, value in matter.items()}
        y[some], of_batch, seen = observe(layer, decoder.width, eps, own, x[some], mine)
        grams = of_batch if grams is None else added(grams, of_batch)
        with passes.written(kept / f"{start}.npy", seen.x.shape, np.float32) as rows:
            rows[...] = seen.x
        np.savez(kept / f"{start}.npz", *map(np.asarray, seen[1:]))
        del of_batch, seen
    for start in range(watched, len(x), batch):
        some = slice(start, start + batch)
        y[some] = outputs(layer, eps, own, x[some])
    return grams


def _seen(kept: Path) -> tuple[dict[str, jax.Array], list[Seen]]:
    """What `_observe` left in a folder: sums by name, and batches in order."""
    batches = []
    for file in sorted(kept.glob("*.npy"), key=lambda file: int(file.stem)):
        with np.load(file.with_suffix(".npz")) as held:
            batches.append(Seen(np.load(file, mmap_mode="r"), *(held[n] for n in held.files)))
    with np.load(kept / GRAMS) as held:
        return {name: jnp.asarray(held[name]) for name in held.files}, batches


def _narrow(tree: Any) -> Any:
    """Matrices at 16 bits, in bfloat16 unless they have 16 already; vectors as they are."""
    return jax.tree.map(
        lambda a: (
            np.asarray(a)
            if a.ndim < 2 or np.dtype(a.dtype).itemsize <= 2
            else np.asarray(a).astype(ml_dtypes.bfloat16)
        ),
        tree,
    )
