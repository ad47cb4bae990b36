"""ERNIE 4.5, the text models: neighbours rotated, experts by corrected softmax."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear, squeezed

MODEL_TYPES = ("ernie4_5_moe",)
NAME = "ERNIE 4.5 (text)"
CHECKED = "dense layers between, corrected softmax routing, shared experts"


def decoder(fields: Fields) -> Decoder:
    """Describes an ERNIE 4.5 from its config."""
    fields.only("hidden_act", "silu")
    fields.only("use_bias", False)
    fields.only("use_rmsnorm", True)
    fields.only("moe_gate", "topk")
    fields.only("moe_use_aux_free", True)
    fields.get("moe_capacity", None)  # of training
    count = fields.size("num_hidden_layers")
    mixer = shared.heads(fields, theta=5e5, interleaved=True)
    width = fields.size("moe_intermediate_size")
    routed = Routed(
        experts=fields.size("moe_num_experts", fields.get("num_experts", None)),
        width=width,
        routing=Routing(
            top_k=fields.size("moe_k", fields.get("num_experts_per_tok", None)),
            correction=True,
            floor=fields.number("moe_norm_min", 1e-12),
        ),
        shared=width * fields.get("moe_num_shared_experts", 2),
    )
    first, last = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    last, every = count - 1 if last == -1 else last, fields.size("moe_layer_interval", 1)
    dense = Dense(width=fields.size("intermediate_size"))
    layers = [
        Layer(mixer=mixer, block=routed if first <= i <= last and not (i + 1) % every else dense)
        for i in range(count)
    ]
    return shared.model(fields, layers, norm_eps=1e-5, tied=True)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules: list = [*shared.norms(), *shared.attention(layer.mixer)]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    name = "mlp.moe_statics.e_score_correction_bias"
    rules += [
        linear("block.router", "mlp.gate"),
        squeezed("block.correction", name, 0),
        experts("mlp"),
    ]
    return rules + (gated("block.shared", "mlp.shared_experts") if layer.block.shared else [])
