"""What others do: a model quantised anew for every budget, by GPTQ expert by expert.

This is what nested planes are measured against, in the tests, the benchmarks and the demo. As usual
for GPTQ (arXiv 2210.17323), and as MC-MoE (arXiv 2410.06270) does it for mixed widths, a layer is
calibrated on the outputs of the layers that are already quantised, attention has 4 bits and error
compensation is full. Scales stay in float32, which favours it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.bitplane import resolve_group_size
from mcjax.calibrate import capture, combine_weights
from mcjax.convert import HuggingFaceFolder
from mcjax.models.mixtral import Layer
from mcjax.models.mixtral import layer as layer_module
from mcjax.quantize import gptq
from mcjax.quantize.gram import condition

ATTENTION_BITS = 4


def dedicated_gptq(
    folder: HuggingFaceFolder,
    windows: np.ndarray,
    allocation: np.ndarray,
    group_size: int | None = None,
    batch: int = 16,
) -> dict[str, Any]:
    """Quantises a model for one allocation.

    Args:
      folder: the model.
      windows: calibration tokens int [N, T].
      allocation: each expert's width, int [L, E].
      group_size: as in `mcjax.quantize`.
      batch: windows computed at once.

    Returns:
      Dense float32 parameters of a `Mixtral`, each weight at its quantised values.
    """
    params = folder.read(np.float32)
    layer = layer_module(folder.config, None, 0)  # all layers are alike
    x = params["embedding"][windows]
    starts = range(0, len(windows), batch)
    for i, widths in enumerate(allocation):
        own = params[f"layer_{i}"]
        grams = [_routed_grams(layer, own, x[s : s + batch]) for s in starts]
        into, out, expert_in, expert_hidden = (sum(g) for g in zip(*grams, strict=True))

        def one(w, gram, bits):
            return _quantize(w, gram, bits, resolve_group_size(w.shape[0], group_size))

        def every(weights, grams, widths=tuple(widths)):
            each = zip(weights, grams, widths, strict=True)
            return jnp.stack([one(w, gram, int(bits)) for w, gram, bits in each])

        own = {
            **own,
            "attention": {
                name: one(w, out if name == "o" else into, ATTENTION_BITS)
                for name, w in own["attention"].items()
            },
            "moe": {
                **own["moe"],
                "experts": {
                    name: every(w, expert_hidden if name == "down" else expert_in)
                    for name, w in own["moe"]["experts"].items()
                },
            },
        }
        params[f"layer_{i}"] = own
        x = jnp.concatenate([_forward(layer, own, x[s : s + batch]) for s in starts])
    return params


@partial(jax.jit, static_argnames=("bits", "group_size"))
def _quantize(w, gram, bits, group_size):
    return gptq(w, condition(gram), bits=bits, group_size=group_size)


@partial(jax.jit, static_argnames="layer")
def _routed_grams(layer: Layer, params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Plain sums of x x' over the tokens that reach each weight."""
    _, seen = capture(layer, params, x)
    tokens = seen["moe_input"].reshape(-1, x.shape[-1])
    routed = (combine_weights(tokens, params["moe"]["router"], layer.config) > 0).astype(x.dtype)
    experts = params["moe"]["experts"]

    def one_expert(expert):
        gate, up, routed = expert
        hidden = jax.nn.silu(tokens @ gate) * (tokens @ up)
        return (tokens.T * routed) @ tokens, (hidden.T * routed) @ hidden

    expert_grams = jax.lax.map(one_expert, (experts["gate"], experts["up"], routed.T))
    flat = [seen[n].reshape(-1, seen[n].shape[-1]) for n in ("attention_input", "attention_output")]
    return (*(a.T @ a for a in flat), *expert_grams)


@partial(jax.jit, static_argnames="layer")
def _forward(layer, params, x):
    return layer.apply({"params": params}, x, jnp.arange(x.shape[1])[None])[0]
