"""From a Hugging Face folder to an artifact: calibrate, quantise and save, a layer at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mcjax import checkpoint, text
from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes, resolve_group_size
from mcjax.calibrate import accumulate, empty_grams, expert_errors, pruning_statistics
from mcjax.convert import HuggingFaceFolder
from mcjax.hub import read_json
from mcjax.models.mixtral import layer as layer_module
from mcjax.notes import note
from mcjax.quantize import quantize

ATTENTION_WIDTHS = (4, 8)
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

EFFORTS = {"fast": 1, "normal": 6, "thorough": 15}
"""Rounds of descent after the GPTQ pass, see `mcjax.quantize`."""

GRAM_FLOOR = 1e-3
"""Weight of every calibration token in every expert's Gram matrix, see `LayerGrams`."""


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
    batch_tokens: int = 4096,
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Compresses a Mixtral into one artifact that serves every width up to `max_bits`.

    The layers run once over the calibration windows with their own weights; each is quantised on
    the inputs it sees there and saved before the next is read, so memory holds one layer. The
    artifact is written beside `out` and moved there when whole.

    Args:
      model: a Hugging Face folder.
      out: the artifact to write; must not exist.
      calibration: a UTF-8 text file.
      max_bits: planes of each expert weight.
      group_size: input features that share a table entry, None for each weight's default.
      samples: calibration windows, spread evenly over the text.
      seq_len: tokens in a window; more than the model's positions become those, with a note.
      effort: one of `EFFORTS`, time for quality.
      bos: whether windows begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      resume: go on from layers that an interrupted run with the same inputs left behind, and keep
        those finished if this one is interrupted.
      experts: planes of each layer's `gate`, `up` and `down` that were made otherwise, by once-QAT
        for instance, with a table for each width up to `max_bits`; None quantises the model's.
      batch_tokens: about how many calibration tokens are computed at once.
      progress: wraps the iteration over layers, called with (items, description=...).

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
    folder = HuggingFaceFolder(model)
    config = folder.config
    for d_in in {config.hidden_size, config.intermediate_size, _o_features(config)}:
        resolve_group_size(d_in, group_size)
    if seq_len > config.max_position_embeddings:
        note(
            f"calibrating on windows of {config.max_position_embeddings} tokens, all the positions "
            f"that the model has, not of {seq_len}"
        )
        seq_len = config.max_position_embeddings
    tokens = text.encode_file(folder.tokenizer_path, calibration, config.vocab_size)
    begin = text.beginning(folder.tokenizer_path, config.vocab_size, bos)
    windows = text.windows(tokens, seq_len, "calibration text", begin)
    windows = text.spread(windows, samples)

    identity = {
        "format_version": checkpoint.FORMAT_VERSION,
        "source_sha256": folder.source_hash(),
        "config": config.to_dict(),
        "max_bits": max_bits,
        "group_size": group_size,
        "effort": effort,
        "attention_widths": list(ATTENTION_WIDTHS),
        "calibration": {
            "file": Path(calibration).name,
            "windows": len(windows),
            "window_tokens": seq_len,
            "crc32": checkpoint.crc32(windows),
        },
    }
    if experts is not None:
        _check_experts(experts, config, max_bits)
        leaves = jax.tree.leaves(list(experts))
        identity["experts_crc32"] = [checkpoint.crc32(np.asarray(leaf)) for leaf in leaves]
    partial_out = out.parent / f".{out.name}.partial"
    _prepare(partial_out, identity, resume)
    named = read_json(folder.path / "config.json").get("bos_token_id")
    try:
        manifest = _run(folder, windows, partial_out, identity, experts, batch_tokens, progress)
        _copy_beside(folder.path, partial_out)
        manifest["bos_token_id"] = named
        checkpoint.write_manifest(partial_out, manifest)
        for i in range(config.num_hidden_layers):
            (partial_out / f"layer_{i}.json").unlink()
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
    return [(int(i), int(e), int(frequency[i, e])) for i, e in where]


def _check_experts(experts, config, max_bits):
    d, f = config.hidden_size, config.intermediate_size
    shapes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
    if len(experts) != config.num_hidden_layers:
        raise ValueError(f"experts of {len(experts)} layers for {config.num_hidden_layers}")
    for layer in experts:
        for name, shape in shapes.items():
            expected = (config.num_local_experts, *shape), tuple(range(1, max_bits + 1))
            if (layer[name].shape, layer[name].widths) != expected:
                raise ValueError(
                    f"experts' {name} has shape {layer[name].shape} and widths "
                    f"{layer[name].widths}, want {expected[0]} and {expected[1]}"
                )


