"""What once-QAT trained, as planes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcjax import qat


def freeze_tree(params: Mapping[str, Any], spec: qat.QuantSpec) -> dict[str, Any]:
    """What once-QAT trained, as planes: for layers whose spec is `frozen`.

    Args:
      params: of modules made of `mcjax.models.layers` with this spec.
      spec: the one they were trained with.

    Returns:
      The tree with each `kernel` as `BitPlanes` of all widths and without its `quantizer`.
    """
    tree = {}
    for key, node in params.items():
        if not isinstance(node, Mapping):
            tree[key] = node
        elif "quantizer" in node and "kernel" in node:
            rest = {k: v for k, v in node.items() if k not in ("quantizer", "kernel")}
            matrix = node["kernel"].reshape(-1, node["kernel"].shape[-1])
            tree[key] = {**rest, "kernel": qat.freeze(matrix, node["quantizer"], spec)}
        else:
            tree[key] = freeze_tree(node, spec)
    return tree
