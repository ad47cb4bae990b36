"""Sharing bits out: the programme against brute force, budgets in bytes against what is read."""

import itertools
import math
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mcjax
from mcjax import allocate, pmq, programme
from mcjax.checkpoint import ArtifactReader
from mcjax.notes import Note


def best_by_brute_force(cost, size, total):
    """The least cost of choices that fit."""
    least = math.inf
    for choice in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        at = np.arange(len(cost)), np.array(choice)
        if size[at].sum() <= total:
            least = min(least, cost[at].sum())
    return least


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 4), st.floats(0, 1))
def test_programme_equals_brute_force(seed, parts, widths, share):
    rng = np.random.default_rng(seed)
    size = np.cumsum(rng.integers(1, 50, (parts, widths)), axis=1)
    cost = -np.sort(-rng.exponential(size=(parts, widths)), axis=1)
    cost[rng.random(cost.shape) < 0.2] = np.inf  # some parts lack some widths
    cost[:, 0] = np.where(np.isinf(cost).all(axis=1), 9.0, cost[:, 0])
    usable = np.isfinite(cost)
    low = np.where(usable, size, 10**6).min(axis=1).sum()
    high = np.where(usable, size, 0).max(axis=1).sum()
    total = int(low + share * (high - low))
    chosen = programme.share_out(cost, size, total)
    at = np.arange(parts), chosen
    assert np.isfinite(cost[at]).all() and size[at].sum() <= total
    assert cost[at].sum() <= best_by_brute_force(cost, size, total) + 1e-6
    more = (size - size[at][:, None])[usable & (size > size[at][:, None])]
    assert (more > total - size[at].sum()).all()  # nothing more fits


def test_parse():
    assert programme.parse("2.5") == programme.parse(2.5) == 2.5
    for text, count in [("4.2GB", 42 * 10**8), ("4 GiB", 2**32), ("300kB", 300000), ("7b", 7)]:
        assert programme.parse(text) == programme.Bytes(count)
    for text in ("4.2 bits", "GB", "-3MB", ""):
        with pytest.raises(ValueError, match="neither average bits"):
            programme.parse(text)


def test_allocations_of_experts_and_back(artifact):
    reader = ArtifactReader(artifact)
    decoder, manifest = reader.decoder, reader.manifest
    rng = np.random.default_rng(0)
    for shape in ((2, 5), (2, 5, 2)):
        allocation = rng.integers(1, 4, shape)
        widths = allocate.of_experts(decoder, manifest, allocation, 8)
        np.testing.assert_array_equal(allocate.to_experts(decoder, widths), allocation)
        assert widths[1, "mixer_input"] == 8
    model = mcjax.load(artifact, allocation=allocation)
    np.testing.assert_array_equal(model.allocation, allocation)
    means = allocation.mean(axis=(0, 1))
    assert model.average_bits == pytest.approx((2 * means[0] + means[1]) / 3)


def feasible(artifact):
    """The least and most bytes that an artifact is served from."""
    reader = ArtifactReader(artifact)
    every = allocate.parts(reader.decoder, reader.manifest)
    fixed, group_size = reader.manifest["statistics"]["plain_bytes"], reader.manifest["group_size"]
    return [
        fixed + sum(p.bytes(p.widths[at], group_size) * (p.experts or 1) for p in every)
        for at in (0, -1)
    ]


def between(artifact, share):
    """So much of the way from the least bytes to the most, as a budget."""
    low, high = feasible(artifact)
    return f"{int(low + share * (high - low))}B"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_a_budget_in_bytes_is_kept_and_used(artifact, share):
    reader, (low, high) = ArtifactReader(artifact), feasible(artifact)
    every, group_size = allocate.parts(reader.decoder, reader.manifest), 32
    budget = int(between(artifact, share)[:-1])
    model = mcjax.load(artifact, budget=f"{budget}B")
    assert model.bytes_read <= budget
    cheapest = min(
        (
            part.bytes(wider, group_size) - part.bytes(int(k), group_size)
            for part in every
            for k in np.atleast_1d(model.widths[part.layer, part.tap])
            for wider in part.widths
            if wider > k
        ),
        default=math.inf,
    )
    assert budget - model.bytes_read < cheapest
    with pytest.raises(ValueError, match=f"served from {low} to {high} bytes"):
        mcjax.load(artifact, budget=f"{low - 1}B")


def test_a_budget_in_bytes_counts_what_pruning_reads(artifact):
    budget = between(artifact, 0.6)
    for policy in ("affine", "paper"):
        model = mcjax.load(artifact, budget=budget, prune=policy)
        assert int(budget[:-1]) - 8000 < model.bytes_read <= int(budget[:-1])


def test_the_most_bits_of_a_huge_model_are_feasible(artifact, monkeypatch):
    """Products of budgets and sizes round where sizes are large."""
    reader = ArtifactReader(artifact)
    monkeypatch.setattr(allocate.Part, "weights", lambda part: 3 * 10**12 + 7)
    widths = allocate.allocate(reader.decoder, reader.manifest, 3.0, 4)
    assert (allocate.to_experts(reader.decoder, widths) == 3).all()
    with pytest.raises(ValueError, match="if it is bytes, write 620000B"):
        mcjax.load(artifact, budget=620_000)


def test_dealing_bits_out_evenly():
    cost, size = np.array([[4.0, 1.0, 0.25]] * 2), np.array([[1, 2, 3]] * 2)
    assert programme.even_cost(cost, size, 4) == 2 and programme.even_cost(cost, size, 5) == 1.25
    assert programme.even_cost(cost, size, 1) == math.inf
    cost[0, 0] = np.inf  # one of the parts has no such width
    assert programme.even_cost(cost, size, 3) == math.inf


