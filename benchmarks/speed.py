"""The figures of `mcjax bench --json` as Markdown tables and a plot beside the JSON.

uv run mcjax bench --json > benchmarks/results/speed_cpu.json
uv run python benchmarks/speed.py benchmarks/results/speed_cpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def markdown(facts):
    """One table for each part."""
    here, lines = facts["machine"], []
    for part in ("products", "experts", "decode", "prefill", "load"):
        rows = facts[part]
        tokens = "tokens" in rows[0]
        head = ["", *(["tokens"] if tokens else []), "ms (quartiles)", "speed-up"]
        if part == "products":
            head += ["of roofline", "error"]
        if part == "decode":
            head += ["tokens/s", "MB held"]
        lines += [f"**{part}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in rows:
            low, high = row["spread_ms"]
            cells = [row["name"], *([str(row["tokens"])] if tokens else [])]
            cells += [f"{row['ms']:.2f} ({low:.2f} to {high:.2f})", f"{row['speedup']:.2f}x"]
            if part == "products":
                bound = row["bytes"] / here["bandwidth_gb_s"] / 1e6
                cells += [f"{bound / row['ms']:.0%}", f"{row['error']:.1e}" if row["error"] else ""]
            if part == "decode":
                cells += [f"{row['tokens_per_second']:.0f}", f"{row['bytes_held'] / 1e6:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    lines.append(
        f"{here['device']} ({here['processor']}), copies at {here['bandwidth_gb_s']:.1f} GB/s; "
        f"{versions}"
    )
    return "\n".join(lines)


def draw(facts, path):
    """Speed-up of products over `jnp.dot` in float32, by bits and tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = sorted({row["tokens"] for row in facts["products"]})
    for act in (", int8 activations", ""):
        for i, count in enumerate(tokens):
            rows = [
                (int(row["name"].split()[1]), row["speedup"])
                for row in facts["products"]
                if row["name"].startswith("mcjax")
                and row["tokens"] == count
                and row["name"].endswith("activations") == bool(act)
            ]
            if rows:
                label = f"{count} token{'s' if count > 1 else ''}{act}"
                axis.plot(
                    *zip(*rows, strict=True), "o-" if act else "s--", color=f"C{i}", label=label
                )
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(
        xlabel="bits of a weight", ylabel="times as fast as jnp.dot, float32", xticks=[1, 2, 3, 4]
    )
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)
    axis.set_title(f"4096 x 14336 on {facts['machine']['processor']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    """Prints the tables and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("facts", type=Path)
    arguments = parser.parse_args()
    facts = json.loads(arguments.facts.read_text())
    print(markdown(facts))
    draw(facts, arguments.facts.with_suffix(".png"))


if __name__ == "__main__":
    main()
