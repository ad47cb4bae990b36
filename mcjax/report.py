"""What an artifact holds, in figures and in pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mcjax import allocate, checkpoint, serving
from mcjax.atomic import whole
from mcjax.bitplane import resolve_group_size
from mcjax.compress import coverage
from mcjax.models.language_model import LanguageModel

CACHED = 4096
"""Tokens of a sequence whose cache is told."""


def describe(
    path: str | Path, budget: float | str | None = None, policy: str = "loss"
) -> dict[str, Any]:
    """Facts about an artifact.

    Args:
      path: the artifact.
      budget: to allocate, as in `mcjax.load`, or None.
      policy: as there.

    Returns:
      JSON-ready facts; `allocation` is [L][E] widths, or [L][E][2] of `gate` and `up`, and `down`,
      or None; `widths` what each layer's other parts have; `predicted_loss` what both cost by the
      artifact's measurements, nats a token; `use` each expert's share of its layer's routed tokens;
      `expert_bytes` the bytes of all experts at each uniform width; `feasible_budgets` the least
      and most bits; `feasible_bytes` the least and most bytes; `cache_bytes` what a sequence of
      `CACHED` tokens takes beside these, in float32.

    Raises:
      ValueError: if it is not a sound artifact, or the budget is not feasible.
    """
    path = Path(path)
    reader = checkpoint.ArtifactReader(path, "model")
    manifest, decoder = reader.manifest, reader.decoder
    kept = manifest["statistics"]
    stored, frequency = kept["bits"], np.array(kept["frequency"])
    layers, experts = frequency.shape
    every = allocate.parts(decoder, manifest)
    allocation, others, predicted = None, None, None
    if budget is not None:
        widths = serving.resolve_widths(reader, budget, None, None, None, policy)
        allocation = allocate.to_experts(decoder, widths).tolist()
        rest = [part for part in every if not part.budgeted]
        others = [[p.layer, p.tap, int(widths[p.layer, p.tap])] for p in rest]
        predicted = allocate.predicted_loss(decoder, manifest, widths)
    total = frequency.sum(axis=1, keepdims=True)
    return {
        "path": str(path),
        "format_version": manifest["format_version"],
        "source_sha256": manifest["source_sha256"],
        "calibration": manifest["calibration"],
        "layers": layers,
        "experts": experts,
        "max_bits": manifest["max_bits"],
        "group_sizes": sorted(
            {
                resolve_group_size(role.shape[-2], manifest["group_size"])
                for part in every
                if part.budgeted
                for role in part.roles
            }
        ),
        "attention_widths": manifest["attention_widths"],
        "layer_numbers": list(dict.fromkeys(part.layer for part in every if part.budgeted)),
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "expert_bytes": {
            k: sum(
                part.bytes(k, manifest["group_size"]) * (part.experts or 1)
                for part in every
                if part.budgeted
            )
            for k in stored
        },
        "feasible_budgets": [float(stored[0]), float(stored[-1])],
        "feasible_bytes": [
            kept["plain_bytes"]
            + sum(
                part.bytes(part.widths[at], manifest["group_size"]) * (part.experts or 1)
                for part in every
            )
            for at in (0, -1)
        ],
        "cache_bytes": LanguageModel(decoder).cache_bytes(1, CACHED),
        "rare_experts": coverage(manifest),
        "use": (frequency / np.where(total > 0, total, 1)).tolist(),
        "budget": budget,
        "allocation": allocation,
        "widths": others,
        "predicted_loss": predicted,
        "measured": _measured(path),
    }


def plot(facts: dict[str, Any], file: str | Path) -> None:
    """Draws the allocation as a heat map, and perplexity against bytes where measured.

    Args:
      facts: from `describe`; without an allocation the share of tokens is drawn instead.
      file: a path that matplotlib can write, PNG for instance.

    Raises:
      ValueError: if matplotlib cannot write such a file, or there is no such folder.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [p for p in facts["measured"] if p.get("bytes_read")]
    rows = 1 + bool(points)
    layers, experts = facts["layers"], facts["experts"]
    height = max(2.5, 0.32 * layers + 1.4)
    figure, axes = plt.subplots(
        rows,
        1,
        figsize=(max(6.0, 0.45 * experts + 2.5), height + 3.6 * bool(points)),
        squeeze=False,
        layout="constrained",
        height_ratios=[height, 3.6][:rows],
    )
    _heat_map(figure, axes[0, 0], facts)
    if points:
        _curve(axes[1, 0], points)
    try:
        with whole(file) as aside:
            figure.savefig(aside, dpi=150)
    finally:
        plt.close(figure)


def _heat_map(figure, axis, facts):
    import matplotlib.pyplot as plt

    if facts["allocation"] is not None:
        each = np.array(facts["allocation"])
        values = each if each.ndim == 2 else each.mean(axis=2)
        levels = facts["max_bits"]
        image = axis.imshow(
            values, cmap=plt.get_cmap("viridis", levels), vmin=0.5, vmax=levels + 0.5, aspect="auto"
        )
        figure.colorbar(image, ax=axis, label="bits", ticks=range(1, levels + 1))
        budget = facts["budget"]
        unit = budget if isinstance(budget, str) else f"{budget:g} bits on average"
        axis.set_title(f"expert widths at {unit}")
        labels = each.astype(str)
        if each.ndim == 3:  # of gate and up, and of down
            axis.set_title(f"expert widths (gate and up, down) at {unit}")
            labels = np.char.add(np.char.add(labels[..., 0], " "), labels[..., 1])
    else:
        values = np.array(facts["use"])
        image = axis.imshow(values, cmap="magma", vmin=0, aspect="auto")
        figure.colorbar(image, ax=axis, label="share of the layer's tokens")
        axis.set_title("use of experts on calibration text")
        labels = np.char.mod("%.2f", values)
    if values.shape[1] <= 32:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for (row, column), label in np.ndenumerate(labels):
            color = "black" if values[row, column] > middle else "white"
            axis.text(column, row, label, ha="center", va="center", fontsize=7, color=color)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    rows = range(0, values.shape[0], max(1, values.shape[0] // 16))
    axis.set_yticks(rows, [facts["layer_numbers"][row] for row in rows])


def _curve(axis, points):
    for text in sorted({p["text"] for p in points}):
        mine = sorted((p for p in points if p["text"] == text), key=lambda p: p["bytes_read"])
        axis.plot(
            [p["bytes_read"] / 1e6 for p in mine],
            [p["perplexity"] for p in mine],
            marker="o",
            label=text,
        )
        for p in mine:
            axis.annotate(
                f"{p['average_bits']:.2g}",
                (p["bytes_read"] / 1e6, p["perplexity"]),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axis.set_yscale("log")
    axis.set_xlabel("bytes read, MB (labels: average expert bits)")
    axis.set_ylabel("perplexity")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def record(path: str | Path, text: str, facts: dict[str, Any]) -> None:
    """Notes a measurement beside the artifact for later plots; skipped where it is read-only."""
    entry = {
        "text": text,
        **{
            k: facts[k]
            for k in ("perplexity", "tokens", "average_bits", "effective_bits", "bytes_read")
        },
    }
    try:
        with (Path(path) / checkpoint.MEASURED).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    except OSError:
        return


def _measured(path: Path) -> list[dict[str, Any]]:
    try:
        lines = (path / checkpoint.MEASURED).read_text().splitlines()
        return [json.loads(line) for line in lines if line]
    except (OSError, json.JSONDecodeError):
        return []
