"""Qwen2-MoE and Qwen1.5-MoE (arXiv 2407.10671): a gated shared expert beside the routed ones."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Decoder, Dense, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear

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
    routed = Routed(
        experts=fields.size("num_experts", fields.get("num_local_experts", None)),
        width=fields.size("moe_intermediate_size"),
        routing=Routing(
            top_k=fields.size("num_experts_per_tok"), normalise=fields.flag("norm_topk_prob")
        ),
        shared=fields.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    dense = Dense(width=fields.size("intermediate_size"))
    step, without = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", ())
    layers = [
        Layer(
            mixer=replace(mixer, window=window if kind == "sliding_attention" else None),
            block=dense if i in without or (i + 1) % step else routed,
        )
        for i, kind in enumerate(types)
    ]
    return shared.model(fields, layers)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = [*shared.norms(), *shared.attention(layer.mixer)]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    return [
        *rules,
        linear("block.router", "mlp.gate"),
        linear("block.shared_gate", "mlp.shared_expert_gate"),
        *gated("block.shared", "mlp.shared_expert"),
        experts("mlp"),
    ]
