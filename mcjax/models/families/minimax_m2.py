"""MiniMax-M2: heads normalised together and partly rotated, experts by corrected sigmoid scores."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import NUMBERED, experts, keep, linear

MODEL_TYPES = ("minimax_m2",)
NAME = "MiniMax-M2"
CHECKED = "norms over all heads together, partial rotation, corrected sigmoid routing"


def decoder(fields: Fields) -> Decoder:
    """Describes a MiniMax-M2 from its config."""
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "sigmoid")
    fields.only("qk_norm_type", "per_layer")
    fields.only("use_qk_norm", True)
    fields.only("use_routing_bias", True)
    fields.only("shared_intermediate_size", 0)
    fields.only("attn_type_list", [1] * fields.size("num_hidden_layers"))
    for name in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers"):  # of tokens further on
        fields.get(name, None)
    layer = Layer(
        mixer=shared.heads(fields, 128, theta=5e6, qk_norm=QKNorm(over="all")),
        block=Routed(
            experts=fields.size("num_local_experts"),
            width=fields.size("intermediate_size"),
            routing=Routing(
                top_k=fields.size("num_experts_per_tok"), score="sigmoid", correction=True
            ),
        ),
    )
    return shared.model(fields, [layer] * fields.size("num_hidden_layers"))


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    moe = "block_sparse_moe"
    old = [
        linear("block.router", f"{moe}.gate"),
        keep("block.correction", f"{moe}.e_score_correction_bias"),
        *experts(moe, NUMBERED)[0],
    ]
    new = [
        linear("block.router", "mlp.gate"),
        keep("block.correction", "mlp.e_score_correction_bias"),
        *experts("mlp")[1],
    ]
    return [*shared.norms(), *shared.attention(layer.mixer), (old, new)]
