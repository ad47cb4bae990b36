"""OLMo-2 (arXiv 2501.00656), OLMoE (arXiv 2409.02060) and FlexOlmo (arXiv 2507.07024)."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, keep, linear

MODEL_TYPES = ("olmo2", "olmoe", "flex_olmo")
NAME = "OLMo-2, OLMoE, FlexOlmo"
CHECKED = "norms after, norms over all heads together, clipping, biases"


def decoder(fields: Fields) -> Decoder:
    """Describes one of them from its config."""
    fields.only("hidden_act", "silu")
    kind, width = fields.get("model_type"), fields.size("intermediate_size")
    block: Dense | Routed = Dense(width=width)
    if kind != "olmo2":
        experts = fields.size("num_experts", fields.get("num_local_experts", None))
        normalise = fields.flag("norm_topk_prob")
        top_k = fields.size("num_experts_per_tok", 8 if kind == "olmoe" else 5)
        routing = Routing(top_k=top_k, normalise=normalise)
        block = Routed(experts=experts, width=width, routing=routing)
    clip = fields.get("clip_qkv", None) if kind == "olmoe" else None
    layer = Layer(
        mixer=shared.heads(
            fields,
            qk_norm=QKNorm(over="all"),
            clip=clip,
            theta=5e5 if kind == "flex_olmo" else 1e4,
            **shared.both_biases(fields),
        ),
        block=block,
        norms="before" if kind == "olmoe" else "after",
    )
    eps = 1e-6 if kind == "flex_olmo" else 1e-5
    return shared.model(fields, [layer] * fields.size("num_hidden_layers"), norm_eps=eps)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = shared.norms()
    if layer.norms == "after":
        rules = [
            keep("mixer_after", "post_attention_layernorm.weight"),
            keep("block_after", "post_feedforward_layernorm.weight"),
        ]
    rules += shared.attention(layer.mixer)
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    return [*rules, linear("block.router", "mlp.gate"), experts("mlp")]
