"""Dense parameters as a folder that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mcjax.hub.folder import PREFIXES
from mcjax.models import weights
from mcjax.models.families import describe
from mcjax.models.families.tensors import Rule


def write(
    directory: str | Path, config: Mapping[str, Any], params: Any, dtype: Any = ml_dtypes.bfloat16
) -> None:
    """Writes dense parameters as config.json and model.safetensors that transformers reads.

    Args:
      directory: an existing folder.
      config: what its config.json is to say, `model_type` with it.
      params: of the `LanguageModel` that it describes.
      dtype: of the stored weights.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    page, decoder = describe(config)
    tensors: dict[str, np.ndarray] = {}

    def put(rule: Rule, tree: Any, prefix: str) -> None:
        own = [np.asarray(weights.get(tree, tuple(path.split(".")))) for path in rule.paths]
        for name, value in zip(rule.names, rule.write(own), strict=True):
            several = "{e}" in name
            for e, one in enumerate(value if several else [value]):
                full = name if name.startswith("lm_head.") else prefix + name.format(e=e)
                tensors[full] = np.ascontiguousarray(one.astype(dtype))

    for rule in page.outside(decoder):
        put(rule, params, PREFIXES[0])
    for i, layer in enumerate(decoder.layers):
        own = weights.of_layer(decoder, params, i)
        for entry in page.tensors(layer):
            for rule in [entry] if isinstance(entry, Rule) else entry[0]:
                put(rule, own, f"{PREFIXES[0]}layers.{i}.")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**config, "dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
