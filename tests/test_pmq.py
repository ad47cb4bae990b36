"""Allocation against the released one, against brute force, and against bad budgets."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcjax import pmq

RELEASED = json.loads(
    (Path(__file__).parent / "fixtures" / "mixtral_8x7b_statistics.json").read_text()
)


def released_statistics():
    return pmq.ExpertStatistics(
        frequency=RELEASED["frequency"],
        routing_weight=RELEASED["routing_weight"],
        error=RELEASED["error"],
        bits=tuple(RELEASED["bits"]),
    )


def random_statistics(rng, layers, experts, bits):
    error = np.sort(rng.random((layers, experts, len(bits))), axis=-1)[..., ::-1]
    return pmq.ExpertStatistics(
        frequency=rng.integers(1, 100, (layers, experts)),
        routing_weight=rng.random((layers, experts)),
        error=error,
        bits=bits,
    )


@pytest.mark.parametrize("total", [12, 16, 20])
def test_equals_the_released_allocation_for_mixtral(total):
    expected = np.array(RELEASED["released_allocation_by_total_bits"][str(total)])
    np.testing.assert_array_equal(pmq.allocate(released_statistics(), total / 8), expected)


@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 2, 3), (1, 2, 3, 4), (2, 4)]),
    st.floats(0, 1),
    st.sampled_from(["layer", "model"]),
)
@settings(max_examples=30, deadline=None)
def test_equals_brute_force(seed, bits, share, scope):
    rng = np.random.default_rng(seed)
    layers, experts = 2, 3
    stats = random_statistics(rng, layers, experts, bits)
    rows = bits == (1, 2, 3) and scope == "layer"
    low, high = pmq.feasible_budgets(bits, experts, rows)
    budget = low + share * (high - low)
    got = pmq.allocate(stats, budget, scope)
    cost = pmq.costs(stats)

    def best(cost, total):
        options = [
            (sum(c[bits.index(k)] for c, k in zip(cost, widths, strict=True)), widths)
            for widths in itertools.product(bits, repeat=len(cost))
            if sum(widths) <= total and not (rows and not {2, 3} <= set(widths))
        ]
        return min(options)[0]

    def value(cost, widths):
        return sum(c[bits.index(k)] for c, k in zip(cost, widths, strict=True))

    if scope == "model":
        cells = cost.reshape(-1, len(bits))
        assert got.sum() <= budget * layers * experts + 1e-6
        assert value(cells, got.ravel()) <= best(cells, budget * cells.shape[0] + 1e-9) * (1 + 1e-6)
    else:
        for layer in range(layers):
            assert got[layer].sum() <= budget * experts + 1e-6
            limit = best(cost[layer], budget * experts + 1e-9)
            assert value(cost[layer], got[layer]) <= limit * (1 + 1e-6)


def test_dead_experts_get_the_fewest_bits_and_ties_the_lower_index():
    stats = pmq.ExpertStatistics(
        frequency=[[10, 10, 10, 0]],
        routing_weight=[[5, 5, 5, 0]],
        error=np.tile([4.0, 2.0, 1.0, 0.9], (1, 4, 1)),
        bits=(1, 2, 3, 4),
    )
    assert pmq.allocate(stats, 1.75).tolist() == [[2, 2, 2, 1]]
    assert pmq.allocate(stats, 1.5).sum() == 6
    assert pmq.allocate(stats, 1.5).tolist()[0][0] > 1


def test_all_equal_costs_take_the_fewest_bits():
    stats = pmq.ExpertStatistics(
        frequency=np.ones((1, 4)),
        routing_weight=np.ones((1, 4)),
        error=np.ones((1, 4, 2)),
        bits=(1, 2),
    )
    assert pmq.allocate(stats, 2.0).tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("scope, low, high", [("layer", "1.375", "2.875"), ("model", "1", "3")])
@pytest.mark.parametrize("budget", [0.5, 3.5, -1, float("nan"), float("inf")])
def test_infeasible_budgets_name_the_feasible_range(budget, scope, low, high):
    with pytest.raises(ValueError, match=f"allow {low} to {high} bits") as error:
        pmq.allocate(released_statistics(), budget, scope)
    assert "scope" not in str(error.value)


def test_published_rows_can_be_left_out():
    assert pmq.allocate(released_statistics(), 1.0, published_rows=False).max() == 1


def test_bad_statistics():
    with pytest.raises(ValueError, match="scope must be one of"):
        pmq.allocate(released_statistics(), 2.0, "expert")
    with pytest.raises(ValueError, match="error must be finite"):
        pmq.ExpertStatistics(frequency=[[1]], routing_weight=[[1]], error=[[[np.nan]]], bits=(1,))
    with pytest.raises(ValueError, match="must be"):
        pmq.ExpertStatistics(frequency=[[1]], routing_weight=[[1]], error=[[[1, 2]]], bits=(1,))
