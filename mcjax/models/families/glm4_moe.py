"""GLM-4.5 and Solar-Open: grouped queries partly rotated, DeepSeek-V3's experts."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, QKNorm
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields

MODEL_TYPES = ("glm4_moe", "solar_open")
NAME = "GLM-4.5, Solar-Open"
CHECKED = "partial rotation, groups of experts, norms of queries and keys or none, biases"


def decoder(fields: Fields) -> Decoder:
    """Describes a GLM-4.5 or a Solar-Open from its config."""
    fields.only("hidden_act", "silu")
    solar = fields.get("model_type") == "solar_open"
    mixer = shared.heads(
        fields,
        128 if solar else None,
        theta=1e6 if solar else 1e4,
        share=1.0 if solar else 0.5,
        bias=fields.flag("attention_bias"),
        qk_norm=QKNorm() if fields.flag("use_qk_norm") else None,
    )
    routing = shared.sigmoid_routing(fields)
    sparse = deepseek_v3.routed(fields, routing, 1)
    each = deepseek_v3.blocks(fields, sparse, 0 if solar else 1)
    layers = [Layer(mixer=mixer, block=block) for block in each]
    return shared.model(fields, layers, norm_eps=1e-5)


outside, tensors = shared.outside, deepseek_v3.tensors
