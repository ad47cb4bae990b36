"""The benchmark itself: what it times gives right answers, and its rows mean what they say."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import bench, tables
from mcjax.cli import main
from mcjax.models import weights


def test_rows_are_medians_and_ratios():
    rows = bench.timed(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}, 3, tokens=1
    )
    assert [row["name"] for row in rows] == ["slow", "fast"]
    assert rows[0]["speedup"] == 1 and rows[1]["speedup"] == rows[0]["ms"] / rows[1]["ms"] > 1
    for row in rows:
        low, high = row["spread_ms"]
        assert low <= row["ms"] <= high and row["tokens"] == 1


def test_products_carry_their_error_and_bytes():
    rows = bench.products(1, shape=(128, 96), tokens=(1, 256))
    ours = [row for row in rows if row["name"].startswith("mcjax")]
    assert len(ours) == 12 + 8
    for row in ours:
        least, most = next(
            bounds
            for act, bounds in {"int8": (1e-4, 0.05), "int16": (1e-6, 2e-4), "": (0, 1e-5)}.items()
            if act in row["name"]
        )
        assert least < row["error"] < most
        bits = int(row["name"].split()[1])
        assert row["bytes"] == 128 * 96 / 8 * bits + 96 * tables.num_rows(bits)


def test_models_are_the_same_size_and_run(monkeypatch):
    small = bench.MOE | {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
    }
    monkeypatch.setattr(bench, "MOE", small)
    monkeypatch.setattr(bench, "_PROMPT", 16)
    module, params = bench.served_moe(config=small)
    (gate, *_) = weights.expert_weights(module.decoder, params)
    assert np.mean(gate.allocation) == bench.BUDGET
    logits = jax.jit(module.apply)({"params": params}, jnp.arange(4)[None])
    assert np.isfinite(logits).all() and np.ptp(logits) > 0
    rows = bench.decoding(1, steps=2)
    assert rows[1]["bytes_held"] < rows[0]["bytes_held"] / 2


def test_bad_repeats(capsys):
    assert main(["bench", "--repeats", "0"]) == 1
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err


def test_tables():
    row = {"name": "a", "ms": 1.0, "spread_ms": [0.9, 1.1], "speedup": 1.0}
    facts = {
        "machine": {
            "device": "cpu",
            "platform": "cpu",
            "processor": "p",
            "bandwidth_gb_s": 10.0,
            "versions": {"jax": "0"},
        },
        "products": [{**row, "tokens": 1, "bytes": 1e6, "error": None}],
        "experts": [row],
        "decode": [{**row, "tokens_per_second": 5.0, "bytes_held": 1}],
        "prefill": [row],
        "load": [row],
    }
    tables = bench.tables(facts)
    assert len(tables) == 5 and list(tables[0].columns[4].cells) == ["10%"]


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_random_planes_are_of_the_shape_asked_for(bits):
    planes = bench.random_planes(jax.random.key(0), (2, 64, 32), bits)
    assert planes.shape == (2, 64, 32) and planes.bits == bits
    assert np.isfinite(planes.dequantize()).all()
