"""What only a GPU can show: compiled kernels against dequantised weights. Skipped without one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pallas import dense_dot, random_planes, rows_of

import mcjax
from mcjax import bitplane
from mcjax.models.decoder import Routed, Routing
from mcjax.models.experts import apply_experts
from mcjax.ops.unpack import unpack

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


def deviation(got, expected):
    off = np.asarray(got, np.float64) - expected
    return np.linalg.norm(off) / np.linalg.norm(expected)


def mixed(d_in, d_out):
    stacks = tuple(random_planes(n, d_in, d_out, k, 128) for n, k in ((2, 1), (3, 2), (1, 5)))
    return bitplane.mixed(stacks, (2, 1, 5, 1, 2, 2))


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(("act_bits", "most"), [(8, 0.012), (None, 2e-4)])
def test_counting_bits(rows, act_bits, most):
    planes = mixed(1000, 1100)
    x, index = rows_of(planes, rows)
    keep = jnp.arange(rows) != 1
    dot = partial(mcjax.expert_dot, act_bits=act_bits, product="popcount")
    got = jax.jit(dot)(x, planes, index[:, None], keep[:, None])[:, 0]
    assert deviation(got, dense_dot(x, planes, index, keep)) < most
    slope = jnp.ones((rows, 1, 1100))
    change = jax.grad(lambda x: jnp.sum(slope * dot(x, planes, index[:, None], keep[:, None])))(x)
    weight = np.asarray(planes.dequantize(), np.float64)[np.asarray(index)]
    assert deviation(change, weight.sum(-1) * np.asarray(keep)[:, None]) < 5e-3


@pytest.mark.parametrize("product", ["pallas", "tiled"])
def test_many_rows(product):
    planes = mixed(1000, 1100)
    x, index = rows_of(planes, 300, dtype=jnp.bfloat16)
    got = jax.jit(partial(mcjax.expert_dot, product=product))(x, planes, index[:, None])[:, 0]
    assert deviation(got.astype(jnp.float32), dense_dot(x, planes, index)) < 5e-3


@pytest.mark.parametrize("width", [2, 4, 8])
def test_unpack(width):
    planes = jax.tree.map(lambda a: a[0], random_planes(1, 1000, 300, width, 64))
    np.testing.assert_allclose(unpack(planes, jnp.float32), planes.in_plane_order(), atol=1e-5)


def test_experts_of_few_tokens():
    gate, up, down = mixed(512, 1152), mixed(512, 1152), mixed(1152, 512)
    x, index = rows_of(gate, 4)
    exact = dense_dot(x, gate, index)
    exact = exact / (1 + np.exp(-exact)) * dense_dot(x, up, index)
    spec = Routed(experts=6, width=1152, routing=Routing(top_k=1))
    weights = {"gate": gate, "up": up, "down": down}
    got = jax.jit(partial(apply_experts, spec))(weights, x, index)
    assert deviation(got, dense_dot(exact, down, index)) < 3e-4
