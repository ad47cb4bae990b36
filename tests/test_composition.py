"""Products under JAX's transformations, each against the product with the dequantised weight."""

import subprocess
import sys
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mcjax

WEIGHT = mcjax.quantize(jax.random.normal(jax.random.key(0), (96, 160)) * 0.1, 2)
X = jax.random.normal(jax.random.key(1), (40, 96))
CHANGE = jax.random.normal(jax.random.key(2), X.shape)


def loss(function, x):
    """Something whose second derivatives are not constant."""
    return jnp.sum(function(x) ** 3)


TRANSFORMATIONS = {
    "jit": lambda f: jax.jit(f)(X),
    "vmap": lambda f: jax.vmap(f)(X.reshape(4, 10, -1)),
    "jvp": lambda f: jax.jvp(f, (X,), (CHANGE,))[1],
    "linearize": lambda f: jax.linearize(f, X)[1](CHANGE),
    "transpose": lambda f: jax.linear_transpose(lambda x: jax.linearize(f, X)[1](x), X)(f(X))[0],
    "grad": lambda f: jax.grad(partial(loss, f))(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(partial(loss, f)))(X.reshape(4, 10, -1)),
    "hessian": lambda f: jax.hessian(partial(loss, f))(X[:2]),
    "forward over reverse": lambda f: jax.jvp(jax.grad(partial(loss, f)), (X,), (CHANGE,))[1],
    "reverse over reverse": lambda f: jax.grad(
        lambda x: jnp.sum(jax.grad(partial(loss, f))(x) * CHANGE)
    )(X),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_dot(name, act_bits):
    expected = TRANSFORMATIONS[name](lambda x: x @ WEIGHT.dequantize())
    got = TRANSFORMATIONS[name](lambda x: mcjax.dot(x, WEIGHT, act_bits))
    bound = 2e-5 if act_bits is None else 0.1
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_dot_in_64_bits(rows, act_bits):
    expected = mcjax.dot(X[:rows], WEIGHT, act_bits)
    with jax.enable_x64(True):
        got = mcjax.dot(X[:rows], WEIGHT, act_bits)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_shard_map():
    program = """
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        import jax, numpy as np, mcjax
        from jax.sharding import PartitionSpec as P
        weight = mcjax.quantize(jax.random.normal(jax.random.key(0), (96, 2560)), 2)
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        of_weight = jax.tree.map(lambda a: P(*[None] * (a.ndim - 1), "d"), weight)
        every = jax.tree.map(lambda a: P(), weight)
        for rows in (2, 400):
            x = jax.random.normal(jax.random.key(1), (rows, 96))
            for bits in (None, 8):
                f = lambda x, w: mcjax.dot(x, w, bits)
                expected = f(x, weight)
                for specs, out in (((P(), of_weight), P(None, "d")), ((P("d"), every), P("d"))):
                    g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out))
                    far = np.abs(g(x, weight) - expected).max() / np.abs(expected).max()
                    assert far < (1e-5 if bits is None else 0.02), far
                    of = jax.grad(lambda x: (g(x, weight) * expected).sum())(x)
                    one = jax.grad(lambda x: (f(x, weight) * expected).sum())(x)
                    np.testing.assert_allclose(of, one, rtol=1e-3, atol=1e-2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
