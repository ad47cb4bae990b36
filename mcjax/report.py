"""What an artifact holds, in figures and in pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mcjax import checkpoint, pmq, serving, tables
from mcjax.atomic import whole
from mcjax.bitplane import padded, resolve_group_size
from mcjax.compress import coverage
from mcjax.models import families, weights

MEASURED = "measured.jsonl"
"""Beside the artifact's data: what `mcjax eval` has measured on it, one JSON object a line."""


def describe(path: str | Path, budget: float | None = None) -> dict[str, Any]:
    """Facts about an artifact.

    Args:
      path: the artifact.
      budget: average bits per expert weight to allocate, or None.

    Returns:
      JSON-ready facts; `allocation` is [L][E] widths or None, `use` each expert's share of its
      layer's routed tokens, `expert_bytes` the bytes of all experts at each uniform width.

    Raises:
      ValueError: if it is not a sound artifact, or the budget is not feasible.
    """
    path = Path(path)
    manifest = checkpoint.read_manifest(path, "model")
    stats = serving.statistics(manifest)
    layers, experts = stats.frequency.shape
    allocation = None
    if budget is not None:
        allocation = serving.resolve_allocation(manifest, budget, None, None)
    total = stats.frequency.sum(axis=1, keepdims=True)
    return {
        "path": str(path),
        "format_version": manifest["format_version"],
        "source_sha256": manifest["source_sha256"],
        "calibration": manifest["calibration"],
        "layers": layers,
        "experts": experts,
        "max_bits": manifest["max_bits"],
        "group_sizes": sorted({_group_size(manifest, role) for _, role in _roles(manifest)}),
        "attention_widths": manifest["attention_widths"],
        "layer_numbers": list(weights.budgeted_layers(families.describe(manifest["config"])[1])),
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "expert_bytes": {
            k: expert_bytes(manifest, np.full((layers, experts), k)) for k in stats.bits
        },
        "feasible_budgets": list(pmq.feasible_budgets(stats.bits, experts, rows=False)),
        "rare_experts": coverage(manifest),
        "use": (stats.frequency / np.where(total > 0, total, 1)).tolist(),
        "budget": budget,
        "allocation": None if allocation is None else [list(row) for row in allocation],
        "measured": _measured(path),
    }


def expert_bytes(manifest: dict[str, Any], allocation: np.ndarray) -> int:
    """Bytes of all expert weights with their tables at an allocation [L, E]."""
    total = 0
    for row, role in _roles(manifest):
        d_in, d_out = padded(role.shape[-2]), role.shape[-1]
        for width in map(int, np.asarray(allocation)[row]):
            table = tables.num_rows(width) * d_in // _group_size(manifest, role)
            total += d_out * (width * d_in // 8 + table)
    return total


def _roles(manifest: dict[str, Any]) -> list[tuple[int, weights.Role]]:
    """The weights that a budget is about, each with its row of an allocation."""
    decoder = families.describe(manifest["config"])[1]
    return [
        (row, role)
        for row, i in enumerate(weights.budgeted_layers(decoder))
        for role in weights.budgeted(decoder, decoder.layers[i])
    ]


def _group_size(manifest: dict[str, Any], role: weights.Role) -> int:
    return resolve_group_size(role.shape[-2], manifest["group_size"])


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
        values = np.array(facts["allocation"])
        levels = facts["max_bits"]
        image = axis.imshow(
            values, cmap=plt.get_cmap("viridis", levels), vmin=0.5, vmax=levels + 0.5, aspect="auto"
        )
        figure.colorbar(image, ax=axis, label="bits", ticks=range(1, levels + 1))
        axis.set_title(f"expert widths at {facts['budget']:g} bits on average")
        labels = values.astype(str)
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
        with (Path(path) / MEASURED).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    except OSError:
        return


def _measured(path: Path) -> list[dict[str, Any]]:
    try:
        lines = (path / MEASURED).read_text().splitlines()
        return [json.loads(line) for line in lines if line]
    except (OSError, json.JSONDecodeError):
        return []
