"""Gemma 3, text (arXiv 2503.19786): norms on both sides, windows in most layers."""

from __future__ import annotations

from mcjax.models.decoder import Activation, Decoder, Dense, Heads, Layer, QKNorm
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import gated, plus_one

MODEL_TYPES = ("gemma3_text",)
NAME = "Gemma 3 (text)"
CHECKED = "two bases of the rotation, windows, caps of logits, inside its wrapper"


def decoder(fields: Fields) -> Decoder:
    """Describes a Gemma 3 from its config."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("attn_logit_softcapping", None)  # which the reference reads and does not apply
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim, count = fields.size("head_dim", 256), fields.size("num_hidden_layers")
    window, bias = fields.size("sliding_window", 4096), fields.flag("attention_bias")
    every = fields.get("_sliding_window_pattern", fields.get("sliding_window_pattern", 6))
    usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    local = fields.number("rope_local_base_freq", 10000.0)
    ropes = {"full_attention": fields.rope(head_dim, "full_attention", 1e6)}
    if "sliding_attention" in (fields.get("rope_parameters", None) or {}):
        ropes["sliding_attention"] = fields.rope(head_dim, "sliding_attention", local)
    else:  # transformers 4: local layers have a base of their own and no stretching
        plain = Fields({"max_position_embeddings": fields.get("max_position_embeddings")})
        ropes["sliding_attention"] = plain.rope(head_dim, theta=local)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    block = Dense(width=fields.size("intermediate_size"), activation=Activation(kind="gelu_tanh"))
    layers = [
        Layer(
            mixer=Heads(
                heads=heads,
                kv_heads=fields.size("num_key_value_heads", heads),
                head_dim=head_dim,
                scale=scale,
                rope=ropes[kind],
                window=window if kind == "sliding_attention" else None,
                bias=bias,
                out_bias=bias,
                qk_norm=QKNorm(),
            ),
            block=block,
            norms="both",
        )
        for kind in fields.layer_types(usual)
    ]
    return shared.model(
        fields,
        layers,
        embedding_scale=width**0.5,
        logit_cap=fields.get("final_logit_softcapping", None),
        tied=True,
    )


def outside(decoder: Decoder) -> list:
    """Embedding and last norm."""
    return shared.outside(decoder, plus_one)


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    return [
        *shared.norms_on_both_sides(plus_one),
        *shared.attention(layer.mixer, plus_one),
        *gated("block", "mlp"),
    ]
