"""Every family as an artifact: compressed, loaded, refined, pruned, drafted, resumed."""

import warnings
from functools import partial

import jax
import numpy as np
import pytest
from small_models import SIZES, small_config, small_model, with_tokenizer
from test_families import error

import mcjax
from mcjax import allocate, checkpoint, compress, generate, quantize_layer, serving, speculate
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.evaluate import evaluate
from mcjax.models.decoder import Delta, Routed

COMMON = dict(max_bits=8, samples=6, seq_len=24, effort="fast")
PROMPTS = [[5, 9, 12, 7, 50, 3], [20, 41], [17, 17, 23, 4]]


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 20), np.int32)


KINDS = ("deepseek_v3", "gemma3", "qwen3_next", "lfm2_moe")
"""One of each kind: latent, dense with windows, recurrent, convolutional."""

SLOW = ("deepseek_v32", "llama4", "llama", "mixtral", "qwen3_moe", "gpt_oss")
"""Indexed, chunked and plain ones, and those that other tests have: run with `pytest -m slow`."""

RESUMED = ("deepseek_v3", "qwen3_next")
"""Those that are killed in the midst, with the shared experts and states that others lack."""

OWN_BLOCKS = ("deepseek_v32", "gemma4")
"""Of the others, those that differ most in what is quantised or measured; the rest are slow too."""


def made(name, folder, text_file):
    """A family's folder with a tokenizer, and its artifact."""
    model = with_tokenizer(small_model(folder / "model", name), text_file)
    compress.compress(model, folder / "artifact", text_file, **COMMON)
    return model, folder / "artifact"


@pytest.fixture(
    scope="module", params=[*KINDS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def case(request, tmp_path_factory, text_file):
    return made(request.param, tmp_path_factory.mktemp("family"), text_file)


def eight_bits_are_nearly_the_model(folder, out, text_file):
    common = dict(seq_len=24, max_tokens=2400)
    served = evaluate(out, text_file, attention_bits=8, **common)
    dense = evaluate(folder, text_file, **common)
    assert served["average_bits"] == 8
    assert abs(served["perplexity"] / dense["perplexity"] - 1) < 0.08


def test_eight_bits_are_nearly_the_model(case, text_file):
    eight_bits_are_nearly_the_model(*case, text_file)


@pytest.mark.parametrize(
    "name",
    [
        name if name in OWN_BLOCKS else pytest.param(name, marks=pytest.mark.slow)
        for name in SIZES
        if name not in KINDS
    ],
)
def test_eight_bits_of_the_others(name, tmp_path, text_file):
    eight_bits_are_nearly_the_model(*made(name, tmp_path, text_file), text_file)


def test_planes_are_what_they_dequantise_to(case):
    _, out = case
    model = mcjax.load(out, budget=2.5)
    dense = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, BitPlanes | MixedPlanes) else w,
        model.params,
        is_leaf=lambda w: isinstance(w, BitPlanes | MixedPlanes),
    )
    expected = jax.jit(model.module.apply)({"params": dense}, TOKENS)
    assert error(model(TOKENS), np.asarray(expected)) < 1e-4


def test_budgets_and_refining(case):
    _, out = case
    low = mcjax.load(out, budget=2.5)
    assert 2 < low.average_bits <= 2.5
    for precision in ({"budget": 4.5}, {"budget": 3.25}):
        refined, loaded = low.refine(**precision), mcjax.load(out, **precision)
        jax.tree.map(np.testing.assert_array_equal, refined.params, loaded.params)
    assert np.isfinite(refined(TOKENS)).all()
    # In bytes, attention and all else too; as many as before are enough for as little loss.
    budget = loaded.bytes_read
    refined, loaded = refined.refine(budget=f"{budget}B"), mcjax.load(out, budget=f"{budget}B")
    assert 0.9 * budget < loaded.bytes_read <= budget
    jax.tree.map(np.testing.assert_array_equal, refined.params, loaded.params)
    reader = checkpoint.ArtifactReader(out)
    loss = partial(allocate.predicted_loss, reader.decoder, reader.manifest)
    assert loss(loaded.widths) <= loss(mcjax.load(out, budget=3.25).widths)


def test_pruning(case):
    _, out = case
    plain = mcjax.load(out, bits=4)
    routed = [s for s in plain.module.decoder.layers if isinstance(s.block, Routed)]
    skippable = any(s.block.routing.top_k > 1 for s in routed)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if skippable else "ignore")
        model = mcjax.load(out, bits=4, prune="affine", quantile=0.9)
    run = jax.jit(partial(plain.module.apply, mutable=["keep"]))
    logits, seen = run({"params": model.params}, TOKENS)
    kept = jax.tree.leaves(seen)
    assert bool(kept) == skippable
    if skippable:
        assert sum(k.shape[0] for k in kept) == len(routed)
        assert 0.1 < np.mean([np.mean(~np.asarray(k)) for k in kept]) < 0.9
        assert np.isfinite(logits).all()
    expected = np.asarray(run({"params": plain.params}, TOKENS)[0])
    for policy in ("affine", "paper"):
        none = mcjax.load(out, bits=4, prune=policy, quantile=0.0)
        assert error(run({"params": none.params}, TOKENS)[0], expected) < 1e-4


def test_drafts_change_nothing(case):
    """Few planes draft, many are refused, and a recurrent state is then what it was."""
    _, out = case
    model = mcjax.load(out, bits=8, attention_bits=8)
    draft, tally = speculate.self_draft(model, 1, 3), speculate.Tally()
    common = model.module, model.params, PROMPTS, 14
    plain = np.stack(list(generate.generate(*common)), axis=1)
    drafted = np.stack(list(generate.generate(*common, draft=draft, tally=tally)), axis=1)
    np.testing.assert_array_equal(drafted, plain)
    assert tally.accepted < tally.drafted


@pytest.mark.parametrize(
    "case",
    [n if n in RESUMED else pytest.param(n, marks=pytest.mark.slow) for n in (*KINDS, *SLOW)],
    indirect=True,
)
def test_a_killed_run_goes_on(case, text_file, monkeypatch):
    folder, out = case
    again = out.parent / "again"
    save, calls = checkpoint.save_tree, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress.compress(folder, again, text_file, **COMMON, resume=True)
    monkeypatch.undo()
    compress.compress(folder, again, text_file, **COMMON, resume=True)
    first, second = (checkpoint.read_manifest(path) for path in (out, again))
    assert first == second
    assert checkpoint.verify(checkpoint.ArtifactReader(again)) > 0


def test_families_differ_as_they_should():
    """The kinds of structure that the cases above are about are all there."""
    from mcjax.models.families import describe

    layers = [layer for name in KINDS for layer in describe(small_config(name))[1].layers]
    assert {type(layer.mixer).__name__ for layer in layers} == {
        "Heads",
        "Latent",
        "Delta",
        "Convolution",
    }
    assert any(isinstance(layer.mixer, Delta) for layer in layers)
    assert {isinstance(layer.block, Routed) for layer in layers} == {True, False}
    assert {layer.norms for layer in layers} == {"before", "both"}
    assert serving.ATTENTION_BITS in quantize_layer.ATTENTION_WIDTHS
