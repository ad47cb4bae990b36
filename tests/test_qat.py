"""Once-QAT: what is trained is what is served; objectives against solvers and by hand."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcjax import bitplane, qat, tree
from mcjax.models.layers import BatchNorm, Conv, Dense

RNG = np.random.default_rng(0)
SPECS = [
    qat.QuantSpec(),
    qat.QuantSpec(widths=(4, 3, 2, 1), group_size=32),
    qat.QuantSpec(widths=(8, 6, 2), group_size=64),
    qat.QuantSpec(widths=(6,)),
    qat.QuantSpec(widths=(1,)),
]


init_quantizer = jax.jit(qat.init_quantizer, static_argnums=1)
freeze = jax.jit(qat.freeze, static_argnums=2)
codes = jax.jit(qat.codes, static_argnums=2)
fake_quant = jax.jit(qat.fake_quant, static_argnums=(2, 3))
unpack = jax.jit(bitplane.unpack)


@pytest.fixture(autouse=True)
def begin():
    """What a test draws does not depend on those before it."""
    global RNG
    RNG = np.random.default_rng(0)


def weight(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_cascade_by_exhaustion():
    code = np.arange(256)
    for high in range(1, 9):
        for low in range(1, high + 1):
            got = np.asarray(qat.cascade(jnp.arange(2**high), high, low))
            np.testing.assert_array_equal(got, code[: 2**high] // 2 ** (high - low))
            for between in range(low, high + 1):
                step = qat.cascade(qat.cascade(jnp.arange(2**high), high, between), between, low)
                np.testing.assert_array_equal(step, got)
    with pytest.raises(ValueError, match="from 2 bits to 3"):
        qat.cascade(jnp.arange(4), 2, 3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(64, 5), (2, 144, 7)])
def test_frozen_is_what_was_trained(spec, shape):
    if spec.group_size == 64 and shape[1] == 144:
        shape = (2, 128, 7)
    w = weight(*shape)
    quantizer = init_quantizer(w, spec)
    # Tables as training leaves them: anywhere, not on storable values.
    quantizer = jax.tree.map(
        lambda a: np.asarray(a) + 0.1 * RNG.normal(size=a.shape).astype("f"), quantizer
    )
    planes = freeze(w, quantizer, spec)
    assert planes.widths == tuple(reversed(spec.widths)) and planes.shape == shape
    code = codes(w, quantizer, spec)
    np.testing.assert_array_equal(unpack(planes.planes), code)
    for k in spec.widths:
        trained = fake_quant(w, quantizer, spec, k)
        served = planes.slice(k).dequantize()
        np.testing.assert_allclose(trained, served, rtol=1e-5, atol=2e-6)  # sums round by program
        prefix = unpack(planes.slice(k).planes)
        np.testing.assert_array_equal(prefix, qat.cascade(code, spec.widths[0], k))


@pytest.mark.parametrize("widths", [(3, 2, 1), (4, 2), (6, 3, 1), (8, 4, 3, 2, 1)])
def test_codes_are_optimal(widths):
    spec = qat.QuantSpec(widths=widths, group_size=32)
    w = weight(32, 3)
    quantizer = init_quantizer(w, spec)
    planes = freeze(w, quantizer, spec)
    top = widths[0]
    counted = [k for k in widths if k <= 4 or k == top]
    cost = 0.0
    for k in counted:
        alpha, offset = (np.asarray(a, np.float64) for a in decode(planes, k))
        values = []
        for c in range(2**k):
            signs = [2 * (c >> (k - 1 - p) & 1) - 1 for p in range(k)]
            values.append(offset[0] + sum(s * alpha[p, 0] for p, s in enumerate(signs)))
        level = np.array(values)[np.arange(2**top) >> (top - k)]  # [codes, d_out]
        cost = cost + 4.0**k * (np.asarray(w)[None] - level[:, None]) ** 2
    got = np.asarray(codes(w, quantizer, spec)).astype(int)
    mine = np.take_along_axis(cost, got[None], axis=0)[0]
    np.testing.assert_allclose(mine, cost.min(axis=0), rtol=1e-3, atol=1e-6)


def decode(planes, k):
    from mcjax import tables

    return tables.decode(planes.tables[planes.widths.index(k)], k)


def test_jit_equals_eager_equals_vmap():
    spec = qat.QuantSpec(widths=(4, 2), group_size=32)
    w = weight(3, 64, 4)
    quantizer = init_quantizer(w, spec)
    eager = qat.fake_quant(w, quantizer, spec, 2)
    np.testing.assert_allclose(fake_quant(w, quantizer, spec, 2), eager, atol=1e-6)
    each = jax.vmap(lambda w, q: qat.fake_quant(w, q, spec, 2))(w, quantizer)
    np.testing.assert_allclose(each, eager, atol=1e-6)


def test_gradients():
    spec = qat.QuantSpec(widths=(4, 2), group_size=32)
    w = weight(32, 2).at[0, 0].set(50.0)  # far outside the range of the tables
    quantizer = init_quantizer(weight(32, 2), spec)
    pull = weight(32, 2)

    def loss(w, quantizer):
        return jnp.sum(pull * qat.fake_quant(w, quantizer, spec, 2))

    of_w, of_tables = jax.grad(loss, argnums=(0, 1))(w, quantizer)
    alpha, offset = (np.asarray(a) for a in decode(freeze(w, quantizer, spec), 4))
    inside = np.abs(w - offset) <= alpha.sum(axis=0)
    assert not inside[0, 0] and inside.mean() > 0.9
    np.testing.assert_allclose(of_w, np.where(inside, pull, 0), atol=1e-6)
    bits = np.asarray(unpack(freeze(w, quantizer, spec).slice(2).planes)).astype(int)
    steps = np.exp2(np.asarray(quantizer["2"]["steps"]))[:, 0]
    half, ratio = steps.sum(axis=0), np.asarray(quantizer["2"]["offset"])[0]
    for p in range(2):
        sign = 2 * (bits >> (1 - p) & 1) - 1
        by_hand = np.sum(pull * sign, axis=0) + np.sum(pull, axis=0) * ratio
        by_hand = by_hand * steps[p] * np.log(2)
        np.testing.assert_allclose(of_tables["2"]["steps"][p, 0], by_hand, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(
        of_tables["2"]["offset"][0], np.sum(pull, axis=0) * half, rtol=3e-2, atol=1e-3
    )
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(of_tables["4"]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 5))
def test_min_norm_against_a_solver(seed, num, dimension):
    import cvxpy as cp

    vectors = np.random.default_rng(seed).normal(size=(num, dimension)).astype(np.float32)
    vectors += np.random.default_rng(seed + 1).normal(size=dimension).astype(np.float32)
    weights = np.asarray(qat.min_norm(jnp.asarray(vectors @ vectors.T)))
    assert weights.min() >= 0 and abs(weights.sum() - 1) < 1e-5
    x = cp.Variable(num, nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(vectors.T @ x)), [cp.sum(x) == 1])
    problem.solve(solver=cp.CLARABEL)
    scale = (vectors**2).sum(axis=1).mean()
    assert ((vectors.T @ weights) ** 2).sum() <= problem.value + 1e-4 * scale


def test_mgda_descends_every_loss():
    targets = weight(3, 6)

    def losses(p):
        return 0.5 * jnp.sum((p - targets) ** 2, axis=-1), "aux"

    gradient, values, aux, weights, _ = qat.combine(losses, jnp.zeros(6), qat.mgda(), ())
    assert aux == "aux" and values.shape == (3,)
    each = jax.jacobian(lambda p: losses(p)[0])(jnp.zeros(6))
    np.testing.assert_allclose(gradient, weights @ each, rtol=1e-5, atol=1e-6)
    assert (np.asarray(each @ gradient) >= float(gradient @ gradient) - 1e-4).all()


def test_fixed_and_uncertainty_by_hand():
    def losses(p):
        return jnp.stack([3 * p, p**2]), ()

    gradient, values, _, weights, _ = qat.combine(losses, 2.0, *with_state(qat.fixed([1, 10]), 2))
    np.testing.assert_allclose(values, [6, 4])
    np.testing.assert_allclose(gradient, 3 + 10 * 4)
    objective = qat.uncertainty(learning_rate=0.1)
    gradient, _, _, weights, state = qat.combine(losses, 2.0, *with_state(objective, 2))
    np.testing.assert_allclose(weights, [1, 1])
    np.testing.assert_allclose(gradient, 3 + 4)
    np.testing.assert_allclose(state, [0.5, 0.3], rtol=1e-5)  # -0.1 (1 - L)
    with pytest.raises(ValueError, match="must be 2 numbers"):
        qat.fixed([1, 2, 3]).init(2)


def with_state(objective, num):
    return objective, objective.init(num)


def test_cascade_losses_by_hand():
    logits = {8: jnp.array([[2.0, 0.0]]), 1: jnp.array([[0.0, 1.0]])}

    def label(z):
        return -jax.nn.log_softmax(z)[:, 0]

    def at(width, state):
        return logits[width], [*state, width]

    values, (last, seen) = qat.cascade_losses(at, label, (8, 1), [], distill=0.25)
    assert seen == [8, 1] and last is logits[1]
    own = -np.log(np.exp(0) / (1 + np.e))
    soft = np.exp([2, 0]) / np.exp([2, 0]).sum()
    both = -np.log(np.exp([0, 1]) / (1 + np.e))
    np.testing.assert_allclose(values[0], -np.log(soft[0]), rtol=1e-5)
    np.testing.assert_allclose(values[1], 0.75 * own + 0.25 * soft @ both, rtol=1e-5)
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        qat.cascade_losses(at, label, (8, 1), distill=1.5)


def test_sampled_widths():
    drawn = [np.asarray(qat.sample_widths(jax.random.key(i), 5, 3)) for i in range(60)]
    assert all(d[0] == 0 and d[-1] == 4 for d in drawn)
    assert {int(d[1]) for d in drawn} == {1, 2, 3}
    np.testing.assert_array_equal(qat.sample_widths(jax.random.key(0), 4, 4), range(4))
    with pytest.raises(ValueError, match="6 of 5"):
        qat.sample_widths(jax.random.key(0), 5, 6)


class Net(nn.Module):
    spec: qat.QuantSpec | None = None
    bits: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = Conv(8, spec=self.spec, bits=self.bits)(x)
        x = jax.nn.relu(BatchNorm(self.spec, self.bits)(x, train))
        x = Conv(8, (3, 3), 2, spec=self.spec, bits=self.bits)(x)
        return Dense(4, spec=self.spec, bits=self.bits)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("act_bits", [None, pytest.param(8, marks=pytest.mark.slow), 6])
def test_layers_train_at_every_width(act_bits):
    spec = qat.QuantSpec(widths=(8, 2, 1), act_bits=act_bits)
    net = Net(spec)
    x = weight(3, 6, 6, 2)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    outs = []
    for bits in (None, 8, 2, 1):
        at = net.clone(bits=bits)
        train = jax.jit(lambda v, x, at=at: at.apply(v, x, True, mutable=["batch_stats"]))
        _, updates = train(variables, x)
        moved = np.asarray(updates["batch_stats"]["BatchNorm_0"]["mean"] != 0).any(axis=1)
        np.testing.assert_array_equal(moved, np.arange(4) == (None, 8, 2, 1).index(bits))
        outs.append(jax.jit(at.apply)(variables, x))
    errors = [np.abs(y - outs[0]).mean() for y in outs[1:]]
    assert errors[0] < 0.5 * min(errors[1:])
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sum(net.clone(bits=2).apply({**variables, "params": p}, x) ** 2))
    )(variables["params"])
    assert np.abs(gradient["Conv_0"]["kernel"]).max() > 0
    if act_bits == 6:
        assert np.abs(gradient["Conv_1"]["activation_step"]).max() > 0


def test_narrow_activations_train():
    """Steps of 4-bit activations are learned, and what was trained is what is served."""
    spec = qat.QuantSpec(widths=(4, 2, 1), act_bits=4)
    net = Net(spec)
    labels = jnp.arange(64) % 4
    x = weight(4, 6, 6, 2)[labels] + 0.7 * weight(64, 6, 6, 2)  # four classes
    variables = jax.jit(net.init)(jax.random.key(0), x)
    optimiser = optax.sgd(0.05, momentum=0.9)

    def losses(params, stats):
        def at(bits, stats):
            variables = {"params": params, "batch_stats": stats}
            logits, new = net.clone(bits=bits).apply(variables, x, True, mutable=["batch_stats"])
            return logits, new["batch_stats"]

        loss = partial(optax.softmax_cross_entropy_with_integer_labels, labels=labels)
        values, (_, stats) = qat.cascade_losses(at, loss, spec.widths, stats)
        return jnp.sum(values), (values, stats)

    def step(state, _):
        params, stats, moments = state
        gradient, (values, stats) = jax.grad(losses, has_aux=True)(params, stats)
        update, moments = optimiser.update(gradient, moments)
        return (optax.apply_updates(params, update), stats, moments), values

    params = variables["params"]
    start = (params, variables["batch_stats"], optimiser.init(params))
    (params, stats, _), values = jax.jit(lambda s: jax.lax.scan(step, s, length=60))(start)
    assert (values[0] > 1).all() and (values[-1] < 0.3).all(), values[[0, -1]]
    for name in ("Conv_0", "Conv_1", "Dense_0"):
        before, after = (float(p[name]["activation_step"]) for p in (variables["params"], params))
        assert after > 0 and abs(after / before - 1) > 1e-4, (name, before, after)

    planes = tree.freeze_tree(params, spec)
    for bits in spec.widths:
        apply = jax.jit(net.clone(bits=bits).apply)
        trained = apply({"params": params, "batch_stats": stats}, x)
        apply = jax.jit(Net(dataclasses.replace(spec, frozen=True), bits).apply)
        served = apply({"params": tree.slice_tree(planes, bits), "batch_stats": stats}, x)
        # A sum that two programs round apart may land on either side of a level, but rarely.
        equal = np.isclose(served, trained, rtol=1e-4, atol=1e-4).all(axis=-1)
        assert equal.mean() > 0.9, bits


def test_activations_by_hand():
    x = jnp.array([[1.0, -0.5, 0.26]])
    got = qat.fake_quant_activations(x, 8)
    np.testing.assert_allclose(got, np.round(np.asarray(x) * 127) / 127, rtol=1e-6)
    got = qat.fake_quant_activations(x, 3, jnp.float32(0.3))
    np.testing.assert_allclose(got, [[0.9, -0.6, 0.3]], rtol=1e-6)
    slope = jax.grad(lambda x: qat.fake_quant_activations(x, 3, jnp.float32(0.3)).sum())(x)
    np.testing.assert_allclose(slope, [[0.0, 1.0, 1.0]], atol=1e-6)  # 1.0 is beyond 3 steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (1, 2)}, "must descend"),
        ({"widths": (4, 4)}, "must descend"),
        ({"widths": ()}, "must descend"),
        ({"widths": (9, 1)}, "1 to 8"),
        ({"act_bits": 1}, "None or 2 to 8"),
    ],
)
def test_bad_specs(values, message):
    with pytest.raises(ValueError, match=message):
        qat.QuantSpec(**values)


def test_bad_widths():
    spec = qat.QuantSpec(widths=(4, 2))
    x = weight(3, 32)
    for bits in (8, 3):
        with pytest.raises(ValueError, match=f"bits {bits} is not one of the widths"):
            Dense(4, spec=spec, bits=bits).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="has no QuantSpec"):
        Dense(4, bits=2).init(jax.random.key(0), x)
