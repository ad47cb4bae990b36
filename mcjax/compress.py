"""From a Hugging Face folder to an artifact: calibrate, quantise and save, a layer at a time."""

from __future__ import annotations

import errno
import json
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

from mcjax import allocate, checkpoint, importance, sensitivity, text
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, resolve_group_size
from mcjax.calibrate import Seen, observe
from mcjax.hub import Folder, local, read_json
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.families import describe
from mcjax.models.language_model import embed
from mcjax.notes import note
from mcjax.quantize_layer import ATTENTION_WIDTHS, Options, quantize_layer
from mcjax.schedule import Setting, settings, windows_wanted
from mcjax.serving import ATTENTION_BITS
from mcjax.tune_artifact import dense_at, first_tables, outputs, read_layer, tune_artifact

TRAVELS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files that an artifact takes over from the folder it is made of."""

BATCH_TOKENS = 4096
"""About how many tokens are computed at once."""

RARE_SHARE = 0.1
"""An expert is rare if it gets less than this share of the tokens that an even split would give."""

EFFORTS = {"fast": 1, "normal": 6, "thorough": 15, "best": 6}
"""Rounds of descent after the GPTQ pass, see `mcjax.quantize`. The best effort then tunes tables,
see `mcjax.tune_artifact`."""

TUNED = "best"

TUNING = "tuning.npz"
"""What an interrupted tuning goes on from."""

COSTS = "costs_{}.json"
"""What parts cost, before tuning and after."""

WHEN = ("compressed", "tuned")

UNTUNED = "untuned"
"""Where layers are from which tuning began, once those that it wrote have taken their place."""


def compress(
    model: str | Path,
    out: str | Path,
    calibration: str | Path,
    *,
    max_bits: int = 4,
    group_size: int | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    effort: str = "normal",
    bos: str = "auto",
    resume: bool = False,
    experts: Sequence[Mapping[str, BitPlanes]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Compresses a language model into one artifact that serves every width up to `max_bits`.

    The model runs over the calibration windows and back, for the importance of each token, see
    `mcjax.importance`, whose inputs of layers lie beside `out` meanwhile: 2 bytes for each window's
    tokens, features and layers. Then the layers run once more with their own weights; each is
    quantised on the inputs it sees there and saved before the next is read, so memory holds one
    layer. The best effort then trains tables, for which it holds all planes, see
    `mcjax.tune_artifact`. What is written is beside `out` until it is whole.

    Args:
      model: a Hugging Face folder, or a name on the hub, see `mcjax.hub.local`.
      out: the artifact to write; must not exist.
      calibration: a text, see `mcjax.documents.read_documents`.
      max_bits: planes of each expert weight.
      group_size: input features that share a table entry, None for each weight's default.
      samples: calibration windows, spread evenly over the text.
      seq_len: tokens in a window; more than the model's positions become those, with a note.
      effort: one of `EFFORTS`, time for quality.
      bos: whether windows begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      resume: go on from layers that an interrupted run with the same inputs left behind, and keep
        those finished if this one is interrupted.
      experts: planes of each layer's `gate`, `up` and `down` that were made otherwise, by once-QAT
        for instance, rotated and with a table for each width up to `max_bits`; None quantises the
        model's.
      batch_tokens: about how many calibration tokens are computed at once.
      progress: wraps the iterations over layers, and that over steps of tuning, called with (items,
        description=...).

    Returns:
      The artifact's manifest.

    Raises:
      ValueError: for input that cannot be compressed; nothing is left at `out`.
      OSError: if the artifact cannot be written.
    """
    out = Path(out).absolute()
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another place")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is not a folder")
    if not 1 <= max_bits <= 8:
        raise ValueError(f"--max-bits must be 1 to 8, got {max_bits}")
    if effort not in EFFORTS:
        raise ValueError(f"--effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    folder = Folder(local(model))
    decoder = folder.decoder
    for layer in set(decoder.layers):
        for role in weights.roles(layer, decoder.width):
            if role.tap is not None:
                resolve_group_size(role.shape[-2], group_size)
    if seq_len > decoder.max_position_embeddings:
        note(
            f"calibrating on windows of {decoder.max_position_embeddings} tokens, all the "
            f"positions that the model has, not of {seq_len}"
        )
        seq_len = decoder.max_position_embeddings
    ends = decoder.eos_token_ids
    tokens = text.encode_file(folder.tokenizer_path, calibration, decoder.vocab_size, ends)
    begin = text.beginning(folder.tokenizer_path, decoder.vocab_size, bos)
    every = text.windows(tokens, seq_len, "calibration text", begin)
    windows, lessons = text.spread(every, samples), None

    identity = {
        "format_version": checkpoint.FORMAT_VERSION,
        "source_sha256": folder.source_hash(),
        "config": folder.values,
        "max_bits": max_bits,
        "group_size": group_size,
        "rotated": True,
        "effort": effort,
        "importance": importance.MEASURE,
        "costs": sensitivity.MEASURE,
        "attention_widths": list(ATTENTION_WIDTHS),
        "calibration": {
            "file": Path(calibration).name,
            "windows": len(windows),
            "window_tokens": seq_len,
            "crc32": checkpoint.crc32(windows),
        },
    }
    plan: Sequence[Setting] = ()
    if effort == TUNED:
        plan = settings(decoder, range(1, max_bits + 1), ATTENTION_WIDTHS, ATTENTION_BITS)
        lessons = text.spread(every, windows_wanted(plan, seq_len))
        identity["tuning"] = {
            "windows": len(lessons),
            "crc32": checkpoint.crc32(lessons),
            "settings": [list(setting) for setting in plan],
        }
    if experts is not None:
        _check_experts(experts, decoder, max_bits)
        leaves = jax.tree.leaves(list(experts))
        identity["experts_crc32"] = [checkpoint.crc32(np.asarray(leaf)) for leaf in leaves]
    partial_out = out.parent / f".{out.name}.partial"
    _prepare(partial_out, identity, resume)
    try:
        options = partial_out, identity, experts, batch_tokens, progress
        manifest, sample, target = _run(folder, windows, lessons, *options)
        _copy_beside(folder.path, partial_out)
        if lessons is not None:
            given = folder, sample, lessons, target, batch_tokens
            manifest = _tune(partial_out, manifest, plan, given, progress)
        checkpoint.write_manifest(partial_out, manifest)
        for name in (TUNING, importance.KEPT, *(COSTS.format(when) for when in WHEN)):
            (partial_out / name).unlink(missing_ok=True)
        for i in range(len(decoder.layers)):
            (partial_out / f"layer_{i}.json").unlink()
        shutil.rmtree(partial_out / UNTUNED, ignore_errors=True)
        (partial_out / "identity.json").unlink()
        os.replace(partial_out, out)
    except BaseException as error:
        if not resume:
            shutil.rmtree(partial_out, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(f"no space left to write {out}") from error
        raise
    return manifest


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


def _check_experts(experts, decoder: Decoder, max_bits: int) -> None:
    layers = weights.budgeted_layers(decoder)
    if len(experts) != len(layers):
        raise ValueError(f"experts of {len(experts)} layers for {len(layers)}")
    for i, given in zip(layers, experts, strict=True):
        for role in weights.budgeted(decoder, decoder.layers[i]):
            name, expected = role.path[-1], (role.shape, tuple(range(1, max_bits + 1)), True)
            planes = given[name]
            if (planes.shape, planes.widths, planes.rotated) != expected:
                raise ValueError(
                    f"experts' {name} has shape {planes.shape}, widths {planes.widths} and "
                    f"rotated={planes.rotated}, want {expected[0]}, {expected[1]} and True"
                )


def _run(folder, windows, lessons, directory, identity, given, batch_tokens, progress):
    """Works through the layers, skipping those already saved.

    Returns:
      The manifest, some of the windows, see `mcjax.sensitivity`, and what the dense model's last
      layer gives for `lessons`, float32 [N, T, D].
    """
    decoder = folder.decoder
    outside = folder.read_rest()
    rest_sums = checkpoint.save_tree(directory / "rest", _narrow(outside), ())
    batch = max(1, min(len(windows), batch_tokens // windows.shape[1]))

    dense = partial(_read_dense, folder)
    matter = importance.measure(decoder, outside, dense, windows, batch, directory, progress)
    tokens = windows if lessons is None else np.concatenate([windows, lessons])
    x = np.array(embed(decoder, outside, tokens, jnp.float32))
    del outside
    places = weights.budgeted_layers(decoder)
    how = Options(
        identity["max_bits"],
        identity["group_size"],
        identity["rotated"],
        EFFORTS[identity["effort"]],
    )
    records = []
    for i in progress(range(len(decoder.layers)), description="layers"):
        given_here = given[places.index(i)] if given is not None and i in places else None
        options = len(windows), batch, directory, how, given_here
        x = _one_layer(folder, i, x, matter[i], *options)
        records.append(read_json(directory / f"layer_{i}.json"))
    outside = folder.read_rest()
    plain = sum(leaf.nbytes for leaf in jax.tree.leaves(_narrow(outside)))
    names = ("frequency", "routing_weight", "error", "ratio", "slope")
    manifest = {
        **identity,
        "statistics": {
            "bits": list(range(1, identity["max_bits"] + 1)),
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
    checkpoint.write_manifest(directory, manifest)
    reader = checkpoint.ArtifactReader(directory)

    @lru_cache(maxsize=1)
    def layer(i):
        own = read_layer(reader, i)
        return own, first_tables(own)

    def at(k, i):
        own, tables = layer(i)
        return dense_at(own, tables, k)

    sample = sensitivity.some_of(windows, x[: len(windows)])
    where = batch_tokens, directory, WHEN[0]
    manifest = _measured(folder, manifest, sample, at, *where, progress)
    return manifest, sample, x[len(windows) :].copy()


def _measured(
    folder: Folder,
    manifest: dict[str, Any],
    sample: sensitivity.Text,
    at: sensitivity.At,
    batch_tokens: int,
    directory: Path,
    when: str,
    progress: Callable[..., Any],
) -> dict[str, Any]:
    """The manifest with what parts cost, measured unless that is there already."""
    decoder, file = folder.decoder, directory / COSTS.format(when)
    if not file.exists():
        stored: list[dict[str, tuple[int, ...]]] = [{} for _ in decoder.layers]
        for part in allocate.parts(decoder, manifest):
            stored[part.layer][part.tap] = part.widths
        outside, read = folder.read_rest(), partial(_read_dense, folder)
        batch = max(1, batch_tokens // sample.windows.shape[1])
        found = sensitivity.costs(
            decoder, stored, outside, read, at, sample, batch, directory, progress
        )
        _write_json(file, {"layers": jax.tree.map(np.ndarray.tolist, found)})
    statistics, kept = manifest["statistics"], read_json(file)["layers"]
    parts = [
        {tap: part | {"cost": costs[tap]} for tap, part in of_layer.items()}
        for of_layer, costs in zip(statistics["parts"], kept, strict=True)
    ]
    return {**manifest, "statistics": {**statistics, "parts": parts}}


def _tune(
    directory: Path, manifest: dict[str, Any], plan: Sequence[Setting], given: tuple, progress
) -> dict[str, Any]:
    """Trains the tables of an artifact that is whole but for its place; its manifest as it is now.

    The layers as they were stay beside those written anew until all of these are there.
    """
    folder, sample, lessons, target, batch_tokens = given
    checkpoint.write_manifest(directory, manifest)
    reader = checkpoint.ArtifactReader(directory)
    keep, layers, tuned = (directory / name for name in (TUNING, "layers", "tuned"))

    def measure(state):
        def at(k, i):
            return dense_at(state.layers[i], state.tables[i], k)

        where = batch_tokens, directory, WHEN[1]
        return _measured(folder, manifest, sample, at, *where, progress)

    tables, manifest = tune_artifact(reader, plan, lessons, target, keep, measure, progress)
    shutil.rmtree(tuned, ignore_errors=True)
    tuned.mkdir()
    sums = dict(manifest["checksums"])
    for i, of_layer in enumerate(tables):
        leaves = reader.read_all(f"layers/{i}") | of_layer
        sums[f"layers/{i}"] = checkpoint.save_tree(tuned / str(i), leaves, checkpoint.BY_EXPERT)
    layers.rename(directory / UNTUNED)
    tuned.rename(layers)
    kept, bits = manifest["statistics"], manifest["statistics"]["bits"]
    factors = sum(v.nbytes for of in tables for name, v in of.items() if ".factor_" in name)
    kept = {**kept, "plain_bytes": kept["plain_bytes"] + factors // len(bits)}
    return {**manifest, "checksums": sums, "statistics": kept}


def _one_layer(
    folder,
    i: int,
    x: np.ndarray,
    matter: importance.Importance,
    watched: int,
    batch: int,
    directory: Path,
    how: Options,
    given,
):
    """Saves a layer unless it is there; its output for all windows."""
    decoder = folder.decoder
    stored = _stored(folder, i)
    own = _dense(stored)
    done = directory / f"layer_{i}.json"
    y, grams, seen = _observe(decoder, i, own, x, matter, 0 if done.exists() else watched, batch)
    if done.exists():
        return y
    shutil.rmtree(directory / "layers" / str(i), ignore_errors=True)
    record, planes = quantize_layer(decoder, decoder.layers[i], own, grams, seen, how, given)
    del own
    tree = _narrow(stored)
    plain = (r for r in weights.roles(decoder.layers[i], decoder.width) if r.tap is None)
    record["plain_bytes"] = sum(weights.get(tree, role.path).nbytes for role in plain)
    for path, value in planes.items():
        weights.put(tree, path, value)
    (directory / "layers").mkdir(exist_ok=True)
    record["checksums"] = checkpoint.save_tree(
        directory / "layers" / str(i), tree, checkpoint.BY_EXPERT
    )
    _write_json(done, record)
    return y


def _stored(folder, i: int) -> dict[str, Any]:
    """A layer's weights as they are stored."""
    stored: dict[str, Any] = {}
    for name, value in folder.read_layer(i):
        weights.put(stored, tuple(name.split(".")), value)
    folder.unmap()
    return stored


def _read_dense(folder, i: int) -> Any:
    return _dense(_stored(folder, i))


def _dense(stored: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), stored)


def _observe(decoder: Decoder, i: int, own: Any, x: np.ndarray, matter, watched: int, batch: int):
    """A layer's output for all windows, and sums and what experts see of the first `watched`."""
    layer, eps = decoder.layers[i], decoder.norm_eps
    y, grams, batches = np.empty_like(x), None, []
    for start in range(0, watched, batch):
        some = slice(start, min(start + batch, watched))
        mine = {name: value[some] for name, value in matter.items()}
        y[some], of_batch, seen = observe(layer, decoder.width, eps, own, x[some], mine)
        grams = of_batch if grams is None else jax.tree.map(jnp.add, grams, of_batch)
        batches.append(Seen(*map(np.asarray, seen)))
    for start in range(watched, len(x), batch):
        some = slice(start, start + batch)
        y[some] = outputs(layer, eps, own, x[some])
    return y, grams, batches


def _prepare(directory: Path, identity: dict[str, Any], resume: bool) -> None:
    """Makes the working folder: empty, or with only finished layers if it is to be resumed."""
    mark = directory / "identity.json"
    if resume and mark.exists():
        if read_json(mark) != json.loads(json.dumps(identity)):
            raise ValueError(
                f"{directory} was left by a run with another model, text or options; "
                "remove it or run without --resume"
            )
        shutil.rmtree(directory / "rest", ignore_errors=True)
        if (directory / UNTUNED).exists():
            shutil.rmtree(directory / "layers", ignore_errors=True)
            (directory / UNTUNED).rename(directory / "layers")
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    _write_json(mark, identity)


def _write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    with whole(path) as aside:
        aside.write_text(json.dumps(value))


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
