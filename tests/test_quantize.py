"""The quantiser against literal transcriptions, brute force and dedicated GPTQ."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mcjax
from mcjax import baseline
from mcjax.quantize import gptq, nested
from mcjax.quantize.gptq import grid, round_to_grid
from mcjax.quantize.gram import condition, pad


def problem(d_in, d_out, tokens=2048, seed=0):
    """Heavy-tailed weights and correlated inputs with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d_in, d_in)) * np.exp(-np.arange(d_in) / (d_in / 6))[:, None]
    x = rng.normal(size=(tokens, d_in)) @ mix + 0.3 * rng.normal(size=(tokens, d_in))
    w = rng.standard_t(5, size=(d_in, d_out)) * 0.03
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def error(w, x, approximation):
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    change = y - np.asarray(x, np.float64) @ np.asarray(approximation, np.float64)
    return np.sum(change**2) / np.sum(y**2)


def test_gptq_equals_its_transcription():
    w, x = problem(64, 3)
    gram = condition(x.T @ x)
    got = gptq(w, gram, bits=3, group_size=32)

    # Frantar et al., algorithm 1, one feature at a time in float64.
    rest = np.array(w, np.float64)
    factor = np.linalg.cholesky(np.linalg.inv(np.asarray(gram, np.float64))).T
    expected = np.zeros_like(rest)
    for i in range(64):
        if i % 32 == 0:
            low, step = grid(jnp.asarray(rest[i : i + 32], jnp.float32), 3)
        expected[i] = round_to_grid(jnp.asarray(rest[i], jnp.float32), low, step, 3)
        rest[i:] -= np.outer(factor[i, i:], (rest[i] - expected[i]) / factor[i, i])
    # One rounding may fall the other way in float32.
    assert np.mean(np.abs(np.asarray(got) - expected) > 1e-4) < 0.02


