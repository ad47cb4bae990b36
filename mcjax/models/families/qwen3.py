"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), dense."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import gated

MODEL_TYPES = ("qwen2", "qwen3")
NAME = "Qwen2, Qwen3 (dense)"
CHECKED = "biases, norms of queries and keys, windows in the last layers, tied head"


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen2 or a Qwen3 from its config."""
    fields.only("hidden_act", "silu")
    if fields.get("model_type") == "qwen2":
        mixer = shared.heads(fields, bias=True)
    else:
        mixer = shared.heads(fields, 128, qk_norm=QKNorm(), **shared.both_biases(fields))
    block, count = Dense(width=fields.size("intermediate_size")), fields.size("num_hidden_layers")
    windows = shared.windows(fields, count)
    layers = [Layer(mixer=replace(mixer, window=window), block=block) for window in windows]
    return shared.model(fields, layers)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    return [*shared.norms(), *shared.attention(layer.mixer), *gated("block", "mlp")]
