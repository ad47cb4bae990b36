"""Speculative decoding: the same text, the same distribution, and no more weights."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG

import mcjax
from mcjax import cli, generate, speculate
from mcjax.models.families import describe
from mcjax.sampling import Sampling, filter_logits

PROMPTS = [[5, 9, 12, 7, 88, 3], [200, 41], [17, 17, 230, 4]]


def write(model, prompts, new, draft=None, **options):
    tokens = generate.generate(model.module, model.params, prompts, new, draft=draft, **options)
    return np.stack(list(tokens), axis=1)


@pytest.mark.parametrize(
    ("precision", "bits", "length"),
    [
        ({"budget": 2.5}, 1, 4),
        pytest.param({"bits": 3}, 2, 1, marks=pytest.mark.slow),
        pytest.param({"budget": 1.5}, 1, 7, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_plain_decoding(artifact, precision, bits, length):
    model = mcjax.load(artifact, **precision)
    draft = speculate.self_draft(model, bits, length)
    tally = speculate.Tally()
    plain = write(model, PROMPTS, 20)
    np.testing.assert_array_equal(write(model, PROMPTS, 20, draft, tally=tally), plain)
    assert 0 < tally.accepted < tally.drafted  # some were accepted and some were not
    np.testing.assert_array_equal(write(model, PROMPTS[2:], 20, draft), plain[2:])


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "affine", "act_bits": 8},
        pytest.param({"prune": "paper"}, marks=pytest.mark.slow),
    ],
)
def test_pruning_and_rounding_go_on(artifact, options):
    model = mcjax.load(artifact, bits=3, **options)
    draft = speculate.self_draft(model, 2, 3)
    plain = write(model, PROMPTS, 12)
    np.testing.assert_array_equal(write(model, PROMPTS, 12, draft), plain)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="drafts round activations on CPU")
def test_rounded_activations_alone_are_a_draft(artifact):
    model = mcjax.load(artifact, bits=2)
    draft, tally = speculate.self_draft(model, 2, 3), speculate.Tally()
    assert (draft.module.act_bits, model.module.act_bits) == (8, None)
    np.testing.assert_array_equal(
        write(model, PROMPTS, 12, draft, tally=tally), write(model, PROMPTS, 12)
    )
    assert tally.acceptance > 0.5
    rounded = mcjax.load(artifact, bits=2, act_bits=8)
    with pytest.raises(ValueError, match="below the widest expert's 2 bits"):
        speculate.self_draft(rounded, 2)


@pytest.mark.parametrize("policy", ["affine", pytest.param("paper", marks=pytest.mark.slow)])
def test_verification_protects_no_token(artifact, policy):
    model = mcjax.load(artifact, bits=3, prune=policy, quantile=0.9)
    apply = partial(jax.jit(model.module.apply), {"params": model.params})
    tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
    _, cache = apply(tokens[:, :6], None, model.module.empty_cache(2, 12))
    together, _ = apply(tokens[:, 6:], jnp.arange(6, 12)[None].repeat(2, 0), cache)
    for t in range(6, 12):
        logits, cache = apply(tokens[:, t : t + 1], jnp.array([[t]] * 2), cache)
        np.testing.assert_allclose(together[:, t - 6], logits[:, 0], atol=1e-4)


@pytest.mark.slow
def test_what_a_cache_held_before_changes_nothing(artifact):
    model = mcjax.load(artifact, bits=3)
    draft = speculate.self_draft(model, 1, 4)
    token, position = np.array([7, 8], np.int32), np.array([3, 5], np.int32)
    _, cache = model.module.apply(
        {"params": model.params},
        np.arange(12).reshape(2, 6),
        None,
        model.module.empty_cache(2, 16),
    )

    def spoiled(leaf):  # [layers, B, KV, 16, head_dim]
        later = np.arange(16)[:, None] >= position[:, None, None, None]
        return jnp.where(later, 1e3, leaf)

    results = []
    for held in (cache, jax.tree.map(spoiled, cache)):
        results.append(
            speculate.step(
                model.module,
                model.params,
                draft.module,
                draft.params,
                token,
                position,
                jax.tree.map(jnp.copy, held),
                jax.random.key(0),
                Sampling(),
                4,
            )
        )
    clean, dirty = results
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    for row, start in enumerate(position):  # where it wrote, and before
        for a, b in zip(jax.tree.leaves(clean[2]), jax.tree.leaves(dirty[2]), strict=True):
            own = np.s_[:, row, :, : start + 5]
            np.testing.assert_allclose(a[own], b[own], atol=1e-5)


def test_an_accurate_draft_is_always_accepted(artifact):
    model = mcjax.load(artifact, bits=3)
    draft = speculate.Draft(module=model.module, params=model.params, length=4)
    tally = speculate.Tally()
    blocks = generate.generate_blocks(
        model.module,
        model.params,
        PROMPTS[:1],
        21,
        sampling=Sampling(temperature=1.0, top_p=0.9),
        draft=draft,
        tally=tally,
    )
    assert [block.shape for block in blocks] == [(1, 1), *[(1, 5)] * 4]
    assert tally.acceptance == 1


def test_draft_shares_the_arrays_of_the_model(artifact):
    model = mcjax.load(artifact, budget=2.5)
    draft = speculate.self_draft(model, 1)
    low, tables = mcjax.load(artifact, bits=1, act_bits=draft.module.act_bits), 0
    every = [m.params["segment_0"]["layer_0"]["block"]["experts"] for m in (model, draft, low)]
    for name, served in every[0].items():
        narrow, stored = every[1][name], every[2][name]
        for t, (stack, cut) in enumerate(zip(served.stacks, narrow.stacks, strict=True)):
            assert cut.planes is stack.planes
            assert cut.tables[-1] is stack.tables[-1]
            assert cut.widths == ((1, stack.bits) if stack.bits > 1 else (1,))
            mine = np.flatnonzero(np.asarray(served.stack) == t)
            np.testing.assert_array_equal(cut.tables[0], stored.stacks[0].tables[0][mine])
            tables += cut.tables[0].nbytes if stack.bits > 1 else 0
    shared = {id(leaf) for leaf in jax.tree.leaves(model.params)}
    own = [leaf for leaf in jax.tree.leaves(draft.params) if id(leaf) not in shared]
    assert sum(leaf.nbytes for leaf in own) == tables
    # A narrow reading is what loading the narrow width alone would give.
    tokens = np.arange(24).reshape(2, 12)
    got = draft.module.apply({"params": draft.params}, tokens)
    np.testing.assert_allclose(got, low(tokens), atol=1e-5)


def test_drafting_copies_no_planes(artifact):
    model = mcjax.load(artifact, bits=3)
    draft = speculate.self_draft(model, 2)
    token, position, key = np.zeros(1, np.int32), np.full(1, 8, np.int32), jax.random.key(0)
    cache = model.module.empty_cache(1, 16)
    experts = model.params["segment_0"]["layer_0"]["block"]["experts"]
    planes = sum(p.nbytes for p in jax.tree.leaves(experts))

    def scratch(lowered):
        return lowered.compile().memory_analysis().temp_size_in_bytes

    plain = generate.decode.lower(
        model.module, model.params, token, position, cache, key, Sampling()
    )
    drafting = jax.jit(speculate.draft_tokens, static_argnums=(0, 6, 7), donate_argnums=4).lower(
        draft.module, draft.params, token, position, cache, key, Sampling(), 4
    )
    assert scratch(drafting) < scratch(plain) + planes / 10


def test_accept_keeps_what_agrees():
    logits = jnp.eye(5)[jnp.array([[3, 1, 4], [3, 1, 4], [3, 1, 4]])]
    drafted = jnp.array([[3, 1], [3, 2], [0, 1]])
    tokens, accepted = speculate.accept(
        jax.random.key(0), drafted, jnp.zeros((3, 2, 5)), logits, Sampling()
    )
    np.testing.assert_array_equal(accepted, [2, 1, 0])
    for row, n in zip(np.asarray(tokens), accepted, strict=True):
        np.testing.assert_array_equal(row[: n + 1], [3, 1, 4][: n + 1])


def chi_square(counts, expected):
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=3),
        Sampling(temperature=1.5, top_p=0.8),
    ],
)
def test_accepted_text_has_the_distribution_of_the_model(sampling):
    """Against every sequence of three tokens of a chain, written by rounds of two drafted ones."""
    vocabulary, samples = 4, 100_000
    p_logits, q_logits = jax.random.normal(jax.random.key(1), (2, vocabulary, vocabulary)) * 1.5

    def round_of_two(key, token):
        keys = jax.random.split(key, 3)
        first = jax.random.categorical(keys[0], filter_logits(q_logits[token], sampling))
        second = jax.random.categorical(keys[1], filter_logits(q_logits[first], sampling))
        before = jnp.stack([token, first, second])
        return speculate.accept(
            keys[2], before[1:], q_logits[before[:2]], p_logits[before], sampling
        )

    def three(key):
        text, length = jnp.zeros(5, jnp.int32), 0  # the two after the third are spare
        for of_round in jax.random.split(key, 3):
            last = jnp.where(length > 0, text[length - 1], 0)
            tokens, accepted = round_of_two(of_round, last)
            text = jax.lax.dynamic_update_slice(jnp.pad(text, (0, 3)), tokens, (length,))[:5]
            length = jnp.minimum(length + accepted + 1, 3)
        return text[:3]

    text = np.asarray(jax.jit(jax.vmap(three))(jax.random.split(jax.random.key(2), samples)))
    p = np.asarray(jax.nn.softmax(filter_logits(p_logits, sampling), axis=-1), np.float64)
    expected = np.einsum("a,ab,bc->abc", p[0], p, p).ravel() * samples
    counts = np.bincount(text @ [16, 4, 1], minlength=64)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    degrees = possible.sum() - 1
    assert chi_square(counts[possible], expected[possible]) < degrees + 4 * (2 * degrees) ** 0.5
    # The test can tell: had drafts been taken as they come, they would have another distribution.
    q = np.asarray(jax.nn.softmax(filter_logits(q_logits, sampling), axis=-1), np.float64)
    wrong = np.einsum("a,ab,bc->abc", q[0], q, q).ravel()[possible] * samples
    assert chi_square(wrong, expected[possible]) > 100 * degrees


@pytest.mark.slow
def test_sampled_text_has_the_distribution_of_the_model(artifact):
    """Many continuations of one prompt, against the probabilities of the forward pass."""
    model = mcjax.load(artifact, bits=3)
    draft = speculate.self_draft(model, 1, 2)
    sampling = Sampling(temperature=1.0, top_k=3)
    samples, prompt = 3000, PROMPTS[1]
    tally = speculate.Tally()
    text = write(model, [prompt] * samples, 3, draft, sampling=sampling, tally=tally)
    assert 0.1 < tally.acceptance < 0.9

    prefixes, expected = np.array([prompt]), np.ones(1)
    for step in range(1, 4):
        logits = model(prefixes)[:, -1]
        share = np.asarray(jax.nn.softmax(filter_logits(logits, sampling))) * expected[:, None]
        of, token = np.nonzero(share)  # three likeliest tokens after each prefix
        prefixes = np.concatenate([prefixes[of], token[:, None]], axis=1)
        expected = share[of, token]
        counts = [np.sum((text[:, :step] == prefix[-step:]).all(axis=1)) for prefix in prefixes]
        assert sum(counts) == samples
        degrees = len(expected) - 1
        bound = degrees + 4 * (2 * degrees) ** 0.5
        assert chi_square(np.array(counts), expected * samples) < bound


@pytest.mark.parametrize("length", [pytest.param(2, marks=pytest.mark.slow), 16])
def test_stop_tokens(artifact, length):
    model = mcjax.load(artifact, bits=3)
    draft = speculate.self_draft(model, 2, length)
    free = write(model, PROMPTS, 9)
    np.testing.assert_array_equal(write(model, PROMPTS, 9, draft), free)
    for stop in {int(free[0, 0]), int(free[0, 3]), int(free[1, 4]), int(free[2, 8])}:
        for prompts in (PROMPTS, PROMPTS[:1]):
            plain = write(model, prompts, 9, stop_tokens=[stop])
            np.testing.assert_array_equal(
                write(model, prompts, 9, draft, stop_tokens=[stop]), plain
            )


@pytest.mark.parametrize(("prompt", "new"), [([5, 9], 1), (list(range(50)), 14)])
def test_few_tokens_and_the_last_positions(artifact, prompt, new):
    model = mcjax.load(artifact, bits=3)
    draft = speculate.self_draft(model, 2, 5)
    got = write(model, [prompt], new, draft)
    assert got.shape == (1, new)
    np.testing.assert_array_equal(got, write(model, [prompt], new))


@pytest.mark.slow
def test_sliding_window(artifact):
    model = mcjax.load(artifact, bits=3)
    windowed = describe(CONFIG | {"sliding_window": 4})[1]
    model = dataclasses.replace(model, module=model.module.clone(decoder=windowed))
    draft = speculate.self_draft(model, 2, 3)
    np.testing.assert_array_equal(write(model, PROMPTS, 15, draft), write(model, PROMPTS, 15))


@pytest.mark.slow
def test_any_model_can_draft(artifact, model_folder):
    source = mcjax.load(model_folder)
    dense, params = source.module, source.params
    served = mcjax.load(artifact, bits=2)
    draft = speculate.Draft(module=served.module, params=served.params, length=3)
    got = np.stack(list(generate.generate(dense, params, PROMPTS, 10, draft=draft)), axis=1)
    plain = np.stack(list(generate.generate(dense, params, PROMPTS, 10)), axis=1)
    np.testing.assert_array_equal(got, plain)


def test_command(artifact, model_folder, capsys):
    def run(*arguments):
        capsys.readouterr()
        status = cli.main(["generate", *map(str, arguments)])
        return status, capsys.readouterr()

    common = ("--prompt", "bame kort", "--max-new-tokens", 12)
    drafting = (*common, "--draft-bits", 1, "--draft-length", 3)
    plain = json.loads(run(artifact, *common, "--odp", "--json")[1].out)
    facts = json.loads(run(artifact, *drafting, "--odp", "--json")[1].out)
    assert facts["texts"] == plain["texts"] and facts["new_tokens"] == plain["new_tokens"]
    assert plain["acceptance"] is None and 0 <= facts["acceptance"] <= 1
    status, streamed = run(artifact, *drafting, "--odp")
    assert status == 0 and streamed.out == "bame kort" + plain["texts"][0] + "\n"
    assert "% of drafted tokens accepted" in streamed.err
    stop = plain["texts"][0].strip()[2:4]
    text = plain["texts"][0]
    status, cut = run(artifact, *drafting, "--odp", "--stop", stop)
    assert cut.out == "bame kort" + text[: text.index(stop)] + "\n"
    sampled = (*drafting, "--temperature", 1, "--top-k", 50, "--json")
    texts = [
        json.loads(run(artifact, *sampled, "--seed", seed)[1].out)["texts"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    for message, arguments in [
        (
            "must be below the widest expert's 2 bits",
            (artifact, *common, "--draft-bits", 2, "--bits", 2, "--act-bits", 8),
        ),
        ("not one of this artifact's widths (1, 2, 3)", (artifact, *common, "--draft-bits", 0)),
        ("not one of this artifact's widths", (artifact, *common, "--draft-bits", 4)),
        ("1 to 16, got 0", (artifact, *common, "--draft-bits", 1, "--draft-length", 0)),
        ("needs --draft-bits", (artifact, *common, "--draft-length", 2)),
        ("is not an artifact", (model_folder, *common, "--draft-bits", 2)),
    ]:
        status, captured = run(*arguments)
        assert status == 1 and message in captured.err, captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
