"""Planes hold their codes exactly, prefixes are slices, and the type is a pytree throughout."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mcjax
from mcjax import bitplane, tables

RNG = np.random.default_rng(0)


def random_planes(shape, bits, group_size=32):
    planes = bitplane.empty(shape, tuple(range(1, bits + 1)), group_size)
    fill = {np.dtype(np.uint32): (0, 2**32), np.dtype(np.uint8): (96, 160)}  # tables: 1/128 .. 1/8
    return jax.tree.map(
        lambda a: jnp.asarray(RNG.integers(*fill[a.dtype], a.shape, a.dtype)), planes
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_unpack_every_code_in_every_place(bits):
    # Each of the 32 places of a word takes every code once, in both words of a group.
    codes = (np.arange(64)[:, None] + np.arange(2**bits)) % 2**bits
    planes = bitplane.pack(jnp.asarray(codes), bits, 64)
    assert planes.shape == (bits, 2, 1, 2**bits) and planes.dtype == jnp.uint32
    np.testing.assert_array_equal(bitplane.unpack(planes), codes)
    # The documented position: bit j of word v is input feature 32 v + j.
    for p, v, j in itertools.product(range(bits), range(2), (0, 13, 31)):
        bit = (np.asarray(planes)[p, v, 0] >> j) & 1
        np.testing.assert_array_equal(bit, (codes[32 * v + j] >> (bits - 1 - p)) & 1)


@given(st.integers(1, 8), st.sampled_from([32, 64, 96, 128]), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_prefix_property(bits, group_size, groups, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, group_size * groups, 3))
    planes = bitplane.pack(jnp.asarray(codes), bits, group_size)
    for k in range(1, bits + 1):
        np.testing.assert_array_equal(bitplane.unpack(planes[:, :k]), codes >> (bits - k))


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_is_the_documented_equation(bits):
    planes = random_planes((2, 144, 5), bits)  # 144 = 4.5 words: padded
    for k in range(1, bits + 1):
        cut = planes.slice(k)
        alpha, offset = tables.decode(cut.tables[0], k)
        codes = np.asarray(planes.codes())
        expected = np.repeat(np.asarray(offset), 32, axis=1)[:, :144]
        for p in range(k):
            sign = 2.0 * ((codes >> (bits - 1 - p)) & 1) - 1
            expected = expected + np.repeat(np.asarray(alpha[:, p]), 32, axis=1)[:, :144] * sign
        np.testing.assert_allclose(cut.dequantize(), expected, rtol=1e-5, atol=1e-5)
        assert cut.bits == k and cut.shape == (2, 144, 5)


def test_mixed_widths_keep_expert_order_and_sum_their_bits():
    planes = random_planes((5, 64, 3), 4)
    allocation = (3, 1, 4, 1, 2)
    mixed = planes.slice(allocation)
    for e, k in enumerate(allocation):
        np.testing.assert_array_equal(mixed.dequantize()[e], planes.slice(k).dequantize()[e])
    each = [planes.slice(k).nbytes // 5 for k in allocation]
    assert mixed.nbytes == sum(each)
    assert mixed.bits == pytest.approx(11 / 5)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(mixed.stacks))
    assert held == mixed.nbytes
    np.testing.assert_array_equal(mixed.allocation, allocation)
    np.testing.assert_array_equal(
        mixed.at(2).choose(lambda w: w.dequantize()), mixed.dequantize()[2]
    )
    assert mixed.effective_bits == pytest.approx(8 * held / (5 * 64 * 3))


@pytest.mark.parametrize("bits, rows", [(1, 2), (2, 3), (3, 4), (4, 2), (6, 2), (7, 3), (8, 3)])
def test_tables_cost_at_most_32_bits_a_group(bits, rows):
    cut = random_planes((64, 7), bits, 64).slice(bits)
    assert cut.tables[0].shape == (rows, 1, 7)
    assert cut.effective_bits == bits + 8 * rows / 64 <= bits + 32 / 64


def test_transformations():
    planes = random_planes((4, 64, 3), 3)
    dense = planes.dequantize()
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(jax.jit(lambda p: p.dequantize())(planes), dense)
    close(jax.vmap(lambda p: p.dequantize())(planes), dense)
    _, scanned = jax.lax.scan(lambda c, p: (c, p.dequantize()), 0, planes)
    close(scanned, dense)
    sliced = jax.jit(lambda p: p.slice(2))(planes)
    jax.tree.map(np.testing.assert_array_equal, sliced, planes.slice(2))
    leaves, structure = jax.tree.flatten(planes)
    jax.tree.map(np.testing.assert_array_equal, structure.unflatten(leaves), planes)
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    placed = jax.device_put(planes, NamedSharding(mesh, PartitionSpec("expert")))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(placed))
    close(placed.dequantize(), dense)
    copy = jax.tree.map(jnp.copy, planes)
    moved = jax.jit(lambda p: p, donate_argnums=0)(copy)
    jax.tree.map(np.testing.assert_array_equal, moved, planes)


def test_default_group_sizes():
    wanted = {192: 96, 384: 128, 2880: 96, 4096: 128, 14336: 128, 144: 32, 32: 32, 30: 32, 160: 32}
    for d_in, group_size in wanted.items():
        assert bitplane.resolve_group_size(d_in, None) == group_size
    for bad in (0, 16, 33, 128):
        with pytest.raises(ValueError, match="192 input features cannot be cut into groups of"):
            bitplane.resolve_group_size(192, bad)


def test_bad_slices():
    planes = random_planes((2, 64, 3), 3)
    with pytest.raises(ValueError, match="width 4 is not one of"):
        planes.slice(4)
    with pytest.raises(ValueError, match="width 1 is not one of the stored widths"):
        planes.slice(2).slice(1)
    with pytest.raises(ValueError, match="3 widths"):
        planes.slice((1, 2, 3))
    with pytest.raises(AttributeError):
        planes.d_in = 3


@given(st.floats(2.0**-26, 2.0**16))
@settings(deadline=None)
def test_steps_round_to_the_stated_precision(step):
    code, value = tables.round_step(jnp.float32(step))
    worst = 0.0222 if 2.0**-11 <= step <= 2 else 0.195
    assert abs(float(value) / step - 1) <= worst
    assert tables.round_step(value)[0] == code


def test_half_precision_dequantize():
    planes = mcjax.quantize(jnp.asarray(RNG.normal(size=(64, 4)), jnp.float32), bits=4)
    assert planes.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
