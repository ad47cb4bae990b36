"""Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear

MODEL_TYPES = ("qwen3_moe",)
NAME = "Qwen3-MoE"
CHECKED = "routing normalised or not, top-1, biases, windows, dense layers between"


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen3-MoE from its config."""
    fields.only("hidden_act", "silu")
    window = fields.window() if fields.flag("use_sliding_window") else None
    fields.get("sliding_window", None)
    fields.get("max_window_layers", None)
    mixer = shared.heads(fields, window=window, qk_norm=QKNorm(), **shared.both_biases(fields))
    routed = Routed(
        experts=fields.size("num_experts", fields.get("num_local_experts", None)),
        width=fields.size("moe_intermediate_size"),
        routing=Routing(
            top_k=fields.size("num_experts_per_tok"), normalise=fields.flag("norm_topk_prob")
        ),
    )
    dense = Dense(width=fields.size("intermediate_size"))
    step, without = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", ())
    layers = [
        Layer(mixer=mixer, block=dense if i in without or (i + 1) % step else routed)
        for i in range(fields.size("num_hidden_layers"))
    ]
    return shared.model(fields, layers)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = [*shared.norms(), *shared.attention(layer.mixer)]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    return [*rules, linear("block.router", "mlp.gate"), experts("mlp")]
