"""GraniteMoE: Mixtral's layers with multipliers, and perhaps a shared expert."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import linear, two_in_one

MODEL_TYPES = ("granitemoe", "granitemoeshared")
NAME = "GraniteMoE, GraniteMoE-shared"
CHECKED = "all four multipliers, shared expert, biases, tied head"


def decoder(fields: Fields) -> Decoder:
    """Describes a GraniteMoE from its config."""
    fields.only("hidden_act", "silu")
    layer = Layer(
        mixer=shared.heads(
            fields,
            scale=fields.number("attention_multiplier", 1.0),
            **shared.both_biases(fields),
        ),
        block=Routed(
            experts=fields.size("num_local_experts"),
            width=fields.size("intermediate_size"),
            routing=Routing(top_k=fields.size("num_experts_per_tok")),
            shared=fields.get("shared_intermediate_size", 0),
        ),
        residual=fields.number("residual_multiplier", 1.0),
    )
    return shared.model(
        fields,
        [layer] * fields.size("num_hidden_layers"),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=1 / fields.number("logits_scaling", 1.0),
    )


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    moe = "block_sparse_moe"
    old = [
        linear("block.router", f"{moe}.router.layer"),
        *two_in_one("block.experts", f"{moe}.input_linear.weight", f"{moe}.output_linear.weight"),
    ]
    new = [
        linear("block.router", f"{moe}.router"),
        *two_in_one("block.experts", f"{moe}.experts.gate_up_proj", f"{moe}.experts.down_proj"),
    ]
    rules: list = [*shared.norms(), *shared.attention(layer.mixer), (old, new)]
    if isinstance(layer.block, Routed) and layer.block.shared:
        mlp = "shared_mlp"
        rules += two_in_one(
            "block.shared", f"{mlp}.input_linear.weight", f"{mlp}.output_linear.weight"
        )
    return rules
