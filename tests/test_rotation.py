"""The rotation of input features, and planes that have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mcjax
from mcjax import qat, rotation
from mcjax.models.layers import Dense

SIZES = (1, 2, 31, 32, 96, 640, 1009, 2880)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal(size):
    matrix = np.asarray(rotation.rotate(jnp.eye(size)), np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-5
    x = jax.random.normal(jax.random.key(0), (3, 2, size))
    got = rotation.rotate(x)
    assert np.allclose(got, x @ matrix, atol=1e-4)
    assert np.allclose(rotation.unrotate(got), x, atol=1e-4)


def test_signs_are_what_files_were_written_with():
    """A change here would spoil every artifact."""
    signs = rotation._signs(4096)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert "".join("+" if s > 0 else "-" for s in signs[:32]) == "++-+-+++---+---+-----+--+-+++-+-"
    assert abs(signs.mean()) < 0.05


def test_it_spreads_what_stands_out():
    spike = rotation.rotate(jnp.zeros((1, 2048)).at[0, 5].set(1.0))
    constant = rotation.rotate(jnp.ones((1, 2048)) / 2048**0.5)
    assert np.abs(spike).max() < 1.001 * 2048**-0.5
    assert np.abs(constant).max() < 5 * 2048**-0.5


def test_weights_and_gram_matrices_go_with_rows():
    key = jax.random.split(jax.random.key(1))
    x, w = jax.random.normal(key[0], (50, 96)), jax.random.normal(key[1], (96, 7))
    turned = rotation.rotate(x)
    assert np.allclose(turned @ rotation.rotate_inputs(w), x @ w, atol=1e-3)
    assert np.allclose(rotation.rotate_gram(x.T @ x), turned.T @ turned, atol=1e-3)
    assert np.allclose(rotation.unrotate_inputs(rotation.rotate_inputs(w)), w, atol=1e-5)


W = jax.random.t(jax.random.key(2), 3, (3, 160, 24)) * 0.05
PLANES = mcjax.quantize(W, 4, rotated=True)


@pytest.mark.parametrize("act_bits", [None, 8, 16])
@pytest.mark.parametrize("rows", [1, 100])
def test_products_are_those_of_the_dequantised_weight(rows, act_bits):
    x = jax.random.normal(jax.random.key(3), (rows, 160))
    for bits in (2, 4):
        one = jax.tree.map(lambda a: a[1], PLANES.slice(bits))
        expected = x @ one.dequantize()
        tolerance = {None: 1e-4, 16: 1e-3, 8: 0.05}[act_bits] * np.abs(expected).max()
        assert np.abs(mcjax.dot(x, one, act_bits) - expected).max() < tolerance
    mixed = PLANES.slice([2, 4, 3])
    index = jnp.arange(2 * rows).reshape(rows, 2) % 3
    got = mcjax.expert_dot(x, mixed, index, act_bits=act_bits)
    expected = jnp.einsum("td,tkdo->tko", x, mixed.dequantize()[index])
    assert np.abs(got - expected).max() < tolerance * 2


def test_derivatives_are_those_of_the_dequantised_weight():
    one = jax.tree.map(lambda a: a[0], PLANES.slice(3))
    x = jax.random.normal(jax.random.key(4), (5, 160))
    got = jax.grad(lambda x: jnp.sum(jnp.sin(mcjax.dot(x, one))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(x @ one.dequantize())))(x)
    assert np.abs(got - expected).max() < 1e-4


def test_rounding_rows_loses_less_after_it():
    """Rows with a few features that stand out, as those of language models have."""
    plain = mcjax.quantize(W[0], 4)
    x = jax.random.normal(jax.random.key(5), (64, 160)).at[:, 7].mul(40)

    def loss(planes):
        exact = x @ planes.dequantize()
        return float(jnp.linalg.norm(mcjax.dot(x, planes, 8) - exact) / jnp.linalg.norm(exact))

    assert loss(jax.tree.map(lambda a: a[0], PLANES)) < 0.5 * loss(plain)


def test_it_lowers_the_error_where_inputs_and_weights_stand_out():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=160))
    x = rng.normal(size=(4000, 160)) * scale
    w = rng.standard_t(3, size=(160, 32)) * (1 + 5 * (rng.random(160) < 0.03))[:, None]
    gram, w = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(w, jnp.float32)

    def loss(bits, rotated):
        planes = mcjax.quantize(w, 4, gram=gram, rotated=rotated).slice(bits)
        return np.linalg.norm(x @ (np.asarray(planes.dequantize()) - np.asarray(w)))

    for bits in (1, 2, 3, 4):
        assert loss(bits, True) < loss(bits, False)


def test_training_for_every_width_takes_it_along():
    spec = qat.QuantSpec(widths=(4, 2), act_bits=None, rotated=True)
    quantizer = qat.init_quantizer(W, spec)
    frozen = qat.freeze(W, quantizer, spec)
    assert frozen.rotated
    for bits in (2, 4):
        got = qat.fake_quant(W, quantizer, spec, bits)
        assert np.allclose(got, frozen.slice(bits).dequantize(), atol=1e-5)


def test_a_frozen_layer_expects_it():
    spec = qat.QuantSpec(widths=(4, 2), act_bits=None, rotated=True, frozen=True)
    layer = Dense(8, spec, bits=2)
    drawn = layer.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]["kernel"]
    assert drawn.rotated


@pytest.mark.parametrize("odd", [1, 257])
def test_modes(odd):
    x = jax.random.normal(jax.random.key(6), (2, 64 * odd))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert np.allclose(rotation.unrotate(rotation.rotate(x)), x, atol=1e-5)
    assert max(map(len, rotation._matrices(64 * odd))) <= 64


def test_a_tree_keeps_it(tmp_path):
    mcjax.tree.save(tmp_path / "a", {"w": PLANES})
    back = mcjax.tree.load(tmp_path / "a")["w"]
    assert back.rotated
    assert np.array_equal(back.dequantize(), PLANES.dequantize())
