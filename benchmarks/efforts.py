r"""What each effort of `mcjax compress` takes and gives, beside dedicated GPTQ models.

    uv run python benchmarks/efforts.py MODEL --calibration TEXT --text TEXT --out FILE.json \
        --efforts fast normal best [--also start=CHECKOUT] [--gptq]

Each effort runs in a fresh process of its own: its seconds, and the most memory it had, pages of
mapped files included. Then perplexity on the text at widths and budgets, and the gap in
log-perplexity to the unquantised model. `--also NAME=CHECKOUT` does the same with the code of
another checkout, normal effort, on the same windows; where that is given first, each other row has
its gaps in those of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mcjax import text
from mcjax.baseline import dedicated_gptq
from mcjax.evaluate import evaluate
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.language_model import LanguageModel

HERE = Path(__file__).parents[1]

COMPRESS = "import sys; from mcjax.cli import program; sys.exit(program())"

EVALUATE = """
import json, sys
from mcjax.evaluate import evaluate
path, text, seq_len, settings = json.loads(sys.argv[1])
found = [evaluate(path, text, seq_len=seq_len, **setting) for setting in settings]
print(json.dumps(found))
"""


def main() -> None:
    """Writes FILE.json, a row for each effort."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--efforts", nargs="*", default=["fast", "normal", "best"])
    parser.add_argument("--also", action="append", default=[], metavar="NAME=CHECKOUT")
    parser.add_argument("--gptq", action="store_true", help="dedicated models of every width too")
    parser.add_argument("--keep", type=Path, help="a folder that artifacts are left in")
    parser.add_argument("--group-size", type=int, help="default each weight's own")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.5, 2.0, 2.5])
    arguments = parser.parse_args()
    settings: dict[str, dict[str, Any]] = {str(k): {"bits": k} for k in arguments.bits}
    settings |= {f"budget {b:g}": {"budget": b} for b in arguments.budgets}
    dense = evaluate(arguments.model, arguments.text, seq_len=arguments.seq_len)
    out: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "calibration": f"{Path(arguments.calibration).name}, {arguments.samples} windows",
        "text": Path(arguments.text).name,
        "seq_len": arguments.seq_len,
        "group_size": arguments.group_size,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "tokens": dense["tokens"],
        "unquantised": dense["perplexity"],
        "rows": [],
    }

    def report(row: dict[str, Any], found: dict[str, float]) -> None:
        gap = {name: math.log(p / out["unquantised"]) for name, p in found.items()}
        row |= {"perplexity": found, "gap": gap}
        first = next(iter(out["rows"]), None)
        if first is not None and first["code"] != "this":
            row["of_first"] = {name: g / first["gap"][name] for name, g in gap.items()}
        out["rows"].append(row)
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(out, indent=1) + "\n")

    others = (given.split("=", 1) for given in arguments.also)
    runs = [(name, Path(path).absolute(), "normal") for name, path in others]
    runs += [("this", HERE, effort) for effort in arguments.efforts]
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkout, effort in runs:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            artifact = folder / f"{name}_{effort}.mcjax"
            row = {"code": name, "effort": effort, **compressed(arguments, checkout, artifact)}
            given = artifact, arguments.text, arguments.seq_len, list(settings.values())
            lines = run(checkout, EVALUATE, json.dumps(given, default=str))[0].splitlines()
            (made,) = (line for line in lines if line.startswith("[{"))  # the solver prints too
            found = dict(zip(settings, json.loads(made), strict=True))
            row["effective_bits"] = {k: f["effective_bits"] for k, f in found.items()}
            row["bytes_read"] = {k: f["bytes_read"] for k, f in found.items()}
            report(row, {k: f["perplexity"] for k, f in found.items()})
    if arguments.gptq:
        seconds, found = dedicated(arguments)
        report({"code": "gptq", "seconds": seconds}, found)


def compressed(arguments: argparse.Namespace, checkout: Path, artifact: Path) -> dict[str, Any]:
    """Makes an artifact; what that took, and its bytes on disk."""
    given = ["compress", arguments.model, str(artifact), "--calibration", arguments.calibration]
    given += ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
    if arguments.group_size is not None:
        given += ["--group-size", str(arguments.group_size)]
    effort = artifact.stem.rsplit("_", 1)[1]
    start = time.perf_counter()
    _, peak = run(checkout, COMPRESS, *given, "--effort", effort)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    return {"seconds": seconds, "peak_bytes": peak, "artifact_bytes": size}


def run(checkout: Path, program: str, *given: str) -> tuple[str, int]:
    """What a program prints, run with the code of a checkout, and the most memory it had."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, *given],  # not the code of this folder
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    if process.stdout is None:
        raise ValueError("a pipe was asked for")
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status != 0:
        raise RuntimeError(f"{' '.join(given)} failed in {checkout}")
    return printed, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dedicated(arguments: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds that GPTQ took to make a model for each width, and perplexities of these."""
    folder = Folder(arguments.model)
    decoder, found = folder.decoder, {}
    read, ends = folder.tokenizer_path, decoder.eos_token_ids
    begin = text.beginning(read, decoder.vocab_size, "auto")

    def windows(file):
        tokens = text.encode_file(read, file, decoder.vocab_size, ends)
        return text.windows(tokens, arguments.seq_len, begin=begin)

    calibration = text.spread(windows(arguments.calibration), arguments.samples)
    held_out = windows(arguments.text)
    roles = weights.budgeted(decoder, decoder.layers[weights.budgeted_layers(decoder)[0]])
    experts = roles[0].shape[0] if roles[0].routed else 1
    shape = (len(weights.budgeted_layers(decoder)), experts)
    seconds = 0.0
    for k in arguments.bits:
        start = time.perf_counter()
        params = dedicated_gptq(folder, calibration, np.full(shape, k), arguments.group_size)
        seconds += time.perf_counter() - start
        found[str(k)] = text.perplexity(LanguageModel(decoder), params, held_out)[0]
    return seconds, found


if __name__ == "__main__":
    main()
