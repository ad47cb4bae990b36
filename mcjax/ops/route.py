"""The most probable experts of each token.

On a GPU one kernel finds them. `top_k` and a softmax are several launches, which in a step of
decoding cost as much as a part of the products.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mcjax.ops import device


def route(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k most probable experts of each token, of equals the first.

    Args:
      logits: float32 [N, E].
      k: experts per token.

    Returns:
      Weights float32 [N, k], descending and summing to 1, and experts int32 [N, k].
    """
    return (kernel if device.platform() == "gpu" else plain)(logits, k)


def plain(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`route` in plain JAX."""
    best, index = lax.top_k(logits, k)
    return jax.nn.softmax(best, axis=-1), index


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def kernel(logits: jax.Array, k: int, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """`route` by a kernel; its derivatives are those of `plain`."""
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import triton as pltriton

    from mcjax.ops.pallas import launch

    tokens, experts = logits.shape
    lanes = pl.next_power_of_2(experts)

    def one_token(logits, weights, index):
        token = pl.program_id(0)
        lane = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
        row = logits.at[token, pl.ds(0, lanes)]
        rest = pltriton.load(row, mask=lane < experts, other=-jnp.inf)
        best, chosen = [], []
        for _ in range(k):
            best.append(jnp.max(rest))
            chosen.append(jnp.min(jnp.where(rest == best[-1], lane, lanes)))
            rest = jnp.where(lane == chosen[-1], -jnp.inf, rest)
        share = [jnp.exp(logit - best[0]) for logit in best]
        total = sum(share[1:], start=share[0])
        for i in range(k):
            weights[token, i] = share[i] / total
            index[token, i] = chosen[i]

    return launch(
        one_token,
        grid=(tokens,),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, k), jnp.float32),
            jax.ShapeDtypeStruct((tokens, k), jnp.int32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=1),
        interpret=interpret,
        name="route",
    )(logits)


@kernel.defjvp
def _jvp(k, interpret, primals, tangents):
    _, change = jax.jvp(partial(plain, k=k), primals, tangents)
    return kernel(*primals, k, interpret), change