def _run(folder, windows, directory, identity, given, batch_tokens, progress):
    """Works through the layers, skipping those already saved; returns the manifest."""
    config = folder.config
    rest = _narrow(folder.read_rest())
    rest_sums = checkpoint.save_tree(directory / "rest", rest, ())
    x = np.asarray(rest["embedding"], np.float32)[windows]
    batch = max(1, min(len(windows), batch_tokens // windows.shape[1]))
    starts = range(0, len(windows), batch)
    layer, records = layer_module(config, None, 0), []  # all layers are alike: one compilation
    for i in progress(range(config.num_hidden_layers), description="layers"):
        stored = folder.read_layer(i)
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), stored)
        done = directory / f"layer_{i}.json"
        if not done.exists():
            shutil.rmtree(directory / "layers" / str(i), ignore_errors=True)
            experts = None if given is None else given[i]
            record, tree = _quantize_layer(layer, params, x, starts, batch, identity, experts)
            kept = {name: _narrow(stored[name]) for name in ("attention_norm", "moe_norm")}
            tree = {
                **kept,
                **tree,
                "moe": {**tree["moe"], "router": _narrow(stored["moe"]["router"])},
            }
            (directory / "layers").mkdir(exist_ok=True)
            record["checksums"] = checkpoint.save_tree(
                directory / "layers" / str(i), tree, ["moe.experts."]
            )
            _write_json(done, record)
        records.append(read_json(done))
        if i + 1 < config.num_hidden_layers:
            x = np.concatenate([_forward(layer, params, x[s : s + batch]) for s in starts])
    return {
        **identity,
        "statistics": {
            "bits": records[0]["bits"],
            **{
                name: [record[name] for record in records]
                for name in ("frequency", "routing_weight", "error", "ratio", "slope")
            },
            "tokens": records[0]["tokens"],
        },
        "geometry": records[0]["geometry"],
        "checksums": {
            "rest": rest_sums,
            **{f"layers/{i}": record["checksums"] for i, record in enumerate(records)},
        },
    }


def _quantize_layer(layer, params, x, starts, batch, identity, experts):
    """Calibrates, quantises and measures one layer: what the manifest needs, and its planes."""
    config = layer.config
    grams, moe_inputs = empty_grams(config), []
    for s in starts:
        grams, seen = accumulate(layer, params, x[s : s + batch], grams, GRAM_FLOOR)
        moe_inputs.append(seen.reshape(-1, config.hidden_size))
    group_size, max_bits = identity["group_size"], identity["max_bits"]
    sweeps = EFFORTS[identity["effort"]]
    attention = {
        name: quantize(
            params["attention"][name],
            ATTENTION_WIDTHS[-1],
            group_size,
            grams.attention_output if name == "o" else grams.attention_input,
            widths=ATTENTION_WIDTHS,
            weights=(1.0, 1.0),
            sweeps=sweeps,
        )
        for name in checkpoint.ATTENTION_WEIGHTS
    }
    if experts is None:
        experts = {
            name: quantize(
                params["moe"]["experts"][name],
                max_bits,
                group_size,
                grams.expert_hidden if name == "down" else grams.expert_input,
                sweeps=sweeps,
            )
            for name in checkpoint.EXPERT_WEIGHTS
        }
    error = sum(expert_errors(config, params["moe"], experts, seen) for seen in moe_inputs)
    pruning = pruning_statistics(config, params["moe"], moe_inputs)
    planes = {
        **{f"attention.{name}": p for name, p in attention.items()},
        **{f"moe.experts.{name}": p for name, p in experts.items()},
    }
    record = {
        "bits": list(experts["gate"].widths),
        "frequency": np.asarray(grams.frequency).tolist(),
        "routing_weight": np.asarray(grams.routing_weight).tolist(),
        "error": np.sqrt(np.asarray(error)).tolist(),
        "ratio": pruning.ratio.tolist(),
        "slope": pruning.slope.tolist(),
        "tokens": int(grams.tokens),
        "geometry": {name: _geometry(p) for name, p in planes.items()},
    }
    intercept = pruning.intercept.astype(ml_dtypes.bfloat16)
    return record, {"attention": attention, "moe": {"experts": experts, "intercept": intercept}}


@partial(jax.jit, static_argnames="layer")
def _forward(layer, params, x):
    return layer.apply({"params": params}, x, jnp.arange(x.shape[1])[None])[0]


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
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    _write_json(mark, identity)


def _write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    with whole(path) as aside:
        aside.write_text(json.dumps(value))


def _narrow(tree: Any) -> Any:
    """Arrays at 16 bits: those that have 16 already as they are, wider ones in bfloat16."""
    return jax.tree.map(
        lambda a: (
            np.asarray(a)
            if np.dtype(a.dtype).itemsize <= 2
            else np.asarray(a).astype(ml_dtypes.bfloat16)
        ),
        tree,
    )


def _geometry(planes: BitPlanes) -> dict[str, int]:
    return {"d_in": planes.d_in, "group_size": planes.group_size}


def _o_features(config) -> int:
    return config.num_attention_heads * config.head_dim
