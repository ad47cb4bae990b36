"""Qwen2-MoE and Qwen1.5-MoE (arXiv 2407.10671): a gated shared expert beside the routed ones."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Decoder, Layer
from mcjax.models.families import qwen3_moe, shared
from mcjax.models.families.fields import Fields

MODEL_TYPES = ("qwen2_moe",)
NAME = "Qwen2-MoE, Qwen1.5-MoE"
CHECKED = "gated shared expert, biases or none, windows in turns, top-1, dense layers"


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen2-MoE from its config."""
    fields.only("hidden_act", "silu")
    count = fields.size("num_hidden_layers")
    mixer = shared.heads(fields, bias=fields.flag("qkv_bias", True))
    window = fields.window() if fields.flag("use_sliding_window") else None
    first = fields.get("max_window_layers", 28)
    fields.get("sliding_window", None)
    types = fields.layer_types(
        [
            "sliding_attention" if window and i < first and (i + 1) % 2 else "full_attention"
            for i in range(count)
        ]
    )
    each = qwen3_moe.blocks(fields, **qwen3_moe.shared_expert(fields))
    layers = [
        Layer(mixer=replace(mixer, window=window if kind == "sliding_attention" else None), block=b)
        for kind, b in zip(types, each, strict=True)
    ]
    return shared.model(fields, layers)


outside, tensors = shared.outside, qwen3_moe.tensors
