"""Loading reads only what a budget needs, and serves exactly what the full artifact holds."""

import gc

import jax
import numpy as np
import pytest
import tensorstore as ts

import mcjax

TOKENS = np.arange(24).reshape(2, 12)


def bytes_from_disk():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(v["value"] for m in metrics for v in m["values"])


@pytest.mark.parametrize("precision", [{"bits": 1}, {"budget": 2.0}, {"bits": 3}])
def test_slice_from_disk_equals_slice_in_memory(artifact, precision):
    model, full = mcjax.load(artifact, **precision), mcjax.load(artifact, bits=3)
    own, every = (m.params["segment_0"]["layer_0"]["block"]["experts"] for m in (model, full))
    for name, planes in own.items():
        tap = "expert_hidden" if name == "down" else "expert_input"
        widths = np.stack([model.widths[i, tap] for i in range(2)])
        np.testing.assert_array_equal(planes.allocation, widths)
        codes = [np.asarray(s.codes()) for s in planes.stacks]
        whole = np.asarray(every[name].stacks[0].codes())
        for n, (i, e) in enumerate(np.ndindex(*widths.shape)):
            cut = whole[n] >> (3 - widths[i, e])
            np.testing.assert_array_equal(codes[planes.stack[i, e]][planes.slot[i, e]], cut)
    assert np.isfinite(model(TOKENS)).all()


def test_refined_equals_loaded_and_reads_only_the_difference(artifact):
    low, high = mcjax.load(artifact, budget=1.5), mcjax.load(artifact, bits=3)
    refined = low.refine(bits=3)
    jax.tree.map(np.testing.assert_array_equal, refined.params, high.params)
    np.testing.assert_array_equal(refined(TOKENS), high(TOKENS))
    assert refined.bytes_read - low.bytes_read < high.expert_bytes_read
    again = refined.refine(bits=3)
    assert again.bytes_read == refined.bytes_read


def test_refining_up_and_down_equals_loading(artifact):
    model = mcjax.load(artifact, bits=1)
    for precision in ({"budget": 1.5}, {"budget": 2.25}, {"budget": 1.25}, {"bits": 3}):
        model = model.refine(**precision)
        loaded = mcjax.load(artifact, **precision)
        jax.tree.map(np.testing.assert_array_equal, model.params, loaded.params)


def test_changing_budgets_leaves_nothing_behind(artifact):
    """After a round of budgets nothing more is held or compiled, however often they change."""
    model, held, compiled = mcjax.load(artifact, bits=1), [], []
    jax.monitoring.register_event_duration_secs_listener(
        listen := lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    )
    try:
        for _ in range(5):
            for precision in ({"budget": 2.25}, {"bits": 1}):
                model = model.refine(**precision)
                assert np.isfinite(model(TOKENS)).all()
            gc.collect()
            held.append((len(jax.live_arrays()), len(compiled)))
            assert held[-1][1] > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert held[1:] == held[1:2] * 4, held


def test_model_is_a_pytree(artifact):
    model = mcjax.load(artifact, budget=2.0)
    eager = model.module.apply({"params": model.params}, TOKENS)
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, TOKENS), eager, atol=1e-5)


def test_tokens_are_checked_where_concrete(artifact):
    model = mcjax.load(artifact, bits=1)
    np.testing.assert_array_equal(model(TOKENS.tolist()), model(TOKENS))
    for tokens, kind, message in [
        (TOKENS + 10**6, ValueError, r"tokens must be 0 to 299, got 1000000 to 1000023"),
        (jax.numpy.asarray(TOKENS - 1), ValueError, "got -1 to 22"),
        ([[1, 2], [3, 300]], ValueError, "got 1 to 300"),
        ([[1, 2], [3]], ValueError, "rows differ in length"),
        (TOKENS[0], ValueError, r"tokens must be \[B, T\], got 1 dimensions: \(12,\)"),
        (TOKENS.astype(np.float32), TypeError, "tokens must be integers, got float32"),
        (TOKENS > 3, TypeError, "tokens must be integers, got bool"),
    ]:
        with pytest.raises(kind, match=message):
            model(tokens)
    jax.jit(lambda m, t: m(t))(model, TOKENS - 1)  # values are not known when traced


def test_effective_bits_count_the_tables(artifact):
    model = mcjax.load(artifact, bits=2)
    assert model.average_bits == 2
    assert model.effective_bits == 2 + 24 / 32
    weights = 2 * 5 * 3 * 96 * 256
    assert model.expert_bytes_read == weights * model.effective_bits / 8


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_reads_what_the_precision_needs_and_hardly_more(artifact, bits):
    before = bytes_from_disk()
    model = mcjax.load(artifact, bits=bits)
    assert bytes_from_disk() - before <= 1.05 * model.bytes_read
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    places = 3 * 2 * model.allocation.size * 4  # of gate, up and down: stack and slot, int32
    assert model.bytes_read == held - places


@pytest.mark.parametrize(
    "precision, message",
    [
        ({"budget": float("nan")}, "not feasible"),
        ({"budget": 9.0}, "allow"),
        ({"bits": 4}, "not one of"),
        ({"bits": 2, "budget": 2.0}, "not several"),
        ({"allocation": [[1, 2]]}, "allocation must be"),
    ],
)
def test_bad_precisions(artifact, precision, message):
    with pytest.raises(ValueError, match=message):
        mcjax.load(artifact, **precision)
