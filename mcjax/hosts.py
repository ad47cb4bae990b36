"""Arrays that devices of many processes share, brought to each of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def everywhere(tree: Any) -> Any:
    """A tree's arrays on this host, also those that devices of several share.

    Every process must ask.
    """
    return jax.tree.map(_on_host, tree)


def _on_host(array: Any) -> np.ndarray:
    here = getattr(array, "is_fully_addressable", True) or array.is_fully_replicated
    if here:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    if array.ndim > 2:  # whole on every device it might not fit
        return np.stack([_on_host(array[i]) for i in range(len(array))])
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
