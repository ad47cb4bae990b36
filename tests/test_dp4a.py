"""The kernel for few rows on a GPU, in interpret mode, against dequantised weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas import dense_dot, random_planes, rows_of

from mcjax import bitplane
from mcjax.ops import dp4a
from mcjax.ops.unpack import unpack


def deviation(got, expected):
    off = np.asarray(got, np.float64) - expected
    return np.linalg.norm(off) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("act_bits", "most", "width", "group_size", "d_in", "d_out", "rows"),
    [
        (8, 0.012, 2, 128, 250, 140, 2),
        (None, 1e-4, 2, 128, 250, 140, 5),
        (None, 1e-4, 5, 64, 320, 24, 2),
        (None, 1e-4, 8, 64, 128, 24, 1),
    ],
)
def test_several_weights(act_bits, most, width, group_size, d_in, d_out, rows):
    """One row a block and, of five rows for three experts, two; edges of every tile."""
    first, second = (random_planes(3, d_in, d_out, width, group_size) for _ in range(2))
    x, index = rows_of(first, rows)
    keep = jnp.arange(rows) != 1
    poisoned = jnp.where(keep[:, None], x, jnp.nan)
    got = dp4a.expert_dots(
        poisoned, (first, second), index, keep, act_bits=act_bits, interpret=True
    )
    for y, planes in zip(got, (first, second), strict=True):
        assert y.shape == (rows, d_out) and (np.asarray(y)[1:2] == 0).all()
        assert deviation(y, dense_dot(x, planes, index, keep)) < most


def mixed(d_in, d_out):
    stacks = tuple(random_planes(n, d_in, d_out, k, 32) for n, k in ((1, 1), (2, 3)))
    return bitplane.mixed(stacks, (3, 1, 3))


def swiglu(x, gate, up, down, index):
    gated = dense_dot(x, gate, index)
    return dense_dot(gated / (1 + np.exp(-gated)) * dense_dot(x, up, index), down, index)


def test_swiglu_and_its_derivatives():
    """Each row meets two experts in a row; derivatives are the dequantised products'."""
    weights = mixed(64, 96), mixed(64, 96), mixed(96, 64)
    x, _ = rows_of(weights[0], 2)
    index = jnp.asarray([2, 1, 0, 2])

    @jax.jit
    def run(x):
        y, linear = jax.linearize(lambda x: dp4a.swiglu(x, weights, index, interpret=True), x)
        (gradient,) = jax.linear_transpose(linear, x)(jnp.ones_like(y))
        return y, gradient, linear(jnp.ones_like(x))

    got, gradient, change = run(x)
    assert got.shape == (4, 64)
    assert deviation(got, swiglu(np.repeat(x, 2, axis=0), *weights, index)) < 2e-4
    gate, up, down = (planes.dequantize()[index] for planes in weights)

    def exact(x):
        rows = jnp.repeat(x, 2, axis=0)
        hidden = jax.nn.silu(jnp.einsum("ti,tio->to", rows, gate))
        hidden = hidden * jnp.einsum("ti,tio->to", rows, up)
        return jnp.einsum("ti,tio->to", hidden, down)

    expected = jax.grad(lambda x: jnp.sum(exact(x)))(x)
    assert deviation(gradient, np.asarray(expected)) < 1e-5
    _, expected = jax.jvp(exact, (x,), (jnp.ones_like(x),))
    assert deviation(change, np.asarray(expected)) < 1e-5


def test_drafting_reads_the_first_planes():
    planes = random_planes(2, 64, 40, 3, 32)
    table = random_planes(2, 64, 40, 1, 32).tables[0]
    nested = type(planes)(
        planes=planes.planes, tables=(table, *planes.tables), widths=(1, 3), d_in=64, group_size=32
    )
    x, index = rows_of(planes, 2, [0, 1])
    drafting = bitplane.mixed((nested,), (3, 3), most=1)
    (got,) = dp4a.expert_dots(x, (drafting,), index, interpret=True)
    assert deviation(got, dense_dot(x, nested.slice(1), index)) < 1e-4


@pytest.mark.parametrize(("width", "d_in", "d_out"), [(3, 250, 140), (8, 640, 24)])
def test_unpack(width, d_in, d_out):
    planes = jax.tree.map(lambda a: a[0], random_planes(1, d_in, d_out, width, 64))
    got = unpack(planes, jnp.float32, interpret=True)
    np.testing.assert_allclose(got, planes.in_plane_order(), atol=1e-5)