def test_choices_too_large_are_made_smaller():
    cost, size = np.array([[4.0, 1.0, 0.25], [8.0, 2.0, 0.5]]), np.array([[1, 2, 3]] * 2)
    np.testing.assert_array_equal(programme.filled(cost, size, 5, np.array([2, 2])), [1, 2])


def test_refining_to_bytes_and_back_equals_loading(artifact):
    model = mcjax.load(artifact, bits=1)
    for share in (0.5, 0.8, 0.2):
        precision = {"budget": between(artifact, share)}
        before = model.bytes_read
        model, loaded = model.refine(**precision), mcjax.load(artifact, **precision)
        assert {k: v.tolist() for k, v in model.widths.items()} == {
            k: v.tolist() for k, v in loaded.widths.items()
        }
        assert model.bytes_read - before < loaded.bytes_read
        jax.tree.map(np.testing.assert_array_equal, model.params, loaded.params)
    attention = {at: k for at, k in model.widths.items() if at[1] == "mixer_input"}
    model = model.refine(bits=2)  # what that is not about stays
    assert {at: model.widths[at] for at in attention} == attention
    assert (model.allocation == 2).all()


def test_costs_are_what_was_measured(artifact):
    reader = ArtifactReader(artifact)
    for part in allocate.parts(reader.decoder, reader.manifest):
        cost = allocate.costs(reader.manifest, part)
        measured = reader.manifest["statistics"]["parts"][part.layer][part.tap]
        assert cost.shape == np.shape(measured["cost"]) == (part.experts or 1, len(part.widths))
        first = np.array(measured["cost"])[:, 0]
        assert (cost[:, 0] >= first).all()
        most = np.max(measured["cost"], axis=1).clip(0)
        assert cost[:, 0].sum() <= most.sum() + allocate.LEAST * abs(first.sum()) + 1e-12
        assert (cost > 0).all() and (np.diff(cost, axis=1) <= 0).all()


def test_more_bits_are_predicted_to_cost_less(artifact):
    reader = ArtifactReader(artifact)
    losses = []
    for budget in (1.0, 1.5, 2.0, 2.5, 3.0):
        widths = allocate.allocate(reader.decoder, reader.manifest, budget, 4)
        losses.append(allocate.predicted_loss(reader.decoder, reader.manifest, widths))
    assert (np.diff(losses) < 0).all(), losses


def test_the_published_rule(artifact):
    kept = ArtifactReader(artifact).manifest["statistics"]
    names = ("frequency", "routing_weight", "error")
    stats = pmq.ExpertStatistics(**{name: np.array(kept[name]) for name in names})
    model = mcjax.load(artifact, budget=2.0, policy="paper")
    np.testing.assert_array_equal(model.allocation, pmq.allocate(stats, 2.0))
    for more in ({"budget": "600kB", "policy": "paper"}, {"budget": "600kB", "attention_bits": 4}):
        with pytest.raises(ValueError, match="chooses every width"):
            mcjax.load(artifact, **more)
    with pytest.raises(ValueError, match="policy must be one of"):
        mcjax.load(artifact, budget=2.0, policy="best")


def test_it_says_when_one_width_is_as_good():
    cost = np.tile([1.0, 0.25, 0.06], (8, 1))
    size = np.tile([1, 2, 3], (8, 1))
    with pytest.warns(Note, match="about as good here"):
        programme.tell_if_slight(cost * (1 + 0.001 * np.arange(8))[:, None], size, np.full(8, 1))
    uneven = cost * np.array([1, 100] * 4)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        programme.tell_if_slight(uneven, size, np.array([0, 2] * 4))


def test_widths_of_one_part_may_differ_between_layers(artifact):
    """Attention of several widths: the same logits as with its weights dequantised."""
    reader = ArtifactReader(artifact)
    decoder, manifest = reader.decoder, reader.manifest
    allocation = np.full((2, 5), 2)
    widths = allocate.of_experts(decoder, manifest, allocation, 4) | {
        (0, "mixer_input"): np.array(2),
        (1, "mixer_output"): np.array(8),
    }
    from mcjax import parameters
    from mcjax.models.language_model import LanguageModel

    params = parameters.read_rest(reader) | parameters.read_layers(reader, widths)
    dense = jax.tree.map(
        lambda w: w.dequantize() if hasattr(w, "dequantize") else w,
        params,
        is_leaf=lambda w: hasattr(w, "dequantize"),
    )
    tokens = np.arange(24).reshape(2, 12)
    module = LanguageModel(decoder)
    got, expected = (module.apply({"params": p}, tokens) for p in (params, dense))
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.slow
def test_as_many_parts_as_the_largest_models_have():
    """58 layers of 256 experts of 3 matrices at 4 widths: by the bound of its Lagrangian dual."""
    rng, count, budget = np.random.default_rng(0), 58 * 256 * 3, 2.5
    scale = np.exp(rng.normal(size=(count, 1)))
    cost = scale * np.array([1, 0.25, 0.06, 0.015]) * np.exp(0.2 * rng.normal(size=(count, 4)))
    size = np.tile(np.arange(1, 5) * (7168 * 2048), (count, 1))
    total = int(budget * 7168 * 2048 * count)
    chosen = programme.share_out(cost, size, total)
    rows = np.arange(count)
    assert size[rows, chosen].sum() <= total
    prices = np.geomspace(1e-3, 10, 4000)
    bound = max((cost + p * np.arange(1, 5)).min(axis=1).sum() - p * budget * count for p in prices)
    assert bound <= cost[rows, chosen].sum() * (1 + 1e-9)
    assert cost[rows, chosen].sum() < bound * 1.001
