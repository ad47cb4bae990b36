"""The routing kernel, in interpret mode, against softmax and `top_k`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.ops.route import kernel, plain

LOGITS = jax.random.normal(jax.random.key(0), (7, 6))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_kernel(k):
    logits = LOGITS.at[2, jnp.array([1, 3])].set(9.0)  # of equals the first comes first
    weights, index = kernel(logits, k, True)
    expected, chosen = plain(logits, k)
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    np.testing.assert_array_equal(index, chosen)


def test_derivatives_and_vmap():
    def total(function):
        return lambda logits: jnp.sum(function(logits)[0] ** 2)

    def compiled(logits):
        return kernel(logits, 2, True)

    expected = jax.grad(total(lambda logits: plain(logits, 2)))(LOGITS)
    np.testing.assert_allclose(jax.grad(total(compiled))(LOGITS), expected, atol=1e-6)
    mapped = jax.vmap(compiled)(jnp.stack([LOGITS, LOGITS[::-1]]))
    np.testing.assert_array_equal(mapped[1][1], compiled(LOGITS)[1][::-1])
