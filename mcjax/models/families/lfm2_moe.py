"""LFM2-MoE (arXiv 2511.23404): short convolutions, attention in a few layers."""

from __future__ import annotations

from typing import Any

from mcjax.models.decoder import Convolution, Decoder, Dense, Heads, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import NUMBERED, experts, gated, keep, linear, squeezed

MODEL_TYPES = ("lfm2_moe",)
NAME = "LFM2-MoE"
CHECKED = "short convolutions with and without biases, corrected routing or not, dense first layers"


def decoder(fields: Fields) -> Decoder:
    """Describes an LFM2-MoE from its config."""
    count = fields.size("num_hidden_layers")
    heads = shared.heads(fields, theta=1e6, qk_norm=QKNorm())
    convolution = Convolution(kernel=fields.size("conv_L_cache", 3), bias=fields.flag("conv_bias"))
    mixers: dict[str, Any] = {"full_attention": heads, "conv": convolution}
    routed = Routed(
        experts=fields.size("num_experts"),
        width=fields.size("moe_intermediate_size"),
        routing=Routing(
            top_k=fields.size("num_experts_per_tok"),
            score="sigmoid",
            correction=fields.flag("use_expert_bias", True),
            normalise=fields.flag("norm_topk_prob", True),
            floor=1e-6,
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
    )
    dense, first = Dense(width=fields.size("intermediate_size")), fields.get("num_dense_layers", 2)
    layers = [
        Layer(mixer=mixers[kind], block=dense if i < first else routed)
        for i, kind in enumerate(fields.layer_types(["full_attention"] * count, mixers))
    ]
    if fields.get("tie_embedding", None) is not None:  # which wins
        fields.values["tie_word_embeddings"] = fields.flag("tie_embedding")
    return shared.model(fields, layers, norm_eps=1e-5, tied=True, eps_field="norm_eps")


def outside(decoder: Decoder) -> list:
    """Embedding, last norm and head."""
    rules = [keep("embedding", "embed_tokens.weight"), keep("norm", "embedding_norm.weight")]
    return rules if decoder.tied else [*rules, keep("head", "lm_head.weight")]


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    m: Any = layer.mixer
    rules: list = [
        keep("mixer_norm", "operator_norm.weight"),
        keep("block_norm", "ffn_norm.weight"),
    ]
    if isinstance(m, Heads):
        rules += shared.attention(m, out="out_proj", norms=("q_layernorm", "k_layernorm"))
    else:
        rules += [linear("mixer.bcx", "conv.in_proj"), linear("mixer.o", "conv.out_proj")]
        rules.append(squeezed("mixer.conv", "conv.conv.weight"))
        if m.bias:
            rules += [
                keep("mixer.bcx_bias", "conv.in_proj.bias"),
                keep("mixer.conv_bias", "conv.conv.bias"),
                keep("mixer.o_bias", "conv.out_proj.bias"),
            ]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "feed_forward", NUMBERED)
    rules.append(linear("block.router", "feed_forward.gate"))
    if layer.block.routing.correction:
        rules.append(keep("block.correction", "feed_forward.expert_bias"))
    return [*rules, experts("feed_forward", NUMBERED)]