def test_feedback_pass_equals_its_transcription():
    w, x = problem(64, 4)
    gram, widths, lambdas = condition(x.T @ x), (1, 2, 3), np.array([1.0, 3.0, 9.0])
    _, tables = nested.initial_tables(w, jnp.diagonal(gram), widths, jnp.asarray(lambdas), 32)
    factor = nested.inverse_factor(gram)
    got = np.asarray(nested.feedback_pass(w, factor, tables, widths, jnp.asarray(lambdas), 32))

    factor = np.linalg.cholesky(np.linalg.inv(np.asarray(gram, np.float64))).T
    copies = np.repeat(np.asarray(w, np.float64)[None], 3, axis=0)
    expected = np.zeros((64, 4), int)
    for i, o in itertools.product(range(64), range(4)):
        levels = [np.asarray(v) for v in nested._levels(tables[i // 32], widths)]
        cost = [
            sum(
                lam * (copies[k, i, o] - levels[k][code >> (2 - k), o]) ** 2
                for k, lam in enumerate(lambdas)
            )
            for code in range(8)
        ]
        code = expected[i, o] = int(np.argmin(cost))
        for k in range(3):
            e = (copies[k, i, o] - levels[k][code >> (2 - k), o]) / factor[i, i]
            copies[k, i:, o] -= factor[i, i:] * e
    assert np.mean(got != expected) < 0.02


def objective(w, gram, codes, tables, widths, lambdas):
    values = np.asarray(nested.matrix_values(codes, tables, widths), np.float64)
    gap = np.asarray(w, np.float64)[:, None] - values
    return np.einsum("k,iko,ij,jko->o", lambdas, gap, np.asarray(gram, np.float64), gap)


def test_descent_never_raises_the_objective():
    w, x = problem(64, 8)
    gram, widths, lambdas = condition(x.T @ x), (1, 2, 3, 4), jnp.array([1.0, 3.0, 9.0, 27.0])
    codes, tables = nested.initial_tables(w, jnp.diagonal(gram), widths, lambdas, 32)
    before = objective(w, gram, codes, tables, widths, lambdas)
    for _ in range(4):
        codes, tables = nested.descend(w, gram, codes, tables, widths, lambdas, 32, 1)
        after = objective(w, gram, codes, tables, widths, lambdas)
        assert (after <= before * (1 + 1e-4)).all()
        before = after


def test_descent_reaches_a_brute_force_optimum_of_single_codes():
    """No single code can be changed to advantage once the sweeps have settled."""
    w, x = problem(32, 2)
    gram, widths, lambdas = condition(x.T @ x), (1, 2), jnp.array([1.0, 3.0])
    codes, tables = nested.initial_tables(w, jnp.diagonal(gram), widths, lambdas, 32)
    codes, tables = nested.descend(w, gram, codes, tables, widths, lambdas, 32, 60)
    best = objective(w, gram, codes, tables, widths, lambdas)
    for i, code in itertools.product(range(32), range(4)):
        changed = objective(w, gram, codes.at[i].set(code), tables, widths, lambdas)
        assert (changed >= best * (1 - 1e-4)).all()


def test_close_to_the_brute_force_optimum_at_one_bit():
    """All 2^10 codes of ten features that matter, each with its own least-squares table."""
    rng = np.random.default_rng(1)
    x = np.zeros((200, 32), np.float32)
    x[:, :10] = rng.normal(size=(200, 10)) @ rng.normal(size=(10, 10))
    w = np.zeros((32, 1), np.float32)
    w[:10, 0] = rng.normal(size=10)
    y = x[:, :10] @ w[:10, 0]
    best = min(
        np.linalg.lstsq(design, y, rcond=None)[1][0]
        for bits in itertools.product((-1.0, 1.0), repeat=10)
        if (design := np.stack([x[:, :10] @ np.array(bits), x[:, :10].sum(1)], 1)).any()
        and np.linalg.matrix_rank(design) == 2
    )
    planes = mcjax.quantize(jnp.asarray(w), bits=1, gram=jnp.asarray(x.T @ x), damping=1e-4)
    mine = np.sum((y - x @ np.asarray(planes.dequantize())[:, 0]) ** 2)
    assert best * 0.999 <= mine <= 1.5 * best


def test_one_code_beats_dedicated_gptq_at_low_widths():
    w, x = problem(256, 64)
    gram = x.T @ x
    planes = mcjax.quantize(
        w, bits=3, group_size=64, gram=gram, weights=(1.0, 3.0, 9.0), damping=0.01
    )
    dedicated = [error(w, x, gptq(w, condition(gram), bits=k, group_size=64)) for k in (1, 2, 3)]
    nested_error = [error(w, x, planes.slice(k).dequantize()) for k in (1, 2, 3)]
    assert all(a < b for a, b in zip(nested_error, dedicated, strict=True)), nested_error


def test_a_dedicated_model_of_odd_sizes():
    """The baseline too fills up a last group."""
    w, x = problem(112, 8)
    made = [baseline._quantize(jnp.asarray(w), x.T @ x, k, 128) for k in (2, 4)]
    errors = [error(w, x, value) for value in made]
    assert made[0].shape == w.shape and errors[1] < errors[0] / 4


def test_64_bit_mode_changes_nothing():
    w, x = problem(64, 8)
    usual = mcjax.quantize(w, bits=5, group_size=32, gram=x.T @ x)
    with jax.enable_x64(True):
        made = mcjax.quantize(w, bits=5, group_size=32, gram=x.T @ x)
    assert [leaf.dtype for leaf in jax.tree.leaves(made)] == [
        leaf.dtype for leaf in jax.tree.leaves(usual)
    ]
    one, other = (error(w, x, planes.dequantize()) for planes in (usual, made))
    assert abs(one - other) < 1e-3 * one


def test_planes_past_the_fourth_cost_the_first_four_nothing():
    w = jax.random.normal(jax.random.key(0), (512, 128))
    gram = jnp.eye(512)

    def squared(bits):
        planes = mcjax.quantize(w, bits, 64, gram, damping=0)
        each = (planes.slice(k).dequantize() for k in planes.widths)
        return np.array([np.mean((np.asarray(w) - np.asarray(at)) ** 2) for at in each])

    of_four, of_eight = squared(4), squared(8)
    assert (np.diff(of_eight) < 0).all(), of_eight
    assert (of_eight[:4] <= 1.02 * of_four).all(), of_eight[:4] / of_four


def test_without_gram_codes_are_the_nearest():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)), jnp.float32)
    planes = mcjax.quantize(w, bits=3, group_size=32, widths=(3,))
    codes, values = np.asarray(planes.codes()), np.asarray(planes.dequantize())
    for g in range(2):
        levels = np.asarray(nested._levels(planes.tables[0][:, g, None], (3,))[0])
        rows = slice(32 * g, 32 * g + 32)
        gap = np.abs(np.asarray(w)[rows, None] - levels[None])
        np.testing.assert_allclose(
            np.abs(np.asarray(w)[rows] - values[rows]), gap.min(axis=1), rtol=1e-4, atol=1e-5
        )
    assert codes.max() < 8


