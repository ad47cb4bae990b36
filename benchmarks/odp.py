"""What skipping experts costs: both policies at several quantiles, at 16 bits and from an artifact.

uv run python benchmarks/odp.py MODEL ARTIFACT --calibration TEXT --text TEXT --out FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from mcjax import odp
from mcjax.evaluate import evaluate


def main():
    """Writes one JSON object: for each precision, rows of policy, quantile, skips and cost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--budget", type=float, default=2.5)
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    arguments = parser.parse_args()
    out = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    dense = (arguments.model, {})
    served = (arguments.artifact, {"budget": arguments.budget})
    for name, (path, precision) in (("16", dense), (f"{arguments.budget:g}", served)):
        common = {"seq_len": arguments.seq_len, **precision}
        plain = evaluate(path, arguments.text, **common)["perplexity"]
        out[name] = {"perplexity": plain, "rows": []}
        if path == arguments.model:
            common["calibration"] = arguments.calibration
        for policy in odp.POLICIES:
            for quantile in arguments.quantiles:
                facts = evaluate(path, arguments.text, prune=policy, quantile=quantile, **common)
                row = {"policy": policy, "quantile": quantile, "skipped": facts["experts_pruned"]}
                row["cost"] = facts["perplexity"] / plain - 1
                out[name]["rows"].append(row)
    arguments.out.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
