"""The figures of `mcjax bench --json` as Markdown tables and a plot beside the JSON.

uv run mcjax bench --json > benchmarks/results/speed_cpu.json
uv run python benchmarks/speed.py benchmarks/results/speed_cpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mcjax import bench


def markdown(facts):
    """One table for each part that is there."""
    lines = []
    for part, title in bench.titles().items():
        if part not in facts:
            continue
        head = bench.columns(part)
        rows = [head, ["---"] * len(head), *(bench.cells(facts, part, row) for row in facts[part])]
        lines += [f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    return "\n".join([*lines, bench.caption(facts["machine"])])


def draw(facts, path):
    """Speed-up of products over `jnp.dot` in float32, by bits and tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.4), layout="constrained")
    tokens = sorted({row["tokens"] for row in facts["products"]})
    for act, style in (("int8", "o-"), ("int16", "^:"), ("float", "s--")):
        suffix = "" if act == "float" else f", {act} activations"
        for i, count in enumerate(tokens):
            rows = [
                (k, row["speedup"])
                for k in (1, 2, 3, 4)
                for row in facts["products"]
                if row["name"] == f"mcjax {k} bits{suffix}" and row["tokens"] == count
            ]
            if rows:
                label = f"{count} token{'s' if count > 1 else ''}, {act}"
                axis.plot(*zip(*rows, strict=True), style, color=f"C{i}", label=label)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(
        xlabel="bits of a weight", ylabel="times as fast as jnp.dot, float32", xticks=[1, 2, 3, 4]
    )
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
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
