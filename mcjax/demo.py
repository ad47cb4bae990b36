"""The whole story on the embedded model: one artifact against models made for each budget.

The model, its tokenizer and its texts are in `mcjax/embedded`; nothing is downloaded, and every
figure is computed when asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import allocate, checkpoint, parameters, serving, text
from mcjax.atomic import whole
from mcjax.baseline import dedicated_gptq
from mcjax.compress import compress
from mcjax.generate import Sampling, generate_text
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.decoder import Decoder
from mcjax.models.language_model import LanguageModel
from mcjax.report import describe, plot

EMBEDDED = Path(__file__).parent / "embedded"
BUDGETS = (1.5, 2.0, 2.5, 3.0, 4.0)
SHUFFLES = 2
PROMPT = "And it came to pass"
_SEQ_LEN = 256
_SAMPLES = 64
_PRUNED_BUDGET = 2.5
_FACTS = "demo.json"


def demo(
    out: str | Path = "mcjax-demo",
    *,
    windows: int = 64,
    progress: Callable[..., Any] = lambda items, **_: items,
) -> dict[str, Any]:
    """Compresses the embedded model, measures it, writes a sample and draws.

    Args:
      out: folder to write, whole or not at all: `artifact/`, `demo.json`, `perplexity.png` and
        `allocation.png`. An earlier demo there is replaced.
      windows: how many windows of 256 held-out tokens perplexities are measured on.
      progress: wraps the iterations over layers and over measurements.

    Returns:
      The facts in `demo.json`: perplexities at 16 bits and for every budget, what pruning costs,
      bytes, and the sample.

    Raises:
      ValueError: if `out` exists and is not a demo.
    """
    out = Path(out).absolute()
    if out.exists() and not (out / _FACTS).is_file():
        raise ValueError(f"{out} exists and is not an earlier demo; remove it or move elsewhere")
    with whole(out) as aside:
        aside.mkdir()
        artifact = aside / "artifact"
        compress(
            EMBEDDED,
            artifact,
            EMBEDDED / "calibration.txt",
            samples=_SAMPLES,
            seq_len=_SEQ_LEN,
            progress=progress,
        )
        facts = measure(artifact, windows, progress)
        facts |= sample(artifact)
        (aside / _FACTS).write_text(json.dumps(facts, indent=2))
        draw(facts, aside / "perplexity.png")
        plot(describe(artifact, _PRUNED_BUDGET), aside / "allocation.png")
        shutil.rmtree(out, ignore_errors=True)
    return facts


def measure(
    artifact: Path, windows: int, progress: Callable[..., Any] = lambda items, **_: items
) -> dict[str, Any]:
    """Perplexities of one artifact at every budget, beside models that GPTQ made for each.

    Args:
      artifact: the embedded model, compressed.
      windows: as in `demo`.
      progress: wraps the iteration over measurements.

    Returns:
      `full`, the 16-bit perplexity; `rows`, one dict a budget; `pruning`, one a policy; bytes.
    """
    folder = Folder(EMBEDDED)
    decoder, params = folder.decoder, folder.read(np.float32)
    module = LanguageModel(decoder)
    manifest = checkpoint.read_manifest(artifact)
    stored, shape = manifest["statistics"]["bits"], np.shape(manifest["statistics"]["frequency"])

    def read(name):
        tokens = text.encode_file(folder.tokenizer_path, EMBEDDED / name, decoder.vocab_size)
        return text.windows(tokens, _SEQ_LEN)

    held_out = text.spread(read("held_out.txt"), windows)
    calibration = text.spread(read("calibration.txt"), manifest["calibration"]["windows"])

    def perplexity(params):
        return text.perplexity(module, params, held_out)

    # Every width dequantised once; an allocation then picks among them, in one compiled program.
    by_width = {k: _dequantized(serving.load(artifact, bits=k).params) for k in stored}

    def mixed(allocation):
        widths = allocate.of_experts(decoder, manifest, allocation, serving.ATTENTION_BITS)
        return _mixed(decoder, by_width, widths)

    facts: dict[str, Any] = {"full": perplexity(params)[0], "tokens": held_out.size}
    rng, rows = np.random.default_rng(0), []
    for budget in progress(BUDGETS, description="budgets"):
        model = serving.load(artifact, budget)
        row: dict[str, Any] = {
            "budget": budget,
            "effective_bits": model.effective_bits,
            "bytes_read": model.bytes_read,
            "artifact": perplexity(mixed(model.allocation))[0],
        }
        if np.ptp(model.allocation):
            shuffled = [rng.permuted(model.allocation, axis=1) for _ in range(SHUFFLES)]
            values = [perplexity(mixed(allocation))[0] for allocation in shuffled]
            row["shuffled"] = float(np.mean(values))
        if budget in stored:
            rival = np.full(shape, int(budget))
            row["uniform"] = perplexity(by_width[int(budget)])[0]
        else:
            rival = allocate.published(manifest, budget)
        row["gptq"] = perplexity(dedicated_gptq(folder, calibration, rival))[0]
        rows.append(row)

    pruning = parameters.read_pruning(checkpoint.ArtifactReader(artifact))
    served = mixed(serving.load(artifact, _PRUNED_BUDGET).allocation)
    plain = {"16": facts["full"], f"{_PRUNED_BUDGET:g}": rows[2]["artifact"]}
    costs = []
    for bits, dense in progress(
        [("16", params), (f"{_PRUNED_BUDGET:g}", served)], description="ODP"
    ):
        for policy in ("affine", "paper"):
            value, skipped = perplexity(serving.with_pruning(decoder, dense, pruning, policy))
            costs.append(
                {
                    "bits": bits,
                    "policy": policy,
                    "skipped": skipped,
                    "perplexity": value,
                    "cost": value / plain[bits] - 1,
                }
            )
    return {
        **facts,
        "rows": rows,
        "pruning": costs,
        "model_bytes": sum(file.stat().st_size for file in EMBEDDED.glob("*.safetensors")),
        "artifact_bytes": sum(f.stat().st_size for f in artifact.rglob("*") if f.is_file()),
        "device": jax.devices()[0].device_kind,
    }


def sample(artifact: Path, tokens: int = 100) -> dict[str, Any]:
    """A continuation of `PROMPT` at 2.5 bits with pruning: `sample` and `tokens_per_second`."""
    written = generate_text(
        artifact,
        [PROMPT],
        budget=_PRUNED_BUDGET,
        prune="affine",
        max_new_tokens=tokens,
        sampling=Sampling(temperature=0.7, top_p=0.9),
    )
    return {
        "sample": PROMPT + written["texts"][0],
        "tokens_per_second": written["tokens_per_second"],
    }


def draw(facts: Mapping[str, Any], file: Path) -> None:
    """Draws perplexity against average bits: the artifact, GPTQ, and a shuffled allocation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = facts["rows"]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for key, label, style in (
        ("artifact", "mcjax: one artifact", "o-"),
        ("gptq", "GPTQ: a model for each budget", "s--"),
        ("shuffled", "the artifact, widths shuffled", "x:"),
    ):
        some = [r for r in rows if key in r]
        axis.plot([r["budget"] for r in some], [r[key] for r in some], style, label=label)
    axis.axhline(facts["full"], color="grey", linewidth=1, label="16 bits")
    axis.set(xlabel="average bits per expert weight", ylabel="perplexity on held-out text")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_minor_formatter("{x:.0f}")
    axis.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def tables(facts: Mapping[str, Any]) -> list[Any]:
    """The facts as rich tables."""
    from rich.table import Table

    bits = Table(
        title=f"perplexity on {facts['tokens']} held-out tokens, 16 bits {facts['full']:.2f}"
    )
    for name in (
        "budget",
        "one artifact",
        "GPTQ for it",
        "all alike",
        "shuffled",
        "bits on disk",
        "MB read",
    ):
        bits.add_column(name, justify="right")
    for row in facts["rows"]:
        bits.add_row(
            f"{row['budget']:g}",
            f"[bold]{row['artifact']:.2f}[/]",
            f"{row['gptq']:.2f}",
            f"{row['uniform']:.2f}" if "uniform" in row else "",
            f"{row['shuffled']:.2f}" if "shuffled" in row else "",
            f"{row['effective_bits']:.2f}",
            f"{row['bytes_read'] / 1e6:.2f}",
        )
    odp = Table(title="experts skipped while serving (ODP)")
    for name in ("bits", "policy", "skipped", "perplexity", "cost"):
        odp.add_column(name, justify="right")
    for row in facts["pruning"]:
        odp.add_row(
            row["bits"],
            {"affine": "mcjax", "paper": "as published"}[row["policy"]],
            f"{100 * row['skipped']:.1f} %",
            f"{row['perplexity']:.2f}",
            f"{100 * row['cost']:+.2f} %",
        )
    return [bits, odp]


def _dequantized(params: Any) -> Any:
    """Dense parameters of a model on planes."""

    def is_planes(leaf):
        return hasattr(leaf, "dequantize")

    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_planes(leaf) else leaf, params, is_leaf=is_planes
    )


def _mixed(decoder: Decoder, by_width: Mapping[int, Any], widths: allocate.Widths) -> Any:
    """Dense parameters whose every expert has its own width, from those of each width."""
    stored = sorted(by_width)
    params = jax.tree.map(lambda a: a, by_width[stored[0]])
    for member in weights.members(decoder):
        for role in weights.budgeted(decoder, member.layer):
            path = member.path + role.path
            own = parameters.widths_of(member.numbers, role, widths)
            every = jnp.stack([weights.get(by_width[k], path) for k in stored])
            made = every[np.searchsorted(stored, own), *np.indices(own.shape)]
            weights.put(params, path, made)
    return params