def test_jit_eager_and_vmap_agree():
    w, x = problem(64, 8)
    w = jnp.stack([w, 2 * w, w[::-1]])
    gram = jnp.stack([x.T @ x] * 3)

    def run(w, gram):
        return mcjax.quantize(w, bits=2, group_size=32, gram=gram)

    whole = run(w, gram).dequantize()
    np.testing.assert_allclose(jax.jit(run)(w, gram).dequantize(), whole, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(w, gram).dequantize(), whole, atol=2e-2)
    with jax.disable_jit(False):
        alone = jnp.stack([run(w[e], gram[e]).dequantize() for e in range(3)])
    assert np.mean(np.abs(alone - whole) > 1e-4) < 0.02


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scale_of_the_weights_hardly_matters(scale, bits):
    w, x = problem(64, 8)
    planes = mcjax.quantize(w / 0.03 * scale, bits=bits, gram=x.T @ x, widths=(bits,))
    limit = {2: 0.1, 4: 0.01, 8: 2e-4}[bits]
    assert error(w / 0.03 * scale, x, planes.dequantize()) < limit


def test_dead_inputs_and_zero_weights():
    w, x = problem(64, 4)
    planes = mcjax.quantize(w, bits=2, gram=jnp.zeros((64, 64)))
    assert np.isfinite(planes.dequantize()).all()
    nearest = mcjax.quantize(w, bits=2)
    np.testing.assert_allclose(
        error(w, jnp.eye(64), planes.dequantize()),
        error(w, jnp.eye(64), nearest.dequantize()),
        rtol=0.2,
    )
    assert (mcjax.quantize(jnp.zeros((64, 4)), bits=3).dequantize() == 0).all()
    half_dead = x.at[:, 32:].set(0)
    planes = mcjax.quantize(w, bits=3, gram=half_dead.T @ half_dead)
    assert error(w, half_dead, planes.dequantize()) < 0.05


def test_padding_leaves_the_real_features_alone():
    w, x = problem(144, 4)
    planes = mcjax.quantize(w, bits=4, gram=x.T @ x)
    assert planes.shape == (144, 4) and planes.group_size == 32
    assert error(w, x, planes.dequantize()) < 0.02
    gram = pad(condition(x.T @ x), 160)
    assert (np.linalg.eigvalsh(np.asarray(gram)) > 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": 0}, "bits must be 1 to 8"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"bits": 2, "widths": (2, 1)}, "widths must ascend"),
        ({"bits": 2, "weights": (1.0,)}, "2 positive numbers"),
        ({"group_size": 48}, "groups of 48"),
        ({"gram": jnp.zeros((3, 3))}, "does not fit"),
        ({"gram": jnp.full((64, 64), jnp.nan)}, "gram holds 4096 NaN"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mcjax.quantize(jnp.ones((64, 4)), **arguments)


def test_bad_weights():
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="w holds 1 NaN or infinite"):
            mcjax.quantize(jnp.ones((64, 4)).at[3, 2].set(bad))
    with pytest.raises(ValueError, match="w has a magnitude of 1000000"):
        mcjax.quantize(jnp.full((64, 4), 1e6))
    with pytest.raises(ValueError, match="must be float"):
        mcjax.quantize(jnp.ones((64, 4), int))


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 64 * 5, 64 * 24 * 2])
def test_chunks_change_nothing(chunk):
    problems = [problem(64, 24, seed=seed) for seed in range(3)]
    w = jnp.stack([w for w, _ in problems])
    gram = jnp.stack([x.T @ x for _, x in problems])
    whole = mcjax.quantize(w, 2, 32, gram, sweeps=2)
    parts = mcjax.quantize(w, 2, 32, gram, sweeps=2, chunk=chunk)
    # Sums in another order may move a choice between two codes as good.
    assert np.mean(np.asarray(whole.planes) != parts.planes) < 0.01
    for k in (1, 2):
        a, b = whole.slice(k).dequantize(), parts.slice(k).dequantize()
        for e, (w_e, x) in enumerate(problems):
            np.testing.assert_allclose(error(w_e, x, a[e]), error(w_e, x, b[e]), rtol=1e-3)


