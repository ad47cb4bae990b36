"""Generation: the cache changes nothing, nor does a batch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG

import mcjax
from mcjax import cli, generate, speculate
from mcjax.models.attention import DRAFTED
from mcjax.models.families import describe
from mcjax.sampling import filter_logits

PROMPTS = [[5, 9, 12, 7, 88, 3], [200, 41], [17, 17, 230, 4]]


@pytest.fixture(scope="module")
def dense(model_folder):
    model = mcjax.load(model_folder)
    return model.module, model.params


@pytest.mark.parametrize("window", [None, 5])
def test_cached_equals_full(dense, window):
    module, params = dense
    module = module.clone(decoder=describe(CONFIG | {"sliding_window": window})[1])
    tokens = np.random.default_rng(0).integers(0, 300, (2, 20))
    whole = module.apply({"params": params}, tokens)
    cache = module.empty_cache(2, 24)
    step = jax.jit(module.apply)
    logits, cache = step({"params": params}, tokens[:, :7], None, cache)
    parts = [logits]
    for t in range(7, 20):
        logits, cache = step({"params": params}, tokens[:, t : t + 1], jnp.array([[t]] * 2), cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    assert step._cache_size() == 2  # one prefill, one decoding step


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_prefill_in_chunks(dense, window, chunk):
    module, params = dense
    module = module.clone(decoder=describe(CONFIG | {"sliding_window": window})[1])
    tokens = np.random.default_rng(1).integers(0, 300, (3, 14))
    length = jnp.array([14, 3, 8])
    arguments = module, params, tokens, length
    rest = jax.random.key(0), generate.Sampling()

    def read(chunk):
        return generate.prefill(*arguments, module.empty_cache(3, 20), *rest, chunk)

    (token, cache), (expected, whole) = read(chunk), read(14)
    np.testing.assert_array_equal(token, expected)
    for b, n in enumerate(length):  # slots of padding are overwritten before they are seen
        for own, other in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(own[:, b, :, :n], other[:, b, :, :n], atol=2e-5)


@pytest.mark.parametrize("chunk", [3, 7, 64])
def test_a_ring_of_the_windows_size_is_enough(dense, chunk):
    """Past the window several times over, ragged, in chunks shorter and longer than the ring."""
    module, params = dense
    module = module.clone(decoder=describe(CONFIG | {"sliding_window": 5})[1])
    tokens = np.random.default_rng(3).integers(0, 300, (2, 60))
    whole = module.apply({"params": params}, tokens)
    cache = module.empty_cache(2, 60)
    assert jax.tree.leaves(cache)[0].shape[3] == 5 + DRAFTED
    length = jnp.array([40, 29])
    padded = np.where(np.arange(41)[None] < length[:, None], tokens[:, :41], 0)
    arguments = module, params, padded, length, cache, None, generate.Sampling(), chunk
    token, cache = generate.prefill(*arguments)
    np.testing.assert_array_equal(token, np.argmax(whole[[0, 1], length - 1], axis=-1))
    step = jax.jit(module.apply)
    for i in range(20):
        at = length[:, None] + i
        logits, cache = step({"params": params}, np.take_along_axis(tokens, at, 1), at, cache)
        expected = np.take_along_axis(whole, np.asarray(at)[..., None], axis=1)
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_drafts_in_a_ring(artifact):
    model = mcjax.load(artifact, bits=3)
    windowed = describe(CONFIG | {"sliding_window": 4})[1]
    module = model.module.clone(decoder=windowed)
    model = dataclasses.replace(model, module=module)
    prompts = [list(range(3, 30)), [7, 8, 9]]
    plain = np.stack(list(generate.generate(module, model.params, prompts, 30)), axis=1)
    draft = speculate.self_draft(model, 1, DRAFTED)
    got = list(generate.generate(module, model.params, prompts, 30, draft=draft))
    np.testing.assert_array_equal(np.stack(got, axis=1), plain)


def test_chunks_bound_what_a_prefill_holds(artifact):
    model = mcjax.load(artifact, bits=2)
    long = dataclasses.replace(model.module.decoder, max_position_embeddings=4096)
    module, tokens = model.module.clone(decoder=long), np.zeros((1, 2048), np.int32)

    def held(chunk):
        cache = jax.eval_shape(lambda: module.empty_cache(1, 2048))
        arguments = module, model.params, tokens, jnp.array([2048]), cache, jax.random.key(0)
        lowered = generate.prefill.lower(*arguments, generate.Sampling(), chunk)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert held(128) < held(2048) / 8


def test_a_chunk_must_hold_a_token(dense):
    module, params = dense
    arguments = module, params, np.zeros((1, 3), int), jnp.array([3])
    cache = module.empty_cache(1, 4)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        generate.prefill(*arguments, cache, jax.random.key(0), generate.Sampling(), 0)


def test_every_chunk_protects_a_token(artifact):
    model = mcjax.load(artifact, bits=3, prune="affine", quantile=1.0)
    tokens = np.random.default_rng(2).integers(0, 300, (1, 8))
    cache = model.module.empty_cache(1, 8)
    kept = []
    for start in (0, 4):
        (_, cache), seen = model.module.apply(
            {"params": model.params},
            tokens[:, start : start + 4],
            start + jnp.arange(4)[None],
            cache,
            jnp.array([4]),
            mutable="keep",
        )
        kept += list(jax.tree.leaves(seen)[0])
    for keep in kept:  # bool [4, 2], of both layers and chunks
        assert keep[:, 0].all() and keep[:, 1].sum() >= 1


def test_greedy_is_the_full_forward_pass(artifact):
    model = mcjax.load(artifact, budget=2.5)
    prompt = list(PROMPTS[0])
    got = [int(t[0]) for t in generate.generate(model.module, model.params, [prompt], 8)]
    likeliest = np.argmax(model(np.array([prompt + got]))[0], axis=-1)
    np.testing.assert_array_equal(got, likeliest[len(prompt) - 1 : -1])


@pytest.mark.parametrize("prune", [pytest.param(None, marks=pytest.mark.slow), "affine"])
def test_batch_equals_single_prompts(artifact, prune):
    model = mcjax.load(artifact, bits=3, prune=prune)
    together = np.stack(list(generate.generate(model.module, model.params, PROMPTS, 6)), axis=1)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = list(generate.generate(model.module, model.params, [prompt], 6))
        if prune is None:  # alone, a shorter prompt protects another token
            np.testing.assert_array_equal(np.concatenate(alone), row)
    if prune is not None:
        assert together.shape == (3, 6)


def test_a_narrow_cache_is_half_as_large_and_nearly_as_good(artifact):
    wide, narrow = (mcjax.load(artifact, bits=3, cache_dtype=d) for d in (None, jnp.bfloat16))
    caches = [model.module.empty_cache(2, 32) for model in (wide, narrow)]
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) for cache in caches]
    assert sizes[1] == sizes[0] / 2
    tokens = np.random.default_rng(0).integers(0, 300, (2, 24))
    logits = []
    for model, cache in zip((wide, narrow), caches, strict=True):
        apply = model.module.apply
        _, cache = apply({"params": model.params}, tokens[:, :20], None, cache)
        at = np.broadcast_to(np.arange(20, 24), (2, 4))
        logits.append(apply({"params": model.params}, tokens[:, 20:], at, cache)[0])
    far = np.abs(logits[0] - logits[1]).max(axis=-1) / np.abs(logits[0]).max()
    assert 0 < np.median(far) < 0.02  # a token in eight may well meet another expert


def test_stop_tokens(artifact):
    model = mcjax.load(artifact, bits=3)
    free = np.stack(list(generate.generate(model.module, model.params, PROMPTS, 8)), axis=1)
    stop = int(free[0, 2])
    got = list(generate.generate(model.module, model.params, PROMPTS, 8, stop_tokens=[stop]))
    got = np.stack(got, axis=1)
    for row, whole in zip(got, free, strict=True):
        end = list(whole).index(stop) if stop in whole else len(whole)
        np.testing.assert_array_equal(row[: end + 1], whole[: len(row)][: end + 1])
        assert (row[end:] == stop).all()
    alone = list(generate.generate(model.module, model.params, PROMPTS[:1], 8, stop_tokens=[stop]))
    assert len(alone) == list(free[0]).index(stop) + 1


def test_sampling_filters():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    options = generate.Sampling(temperature=1.0, top_p=0.7)
    np.testing.assert_array_equal(
        np.isfinite(filter_logits(logits, options)), [True, True, False, False]
    )
    options = generate.Sampling(temperature=2.0, top_k=3)
    got = np.asarray(filter_logits(logits, options))
    np.testing.assert_allclose(got[:3], np.asarray(logits)[:3] / 2, rtol=1e-6)
    assert np.isneginf(got[3])
    draws = generate.sample(
        jax.random.key(0), jnp.tile(logits, (20000, 1)), generate.Sampling(temperature=1.0)
    )
    share = np.bincount(np.asarray(draws), minlength=4) / 20000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_only_drawing_needs_a_key():
    logits = jnp.array([0.0, 2.0, 1.0])
    assert generate.sample(None, logits, generate.Sampling()) == 1
    with pytest.raises(ValueError, match=r"temperature 0\.5 needs a key"):
        generate.sample(None, logits, generate.Sampling(temperature=0.5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sliding_window", -4, "sliding_window must be a positive integer"),
        ("sliding_window", "all", "sliding_window must be a positive integer"),
        ("max_position_embeddings", 0, "max_position_embeddings must be a positive"),
        ("num_key_value_heads", 3, "cannot share"),
        ("eos_token_id", 4000, "eos_token_id must be 0 to 299"),
    ],
)
def test_corrupt_cache_settings(model_folder, tmp_path, capsys, field, value, message):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    assert cli.main(["generate", str(tmp_path), "--prompt", "bame"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command(artifact, model_folder, capsys):
    def run(*arguments):
        capsys.readouterr()
        status = cli.main(["generate", *map(str, arguments)])
        return status, capsys.readouterr()

    common = ("--prompt", "bame kort", "--max-new-tokens", 6)
    status, first = run(artifact, *common, "--budget", 2, "--odp")
    assert status == 0 and first.out.startswith("bame kort") and len(first.out) > 10
    sampled = (*common, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--json")
    texts = [
        json.loads(run(artifact, *sampled, "--seed", seed)[1].out)["texts"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    status, _ = run(artifact, *common, "--act-bits", 8)
    assert status == 0
    status, whole = run(model_folder, *common, "--json")
    text = json.loads(whole.out)["texts"][0]
    stop = text.strip()[2:4]
    status, cut = run(model_folder, *common, "--stop", stop)
    assert cut.out == "bame kort" + text[: text.index(stop)] + "\n"
    for message, arguments in [
        ("is empty", (artifact, "--prompt", "")),
        ("exceed the model's 64 positions", (artifact, "--prompt", "bame " * 90)),
        ("at least 1, got 0", (artifact, "--prompt", "x", "--max-new-tokens", 0)),
        ("top_p must be", (artifact, *common, "--temperature", 1, "--top-p", 2)),
        ("need a temperature", (artifact, *common, "--top-k", 2)),
        ("need --odp", (artifact, *common, "--odp-quantile", 0.1)),
        ("0 to 1, got 3", (artifact, *common, "--odp", "--odp-quantile", 3)),
        ("is not an artifact", (model_folder, *common, "--budget", 2)),
    ]:
        status, captured = run(*arguments)
        assert status == 1 and message in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
