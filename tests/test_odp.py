"""Pruning: the published rule against a literal transcription, and work that really shrinks."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mcjax
from mcjax import odp
from mcjax.calibrate import Seen, pruning_statistics
from mcjax.evaluate import dense_pruning_statistics, evaluate
from mcjax.models import weights
from mcjax.models.experts import apply_experts, chosen, routed
from mcjax.notes import Note
from mcjax.ops import expert_map
from mcjax.serving import with_pruning


def attention_of(rng, batch, heads, tokens):
    scores = rng.normal(size=(batch, heads, tokens, tokens))
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    weights = np.exp(scores)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12))
def test_importance_is_the_papers(seed, tokens):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(2, tokens, 5)).astype(np.float32)
    attention = attention_of(rng, 2, 3, tokens)
    expected = np.zeros((2, tokens))
    for b in range(2):
        for j in range(tokens):
            received = sum(attention[b, :, i, j].mean() for i in range(j, tokens))
            expected[b, j] = np.abs(hidden[b, j]).sum() * received / (tokens - j)
    np.testing.assert_allclose(odp.token_importance(hidden, attention), expected, rtol=1e-5)


def test_padding_does_not_matter():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 9, 4)).astype(np.float32)
    attention = attention_of(rng, 1, 2, 9)
    got = odp.token_importance(hidden, attention, jnp.array([6]))
    short = odp.token_importance(hidden[:, :6], attention[:, :, :6, :6])
    np.testing.assert_allclose(got[:, :6], short, rtol=1e-6)
    assert np.isneginf(got[:, 6:]).all() and not odp.protect(got)[:, 6:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0, 1))
def test_mask_is_the_rule(seed, k, threshold):
    rng = np.random.default_rng(seed)
    weights = -np.sort(-rng.dirichlet(np.ones(k), size=20).astype(np.float32), axis=-1)
    protected = rng.random(20) < 0.2
    mask = np.asarray(odp.keep_mask(weights, np.float32(threshold), protected))
    for token in range(20):
        for j in range(k):
            bound = np.float32(threshold) * weights[token, 0]
            expected = j == 0 or protected[token] or weights[token, j] >= bound
            assert mask[token, j] == expected
    kept = odp.renormalize(weights, mask)
    np.testing.assert_allclose(np.sum(kept, axis=-1), 1, rtol=1e-5)
    assert (np.asarray(kept)[~mask] == 0).all()
    np.testing.assert_array_equal(jax.jit(odp.keep_mask)(weights, threshold, protected), mask)


def test_bad_values():
    with pytest.raises(ValueError, match=r"\(3,\) for 1 ranks"):
        odp.keep_mask(np.ones((4, 2), np.float32), np.ones(3))
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        odp.thresholds(np.zeros((2, 1, 101)), 1.5)
    with pytest.raises(ValueError, match="unknown pruning policy 'best'"):
        with_pruning(None, {}, [], "best")


def test_ranks_have_one_threshold_or_their_own():
    """Either way the same share falls under it; of one rank after the first it is the same."""
    random = np.random.default_rng(0)
    weights = -np.sort(-random.dirichlet(np.ones(4) / 2, 20000), axis=-1)
    every = weights[:, 1:] / weights[:, :1]
    ratio = np.quantile(every, odp.LEVELS, axis=0).T
    for apart in (False, True):
        mu = odp.thresholds(ratio, 0.37, apart)
        assert mu.shape == (3,)
        skipped = 1 - np.asarray(odp.keep_mask(weights, mu))
        assert abs(skipped[:, 1:].mean() - 0.37) < 0.005
        shares = skipped[:, 1:].mean(axis=0)
        assert np.allclose(shares, 0.37, atol=0.005) if apart else np.all(np.diff(shares) > 0.1)
    one, own = (odp.thresholds(ratio[:1], 0.37, apart) for apart in (False, True))
    np.testing.assert_allclose(one, own, rtol=1e-6)


@pytest.mark.parametrize("policy", odp.POLICIES)
def test_one_expert_a_token_leaves_none_to_skip(tmp_path, model_folder, text_file, policy):
    assert odp.thresholds(np.zeros((0, 101))).shape == (0,)
    assert odp.thresholds(np.array([]), 0.0).shape == (0,)  # as JSON gives it back
    assert odp.thresholds(np.zeros((3, 0, 101))).shape == (3, 0)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    common = {"seq_len": 64, "max_tokens": 640}
    plain = evaluate(folder, text_file, **common)
    with pytest.warns(Note, match="nothing is pruned"):
        pruned = evaluate(folder, text_file, **common, prune=policy, calibration=text_file)
    assert pruned["experts_pruned"] == 0
    assert abs(pruned["perplexity"] / plain["perplexity"] - 1) < 1e-4


def test_skipped_rows_reach_no_expert():
    """Only the blocks that hold kept rows run."""
    seen = []

    def product(weights, rows):
        jax.debug.callback(lambda r: seen.append(len(r)), rows)
        return rows

    rows, block = 64, 8
    x = np.ones((rows, 3), np.float32)
    keep = np.arange(rows) % 4 == 0
    weights = (jnp.zeros((2, 3, 3)),)
    out = expert_map(product, weights, x, np.zeros(rows, int), keep, block)
    jax.effects_barrier()
    assert sum(seen) == keep.sum()
    np.testing.assert_array_equal(np.asarray(out)[:, 0], keep)


@pytest.mark.parametrize("policy", odp.POLICIES)
def test_block_by_hand(model_folder, policy):
    """The pruned model's block output, expert by expert, against the policy's words."""
    model = mcjax.load(model_folder)
    decoder, params = model.module.decoder, model.params
    params = jax.tree.map(lambda a: a.astype(np.float32), params)
    tokens = np.random.default_rng(1).integers(0, 300, (2, 32))
    statistics = dense_pruning_statistics(decoder, params, tokens)
    pruned = with_pruning(decoder, params, statistics, policy, 0.5)
    _, seen = model.module.apply({"params": pruned}, tokens, mutable=["keep"])
    (kept,) = jax.tree.leaves(seen)  # [layers, tokens, 2]
    assert 0.2 < 1 - np.mean(kept) < 0.26  # half of the second ones, less those of protected tokens

    spec, block = decoder.layers[1].block, weights.of_layer(decoder, pruned, 1)["block"]
    x = np.random.default_rng(2).normal(size=(64, 96)).astype(np.float32)
    marked = np.arange(64) % 9 == 0
    y, taps = routed(spec, block, x[None], None, lambda: marked[None])
    y, keep = y[0], np.asarray(taps["keep"])
    assert keep[marked].all() and not keep.all()
    probability = np.asarray(jax.nn.softmax(x @ np.asarray(block["router"])))
    for t in range(0, 64, 7):
        first, second = np.argsort(-probability[t])[:2]
        w = probability[t, [first, second]] / probability[t, [first, second]].sum()
        f = []
        for e in (first, second):
            gate, up, down = (np.asarray(block["experts"][n][e]) for n in ("gate", "up", "down"))
            f.append((np.asarray(jax.nn.silu(x[t] @ gate)) * (x[t] @ up)) @ down)
        if keep[t, 1]:
            expected = w[0] * f[0] + w[1] * f[1]
        elif policy == "paper":
            expected = f[0]
        else:
            _, slope, intercept = statistics[1]
            expected = w[0] * f[0] + w[1] * (intercept[second] + slope[second] * f[0])
        np.testing.assert_allclose(y[t], expected, atol=2e-5)


def test_served_from_the_artifact(artifact, text_file, model_folder):
    common = dict(seq_len=64, max_tokens=640)
    plain = evaluate(artifact, text_file, budget=2.5, **common)
    for policy in odp.POLICIES:
        facts = evaluate(artifact, text_file, budget=2.5, prune=policy, **common)
        assert 0.1 < facts["experts_pruned"] < 0.2 and plain["experts_pruned"] == 0
        assert facts["perplexity"] != plain["perplexity"]
        none = evaluate(artifact, text_file, budget=2.5, prune=policy, quantile=0.0, **common)
        assert none["experts_pruned"] == 0
        assert abs(none["perplexity"] - plain["perplexity"]) < 1e-3
    dense = evaluate(model_folder, text_file, prune="affine", calibration=text_file, **common)
    assert 0.1 < dense["experts_pruned"] < 0.2
    refined = mcjax.load(artifact, bits=1, prune="affine").refine(bits=3)
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(
        refined(tokens), mcjax.load(artifact, bits=3, prune="affine")(tokens)
    )


def test_stand_ins_are_the_weighted_least_squares(model_folder):
    """Three quarters of numpy's solution, a quarter of the published rule."""
    model = mcjax.load(model_folder)
    decoder = model.module.decoder
    spec, moe = decoder.layers[0].block, weights.of_layer(decoder, model.params, 0)["block"]
    moe = jax.tree.map(lambda a: a.astype(np.float32), moe)
    x = np.random.default_rng(0).normal(size=(2, 400, 96)).astype(np.float32)
    alike = np.ones(400, np.float32)
    seen = [Seen(some, *chosen(spec, moe, some)[:0:-1], alike) for some in x]
    statistics = pruning_statistics(spec, moe["experts"], seen)
    tokens = x.reshape(-1, 96)
    weights_, index = (
        np.concatenate([getattr(s, n) for s in seen]) for n in ("weights", "experts")
    )
    f = np.asarray(apply_experts(spec, moe["experts"], tokens, index.reshape(-1)))
    f = f.reshape(-1, 2, 96)
    mine = index[:, 1] == 2
    first, second, w = f[mine, 0], f[mine, 1], weights_[mine, 1]
    columns = [np.kron(w[:, None], np.eye(96)), (w[:, None] * first).reshape(-1, 1)]
    solution = 0.75 * np.linalg.lstsq(np.hstack(columns), (w[:, None] * second).ravel())[0]
    solution[-1] += 0.25
    np.testing.assert_allclose(statistics.slope[2], solution[-1], atol=2e-3)
    np.testing.assert_allclose(statistics.intercept[2], solution[:-1], atol=2e-3)
    ratio = weights_[:, 1] / weights_[:, 0]
    np.testing.assert_allclose(statistics.ratio[0, 50], np.median(ratio), rtol=1e-5)
