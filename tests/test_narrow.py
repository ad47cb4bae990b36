"""Products with bfloat16 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.ops import narrow, narrow_dot


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_is_the_product_with_the_widened_weight(rows, dtype, monkeypatch):
    monkeypatch.setattr(narrow, "TILE_BYTES", 4 * 48 * 16)  # tiles of 16, the last overlapping
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.normal(size=(rows, 48)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(70, 48)), jnp.float32).astype(dtype)
    wide = np.asarray(weight, np.float64)
    for function in (narrow_dot, jax.jit(narrow_dot)):
        y = function(x, weight)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ wide.T, atol=1e-4)
    change = jnp.asarray(rng.normal(size=(rows, 70)), jnp.float32)
    of_x, of_weight = jax.vjp(narrow_dot, x, weight)[1](change)
    assert of_weight.dtype == dtype
    np.testing.assert_allclose(of_x, np.asarray(change, np.float64) @ wide, atol=1e-4)
    expected = np.asarray(change, np.float64).T @ np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(of_weight, np.float64), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tiles are for CPU")
def test_never_holds_the_widened_weight():
    x, weight = jnp.ones((4, 1024)), jnp.ones((8192, 1024), jnp.bfloat16)
    held = jax.jit(narrow_dot).lower(x, weight).compile().memory_analysis().temp_size_in_bytes
    assert held < 3 * weight.size
