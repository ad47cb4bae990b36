"""Products with planes against the dequantised product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bitplane import random_planes

import mcjax
from mcjax import tables
from mcjax.ops import choice, tiled
from mcjax.ops.rounding import quantize_activations

RNG = np.random.default_rng(0)


def weights(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("act_bits", [None, 8, 16])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
@pytest.mark.parametrize("d_in", [64, 144])
def test_dot(act_bits, bits, d_in):
    planes, x = random_planes((d_in, 6), bits, None).slice(bits), weights(2, 3, d_in)
    exact = x
    if act_bits is not None:
        rounded, scale = quantize_activations(x, act_bits)
        exact = rounded * scale
        assert np.abs(rounded).max() == 2 ** (act_bits - 1) - 1
    expected = np.asarray(exact, np.float64) @ np.asarray(planes.dequantize(), np.float64)
    got = mcjax.dot(x, planes, act_bits=act_bits)
    assert got.shape == (2, 3, 6) and got.dtype == x.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    jitted = jax.jit(lambda x, p: mcjax.dot(x, p, act_bits=act_bits))(x, planes)
    np.testing.assert_allclose(jitted, got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("allocation", [None, 2, (3, 1, 2, 1)])
def test_expert_dot(act_bits, allocation):
    planes = random_planes((4, 64, 6), 3, 64)
    planes = planes if allocation is None else planes.slice(allocation)
    x, index = weights(10, 64), jnp.asarray(RNG.integers(0, 4, (10, 2)))
    keep = jnp.asarray(RNG.random((10, 2)) < 0.7)
    rows = x
    if act_bits == 8:
        rounded, scale = quantize_activations(x)
        rows = rounded * scale
    dense = planes.dequantize()
    expected = jnp.einsum("ti,tkio->tko", rows, dense[index]) * keep[..., None]
    got = mcjax.expert_dot(x, planes, index, keep, act_bits)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert (np.asarray(got)[~np.asarray(keep)] == 0).all()
    jitted = jax.jit(mcjax.expert_dot, static_argnames="act_bits")(
        x, planes, index, keep, act_bits=act_bits
    )
    np.testing.assert_allclose(jitted, got, rtol=1e-4, atol=1e-4)


def test_expert_dot_crosses_block_borders():
    planes = random_planes((3, 32, 4), 2).slice(2)
    x = weights(500, 32)
    index = jnp.asarray(RNG.choice(3, (500, 1), p=[0.9, 0.0, 0.1]))
    expected = jnp.einsum("ti,tkio->tko", x, planes.dequantize()[index])
    np.testing.assert_allclose(mcjax.expert_dot(x, planes, index), expected, rtol=1e-3, atol=1e-4)


def test_gradient_with_respect_to_x():
    planes = random_planes((3, 32, 4), 2).slice(2)
    x, index = weights(5, 32), jnp.asarray(RNG.integers(0, 3, (5, 2)))
    got = jax.grad(lambda x: jnp.sum(jnp.sin(mcjax.expert_dot(x, planes, index))))(x)
    dense = planes.dequantize()
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(jnp.einsum("ti,tkio->tko", x, dense[index]))))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_bad_shapes():
    planes = random_planes((64, 6), 2, 64)
    with pytest.raises(ValueError, match="does not multiply"):
        mcjax.dot(weights(3, 63), planes)
    with pytest.raises(ValueError, match="act_bits"):
        mcjax.dot(weights(3, 64), planes, act_bits=4)
    with pytest.raises(ValueError, match="does not multiply"):
        mcjax.expert_dot(weights(3, 64), planes, jnp.zeros((3, 2), int))
    experts = random_planes((2, 64, 6), 2, 64)
    with pytest.raises(ValueError, match="must be"):
        mcjax.expert_dot(weights(3, 64), experts, jnp.zeros((4, 2), int))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("product", ["popcount", "tiled"])
def test_both_products_and_their_gradients(product, bits, monkeypatch):
    """Several overlapping tiles; the gradient is that of the dequantised product for both."""
    monkeypatch.setattr(tiled, "TILE_BYTES", 1 << 16)
    planes = random_planes((150, 300), bits, 32).slice(bits)
    x = weights(5, 150)
    level, scale = quantize_activations(x)
    dense = np.asarray(planes.dequantize(), np.float64)
    weight, tolerance = dense, 1e-5
    if product == "tiled":  # rounds weights to int8 as well, by output features
        alpha, offset = tables.decode(planes.tables[-1], bits)
        unit = np.asarray(jnp.max(jnp.abs(offset) + jnp.sum(alpha, axis=0), axis=0)) / 127
        weight, tolerance = np.round(dense / unit) * unit, 4e-3  # ties may go either way
        assert np.linalg.norm(weight - dense) < 0.01 * np.linalg.norm(dense)
    expected = np.asarray(level * scale, np.float64) @ weight
    got = mcjax.dot(x, planes, act_bits=8, product=product)
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())
    slope = weights(5, 300)
    change = jax.grad(lambda x: jnp.sum(slope * mcjax.dot(x, planes, 8, product)))(x)
    np.testing.assert_allclose(change, np.asarray(slope) @ dense.T, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda x: mcjax.dot(x, planes, 8, product))(x)
    np.testing.assert_allclose(mapped, got, rtol=1e-5, atol=1e-5)


def test_orders_of_features():
    planes = random_planes((150, 7), 3, 32)
    x = weights(2, 150)
    np.testing.assert_array_equal(planes.feature_order(planes.plane_order(x)), x)
    weight = planes.feature_order(planes.in_plane_order().T).T
    np.testing.assert_allclose(planes.dequantize(), weight, atol=1e-6)


def test_choice():
    assert choice.product("cpu", 1, 4, 8) == "popcount"
    assert choice.product("cpu", 512, 2, 8) == "tiled"
    assert choice.product("cpu", 1, 2, None) == "tiled"
    assert choice.product("cpu", 9, 4, 16) == "popcount"
    assert choice.product("cpu", 10, 4, 16) == "tiled"
    assert choice.product("tpu", 1, 2, None) == "pallas"
    assert [choice.product("gpu", rows, 2, None) for rows in (1, 4, 5, 512, 2048)] == [
        *("popcount",) * 2,
        *("pallas",) * 2,
        "tiled",
    ]
    assert choice.expert_rows("cpu", 2, 8, 8) == 1
    assert choice.expert_rows("cpu", 32, 8, 8) == 4
    assert choice.expert_rows("cpu", 2, 8, None) == 2
    assert choice.expert_rows("cpu", 1024, 8, 8) == choice.expert_rows("cpu", 1024, 8, None) == 160
    assert choice.expert_rows("cpu", 4096, 8, None) == 192
    assert choice.expert_rows("gpu", 8192, 8, None) == 1152
    assert choice.draft_act_bits("cpu", None) == 8 and choice.draft_act_bits("gpu", None) is None
    planes = random_planes((64, 6), 2, 64)
    with pytest.raises(ValueError, match="'lookup'"):
        mcjax.dot(weights(3, 64), planes, product="lookup")
    with pytest.raises(ValueError, match="act_bits=8"):
        mcjax.dot(weights(3, 64), planes, product="popcount")


def test_a_decoding_step_holds_no_dequantised_expert():
    """Its temporaries are smaller than one dequantised expert matrix."""
    planes = random_planes((8, 512, 1024), 2, 128).slice((2, 1, 1, 2, 2, 2, 1, 2))
    x, index = weights(1, 512), jnp.asarray([[3, 1]])
    compiled = jax.jit(lambda x, p, i: mcjax.expert_dot(x, p, i, act_bits=8)).lower(
        x, planes, index
    )
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    assert 0 < used < 512 * 1024 * 4 / 2, used
