"""What others do: a model quantised anew for every budget, by GPTQ expert by expert.

This is what nested planes are measured against, in the tests, the benchmarks and the demo. As usual
for GPTQ (arXiv 2210.17323), and as MC-MoE (arXiv 2410.06270) does it for mixed widths, a layer is
calibrated on the outputs of the layers that are already quantised, attention has 4 bits and error
compensation is full. Scales stay in float32, which favours it; weights are not rotated, as those of
an artifact are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.bitplane import resolve_group_size
from mcjax.calibrate import expert_grams, observe
from mcjax.hub import Folder
from mcjax.models import weights
from mcjax.models.decoder import Layer
from mcjax.models.language_model import embed
from mcjax.models.weights import Role
from mcjax.quantize import gptq
from mcjax.quantize.gram import condition, pad

ATTENTION_BITS = 4


def dedicated_gptq(
    folder: Folder,
    windows: np.ndarray,
    allocation: np.ndarray,
    group_size: int | None = None,
    batch: int = 16,
    attention_bits: int = ATTENTION_BITS,
) -> dict[str, Any]:
    """Quantises a model for one allocation.

    Args:
      folder: the model.
      windows: calibration tokens int [N, T].
      allocation: each expert's width, int [L, E].
      group_size: as in `mcjax.quantize`.
      batch: windows computed at once.
      attention_bits: width of all that the allocation is not about.

    Returns:
      Dense float32 parameters of a `LanguageModel`, each weight at its quantised values.
    """
    decoder, params = folder.decoder, folder.read_rest(np.float32)
    x = np.array(embed(decoder, params, windows, jnp.float32))
    starts = range(0, len(windows), batch)
    numbers, layers = weights.budgeted_layers(decoder), []
    for i, layer in enumerate(decoder.layers):
        own: dict[str, Any] = {}
        for name, value in folder.read_layer(i, np.float32):
            weights.put(own, tuple(name.split(".")), jnp.asarray(value))

        def run(own, layer=layer, x=x):
            some = (x[s : s + batch] for s in starts)
            each = [observe(layer, decoder.width, decoder.norm_eps, own, part) for part in some]
            return list(zip(*each, strict=True))

        _, grams, seen = run(own)
        grams = jax.tree.map(lambda *parts: sum(parts), *grams)
        paths = {role.path for role in weights.budgeted(decoder, layer)}
        for role in weights.roles(layer, decoder.width):
            if role.tap is None:
                continue
            w, group = weights.get(own, role.path), resolve_group_size(role.shape[-2], group_size)
            if role.path not in paths:
                made = _quantize(w, grams[role.name][0], attention_bits, group)
            elif role.routed:
                made = _experts(layer, own, role, seen, allocation[numbers.index(i)], group)
            else:
                made = _quantize(
                    w, grams[role.name][0], int(allocation[numbers.index(i)][0]), group
                )
            weights.put(own, role.path, made)
        layers.append(own)
        x = np.concatenate(run(own)[0])
    return params | weights.stacked(decoder, layers)


def _experts(layer: Layer, own: Any, role: Role, seen, widths, group_size: int) -> jax.Array:
    """A weight [E, d_in, d_out], its experts quantised one by one under plain sums of x x'."""
    path, name = role.path[:-1], role.path[-1]
    every = weights.get(own, path)
    plain = [s._replace(weights=jnp.ones_like(s.weights)) for s in seen]
    grams = expert_grams(layer.block.activation, every, plain, 0, None, floor=0)
    gram = grams[1 if name == "down" else 0]
    return _quantize_each(every[name], gram, jnp.asarray(widths, jnp.int32), group_size)


@partial(jax.jit, static_argnames="group_size")
def _quantize(w, gram, bits, group_size):
    rows = -(-len(w) // group_size) * group_size
    wide = jnp.pad(w, ((0, rows - len(w)), (0, 0)))
    return gptq(wide, pad(condition(gram), rows), bits=bits, group_size=group_size)[: len(w)]


@partial(jax.jit, static_argnames="group_size")
def _quantize_each(w, gram, bits, group_size):
    return jax.lax.map(lambda one: _quantize(*one, group_size), (w, gram, bits))
