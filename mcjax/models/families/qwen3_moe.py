"""Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Heads, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear

MODEL_TYPES = ("qwen3_moe",)


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen3-MoE from its config."""
    fields.only("hidden_act", "silu")
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", width // heads)
    bias = fields.flag("attention_bias")
    window = fields.window() if fields.flag("use_sliding_window") else None
    fields.get("sliding_window", None)
    fields.get("max_window_layers", None)
    mixer = Heads(
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=fields.rope(head_dim),
        window=window,
        bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
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
