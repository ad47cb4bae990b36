"""DeepSeek-V2 (arXiv 2405.04434): latent attention, experts by softmax, of the best groups."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, Routing
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.latent import latent

MODEL_TYPES = ("deepseek_v2",)
NAME = "DeepSeek-V2"
CHECKED = "groups by their best expert or greedy, latent queries or none, yarn with both magnitudes"


def decoder(fields: Fields) -> Decoder:
    """Describes a DeepSeek-V2 from its config."""
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "softmax")
    fields.only("moe_layer_freq", 1)
    fields.only("mlp_bias", False)
    fields.only("norm_topk_prob", False)  # which the reference does not apply
    fields.only("topk_method", "greedy", "group_limited_greedy")
    limited = fields.get("topk_method", "greedy") == "group_limited_greedy"
    groups, kept = fields.get("n_group", 1), fields.get("topk_group", 1)
    routing = Routing(
        top_k=fields.size("num_experts_per_tok"),
        groups=groups if limited else 1,
        groups_kept=kept if limited else 1,
        group_best=1,
        normalise=False,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    sparse = deepseek_v3.routed(fields, routing, 2)
    mixer = latent(fields, interleaved=True)
    each = deepseek_v3.blocks(fields, sparse)
    layers = [Layer(mixer=mixer, block=block) for block in each]
    return shared.model(fields, layers)


outside, tensors = shared.outside, deepseek_v3.tensors
