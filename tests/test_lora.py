"""Adapters of planes and of arrays: what they add, what trains, what is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_qat import weight
from test_tree import reference

import mcjax
from mcjax import lora, tree, tune
from mcjax.leaves import replaced
from mcjax.ops import Adapted, dense


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 300, (2, 24))


def drawn(adapters):
    """Adapters that do change something."""
    key = iter(jax.random.split(jax.random.key(1), 1000))
    return jax.tree.map(lambda a: 0.1 * jax.random.normal(next(key), a.shape, a.dtype), adapters)


def run(module, params, tokens):
    return module.apply({"params": params}, tokens)


@pytest.mark.parametrize("kind", ["array", "planes", "rotated"])
def test_products_are_those_of_the_sum(kind):
    w, a, b, x = weight(40, 24), weight(40, 3), weight(3, 24), weight(5, 40)
    held = w if kind == "array" else mcjax.quantize(w, 3, rotated=kind == "rotated")
    adapted = Adapted(weight=held, a=a, b=b)
    expected = dense(held) + a @ b
    np.testing.assert_allclose(adapted.dequantize(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mcjax.dot(x, adapted), x @ expected, rtol=1e-3, atol=1e-3)
    mine, theirs = (
        jax.grad(lambda a, b, x, f=f: jnp.sum(jnp.sin(f(a, b, x))), argnums=(0, 1, 2))(a, b, x)
        for f in (
            lambda a, b, x: mcjax.dot(x, Adapted(weight=held, a=a, b=b)),
            lambda a, b, x: x @ (dense(held) + a @ b),
        )
    )
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["array", "planes", "mixed"])
def test_each_expert_has_factors_of_its_own(kind):
    w, a, b = weight(3, 40, 24), weight(3, 40, 2), weight(3, 2, 24)
    index = jnp.asarray([[0, 2], [1, 0], [2, 1], [2, 0]])
    held = w if kind == "array" else mcjax.quantize(w, 3)
    held = held.slice((1, 3, 2)) if kind == "mixed" else held
    x = weight(4, 40)

    def mine(a, b):
        return mcjax.expert_dot(x, Adapted(weight=held, a=a, b=b), index)

    def theirs(a, b):
        return jnp.einsum("td,tkdo->tko", x, (dense(held) + a @ b)[index])

    np.testing.assert_allclose(mine(a, b), theirs(a, b), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(jax.jit(mine)(a, b), mine(a, b), rtol=1e-4, atol=1e-4)
    gradients = (jax.grad(lambda *f, m=m: jnp.sum(jnp.sin(m(*f))), (0, 1))(a, b)
                 for m in (mine, theirs))  # fmt: skip
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)


def test_a_language_model_at_every_width(artifact, model_folder, tokens):
    """One set of adapters for two widths, a mixture of them, and the weights as they were."""
    models = [mcjax.load(artifact, bits=2), mcjax.load(artifact, budget=1.6)]
    models.append(mcjax.load(model_folder))  # of 16 bits, to which merging rounds
    adapters = lora.init(jax.random.key(0), models[0].params, rank=3)
    assert set(name.split("/")[-1] for name in adapters) == {"qkv", "o", "gate", "up", "down"}
    dense, decoder = models[-1].params, models[0].module.decoder
    assert set(lora.init(jax.random.key(0), dense, decoder=decoder)) == set(adapters)
    for model in models:
        same = run(model.module, lora.apply(model.params, adapters), tokens)
        np.testing.assert_allclose(same, model(tokens), rtol=1e-4, atol=1e-4)
        moved = drawn(adapters)
        applied = run(model.module, lora.apply(model.params, moved), tokens)
        merged = run(model.module, lora.merge(model.params, moved), tokens)
        close = 1e-4 if model is not models[-1] else 5e-3
        assert np.quantile(np.abs(applied - merged), 0.9) < close * np.abs(applied).max()
        assert np.abs(applied - same).max() > 0.01 * np.abs(same).max()


def test_adapters_train(artifact, tokens):
    """Under jit, with optax, while everything else stays."""
    model = mcjax.load(artifact, bits=1)
    adapters = lora.init(jax.random.key(0), model.params, rank=2, pattern="experts|mixer/o")
    optimiser = optax.adam(1e-2)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            logits = run(model.module, lora.apply(model.params, adapters), tokens)[:, :-1]
            each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(each)

        value, gradient = jax.value_and_grad(loss)(adapters)
        change, state = optimiser.update(gradient, state)
        return optax.apply_updates(adapters, change), state, value, gradient

    state, losses = optimiser.init(adapters), []
    for _ in range(8):
        adapters, state, value, gradient = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.1
    assert all(jnp.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_any_network():
    """Planes under a scan; the same adapters on the network as it was."""
    function, params, (x, _) = reference("encoder")
    watched = tree.watch(function, params, [x])
    planes, _ = tree.shrink(params, watched)
    adapters = lora.init(jax.random.key(0), planes, rank=2)
    assert set(adapters) == set(lora.init(jax.random.key(0), params, rank=2, watched=watched))
    moved = drawn(adapters)
    served = jax.jit(tree.serving(function))
    for bits in (1, 4):
        at = tree.slice_tree(planes, bits)
        expected = function(lora.merge(at, moved), x)
        np.testing.assert_allclose(served(lora.apply(at, moved), x), expected, rtol=1e-3, atol=1e-3)
        assert jnp.abs(expected - served(at, x)).max() > 1e-3
    one = next(iter(moved))  # the network as it was: by hand, and by its own face
    adapter = moved[one]
    plain = replaced(
        params, {one: adapter.layout.to_weight(adapter.a @ adapter.b)}, lambda _, w, c: w + c
    )
    expected = function(plain, x)
    got = function(lora.apply(params, {one: adapter}), x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda f: jnp.sum(jnp.sin(served(lora.apply(at, f), x))))(adapters)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(jnp.any(adapter.b) for adapter in gradient.values())


def test_kept_and_read(tmp_path):
    function, params, (x, _) = reference("recurrent")
    planes, _ = tree.shrink(params, tree.watch(function, params, [x]))
    adapters = drawn(lora.init(jax.random.key(0), planes, rank=2, dtype=jnp.bfloat16))
    turned = next(iter(adapters))  # what NumPy turns round lies in memory as it lay
    a = np.asarray(adapters[turned].a)
    adapters[turned] = dataclasses.replace(
        adapters[turned], a=np.moveaxis(np.moveaxis(a, -1, -2).copy(), -1, -2)
    )
    lora.save(tmp_path / "one.safetensors", adapters)
    kept = lora.load(tmp_path / "one.safetensors")
    assert jax.tree.structure(kept) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, kept, adapters)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="safetensors file, or damaged"):
        lora.load(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="is not a folder"):
        lora.save(tmp_path / "gone" / "one.safetensors", adapters)


def test_what_does_not_fit_is_refused(artifact, model_folder):
    model = mcjax.load(artifact, bits=1)
    key, plain = jax.random.key(0), mcjax.load(model_folder).params
    adapters = lora.init(key, model.params, rank=2)
    name = next(iter(adapters))
    adapted = lora.apply(model.params, adapters)
    with_adapters = dataclasses.replace(model, params=adapted)
    assert with_adapters.average_bits == 1
    wrong = lora.Adapter(a=jnp.zeros((2, 5, 2)), b=jnp.zeros((2, 2, 5)))
    for message, call in (
        ("rank must be at least 1, got 0", lambda: lora.init(key, model.params, rank=0)),
        (r"no weight matching 'q\$' is planes", lambda: lora.init(key, model.params, pattern="q$")),
        ("no weight matching '' is planes", lambda: lora.init(key, plain)),
        ("there is no leaf 'gone'", lambda: lora.apply(model.params, {"gone": wrong})),
        ("its adapter is for", lambda: lora.apply(model.params, {name: wrong})),
        ("has adapters already", lambda: lora.apply(adapted, adapters)),
        ("has adapters already", lambda: lora.init(key, adapted)),
        ("tune tables without", lambda: tune.init(adapted)),
        ("the model has adapters", lambda: with_adapters.refine(bits=2)),
        ("save the tree without", lambda: tree.save(artifact.parent / "never", adapted)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
