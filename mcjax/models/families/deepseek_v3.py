"""DeepSeek-V3 (arXiv 2412.19437): latent attention, experts chosen in groups by sigmoid scores.

Kimi-K2 (arXiv 2507.20534) and GLM-4.7-Flash have the same layers.
"""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Latent, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.latent import attention, latent
from mcjax.models.families.tensors import experts, gated, keep, linear

MODEL_TYPES = ("deepseek_v3", "kimi_k2", "glm4_moe_lite")
NAME = "DeepSeek-V3, Kimi-K2, GLM-4.7-Flash"
CHECKED = "latent queries or none, groups of experts, biases, yarn, both orders of rotated pairs"


def decoder(fields: Fields) -> Decoder:
    """Describes a DeepSeek-V3 from its config."""
    return of_layers(fields, latent(fields))


def of_layers(fields: Fields, mixer: Latent) -> Decoder:
    """The rest of it, around the attention of each layer."""
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    fields.only("mlp_bias", False)
    sparse = routed(fields, shared.sigmoid_routing(fields))
    each = blocks(fields, sparse)
    return shared.model(fields, [Layer(mixer=mixer, block=block) for block in each])


def routed(fields: Fields, routing: Routing, shared_experts: int = 0) -> Routed:
    """Experts with this routing, and shared ones: so many where the config does not say."""
    width = fields.size("moe_intermediate_size")
    return Routed(
        experts=fields.size("n_routed_experts", fields.get("num_local_experts", None)),
        width=width,
        routing=routing,
        shared=width * fields.get("n_shared_experts", shared_experts),
    )


def blocks(fields: Fields, sparse: Routed, first: int = 0) -> list[Dense | Routed]:
    """The network of each layer; the `first` ones are dense where the config does not say.

    Raises:
      ValueError: if the config does not say one of "dense" and "sparse" for each layer.
    """
    count, first = fields.size("num_hidden_layers"), fields.get("first_k_dense_replace", first)
    kinds = fields.get("mlp_layer_types", ["dense"] * first + ["sparse"] * (count - first))
    if len(kinds) != count or not set(kinds) <= {"dense", "sparse"}:
        raise ValueError(f"config: mlp_layer_types {kinds} of {count} layers, dense or sparse")
    if "dense" not in kinds:
        fields.get("intermediate_size", None)
        return [sparse] * count
    dense = Dense(width=fields.size("intermediate_size"))
    return [dense if kind == "dense" else sparse for kind in kinds]


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    mixer = layer.mixer
    rules = [*shared.norms()]
    rules += attention(mixer) if isinstance(mixer, Latent) else shared.attention(mixer)
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    rules += [linear("block.router", "mlp.gate")]
    if layer.block.routing.correction:
        rules.append(keep("block.correction", "mlp.gate.e_score_correction_bias"))
    if layer.block.shared:
        rules += gated("block.shared", "mlp.shared_experts")
    return [*rules, experts("mlp")]
