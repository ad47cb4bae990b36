"""Mistral 4: latent attention with tempered queries, experts by softmax of the best groups."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, Routing, Temperature
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.latent import latent

MODEL_TYPES = ("mistral4",)
NAME = "Mistral 4"
CHECKED = "tempered queries, latent queries or none, groups of experts, yarn"


def decoder(fields: Fields) -> Decoder:
    """Describes a Mistral 4 from its config."""
    fields.only("hidden_act", "silu")
    given = fields.get("rope_parameters")
    fields.of_rope.add("llama_4_scaling_beta")
    beta, length = given.get("llama_4_scaling_beta"), given.get("original_max_position_embeddings")
    tempered = Temperature(scale=beta, length=length) if beta else None
    mixer = latent(fields, temperature=tempered)
    routing = Routing(
        top_k=fields.size("num_experts_per_tok"),
        groups=fields.size("n_group", 1),
        groups_kept=fields.size("topk_group", 1),
        normalise=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    sparse = deepseek_v3.routed(fields, routing, 1)
    each = deepseek_v3.blocks(fields, sparse)
    layers = [Layer(mixer=mixer, block=block) for block in each]
    return shared.model(fields, layers)


outside, tensors = shared.outside, deepseek_v3.tensors
