"""dots.llm1 (arXiv 2506.05767): Qwen3's attention, DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Decoder, Layer, QKNorm
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields

MODEL_TYPES = ("dots1",)
NAME = "dots.llm1"
CHECKED = "windows in the last layers, groups of experts, dense first layer"


def decoder(fields: Fields) -> Decoder:
    """Describes a dots.llm1 from its config."""
    fields.only("hidden_act", "silu")
    mixer = shared.heads(fields, qk_norm=QKNorm(), **shared.both_biases(fields))
    routing = shared.sigmoid_routing(fields, normalise=False)
    sparse = deepseek_v3.routed(fields, routing, 0)
    each = deepseek_v3.blocks(fields, sparse)
    windows = shared.windows(fields, len(each), always=True)
    layers = [
        Layer(mixer=replace(mixer, window=window), block=block)
        for window, block in zip(windows, each, strict=True)
    ]
    return shared.model(fields, layers)


outside, tensors = shared.outside, deepseek_v3.tensors
