"""Products of a view and an array, as rows times matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mcjax.tree.view import Layout, View


def rows_of(x: jax.Array, contracted: Any, batched: Any, view: View, layout: Layout) -> jax.Array:
    """What a product multiplies a weight with, as rows [*batch, N, d_in]."""
    free = [n for n in range(x.ndim) if n not in (*contracted, *batched)]
    batch = [atom.size for atom in layout.batch[len(view.loops) :]]
    rows = jnp.transpose(x, [*batched, *free, *contracted])
    return rows.reshape(*batch, -1, layout.matrices[-2])


def axes_of(view: View, eqn: Any, first: bool):
    """Contracted and batched axes of the weight, ascending in its memory, and of the other."""
    contracted, batched = eqn.params["dimension_numbers"]
    mine, theirs = (0, 1) if first else (1, 0)
    pairs = sorted(
        zip(contracted[mine], contracted[theirs], strict=True),
        key=lambda pair: [-atom.stride for atom in view.axes[pair[0]]],
    )
    inside, of_other = ([pair[n] for pair in pairs] for n in (0, 1))
    return (inside, batched[mine]), (of_other, batched[theirs])


def patches(view: View, eqn: Any, x: jax.Array) -> tuple[Layout, jax.Array] | None:
    """A convolution's kernel as matrices, and its inputs as rows [groups, N, d_in]."""
    given = eqn.params
    if given["batch_group_count"] != 1:
        return None
    numbers, groups = given["dimension_numbers"], given["feature_group_count"]
    out, channel, *spatial = numbers.rhs_spec
    shape = list(view.shape)
    sizes = [shape[n] for n in spatial]
    flipped = [n for n, axis in enumerate(spatial) if view.flipped & set(view.axes[axis])]
    shape[out : out + 1] = [groups, shape[out] // groups]
    apart = view.reshaped(shape)
    turned = {atom for n in spatial for atom in view.axes[n]}
    if apart is None or view.flipped - turned:
        return None
    channel, *spatial = (n + (n > out) for n in (channel, *spatial))
    layout = apart.layout([out] if groups > 1 else [], [channel, *spatial])
    x = jnp.transpose(x, numbers.lhs_spec)
    cut = lax.conv_general_dilated_patches(
        x,
        sizes,
        given["window_strides"],
        given["padding"],
        lhs_dilation=given["lhs_dilation"],
        rhs_dilation=given["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    cut = cut.reshape(len(x), groups, -1, *sizes, int(np.prod(cut.shape[2:])))
    cut = jnp.flip(cut, [3 + n for n in flipped])
    rows = jnp.moveaxis(cut.reshape(len(x), groups, -1, cut.shape[-1]), (1, 0, 3), (0, 1, 2))
    rows = rows.reshape(groups, -1, rows.shape[-1])
    return layout, rows if groups > 1 else rows[0]