@pytest.mark.parametrize("size", [32, 96, 160])
def test_inverse_factor(size):
    x = np.random.default_rng(size).normal(size=(3, 2 * size, size)).astype(np.float32)
    gram = np.einsum("eti,etj->eij", x, x)
    got = jax.vmap(nested.inverse_factor)(gram)
    for own, factor in zip(gram.astype(np.float64), got, strict=True):
        expected = np.linalg.cholesky(np.linalg.inv(own)).T
        np.testing.assert_allclose(factor, expected, atol=1e-6 * np.abs(expected).max() * size)


def test_no_program_calls_lapack():
    """Two calls at once, of two programs or one, wait for ever for two threads; see there."""
    w = jax.ShapeDtypeStruct((3, 64, 24), jnp.float32)
    gram = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32)
    text = jax.jit(lambda w, g: mcjax.quantize(w, 2, 32, g)).lower(w, gram).as_text()
    assert "lapack" not in text


def test_chunks_bound_the_memory():
    shape = jax.ShapeDtypeStruct((8, 64, 512), jnp.float32)
    gram = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)

    def held(chunk):
        function = jax.jit(lambda w, g: mcjax.quantize(w, 2, 32, g, chunk=chunk))
        return function.lower(shape, gram).compile().memory_analysis().temp_size_in_bytes

    assert held(64 * 128) < held(64 * 512 * 8) / 4


def test_a_chunk_must_hold_a_weight():
    with pytest.raises(ValueError, match="at least 1 weight, got 0"):
        mcjax.quantize(jnp.ones((32, 4)), chunk=0)


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (2, 8), (3,)])
def test_nearest_code_is_the_best_to_the_last_bits_of_its_cost(widths):
    rng = np.random.default_rng(0)
    bits = widths[-1]
    levels = [rng.normal(size=(2**k, 50)).astype(np.float32) for k in widths]
    target = rng.normal(size=(len(widths), 50)).astype(np.float32)
    lambdas = 4.0 ** np.arange(len(widths), dtype=np.float32)
    code = np.asarray(jax.jit(nested._nearest)(target, levels, lambdas))
    cost = sum(
        lam * (t - np.repeat(level, 2 ** (bits - k), axis=0).astype(np.float64)) ** 2
        for lam, t, level, k in zip(lambdas, target, levels, widths, strict=True)
    )
    mine = np.take_along_axis(cost, code[None], axis=0)[0]
    assert (mine <= cost.min(axis=0) * (1 + 2.0 ** (bits - 22)) + 1e-12).all()


@pytest.mark.parametrize("widths", [(4, 8), (1, 2, 3, 4)])
def test_batch_of_one_is_quantised_as_its_matrix(widths):
    # XLA once multiplied and summed wrongly where a batch of one had been dropped from a shape.
    w, x = problem(128, 256)
    gram, lambdas = condition(x.T @ x), jnp.ones(len(widths))

    def quantised(w, gram):
        codes, tables = nested.initial_tables(w, jnp.diagonal(gram), widths, lambdas, 128)
        codes, tables = nested.descend(w, gram, codes, tables, widths, lambdas, 128, sweeps=1)
        return nested.matrix_values(codes, tables, widths)

    alone = jax.jit(quantised)(w, gram)
    batched = jax.jit(jax.vmap(quantised))(w[None], gram[None])[0]
    assert np.mean(np.abs(alone - batched) > 1e-6) < 1e-3


def test_sums_of_rows_agree_on_every_platform(monkeypatch):
    rows = jnp.arange(12.0).reshape(6, 2), jnp.arange(6.0)

    def sums():
        return nested._sum_rows(lambda row: (row[0] * row[1], row[0][:1]), rows)

    one_by_one = sums()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at_once = sums()
    np.testing.assert_array_equal(one_by_one[0], at_once[0])
    np.testing.assert_array_equal(one_by_one[1], [30])
    np.testing.assert_array_equal(one_by_one[1], at_once[1])
