"""Mixtral (arXiv 2401.04088)."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import NUMBERED, experts, gated, linear

MODEL_TYPES = ("mixtral",)
NAME = "Mixtral"
CHECKED = "every stretching of the rotation, windows, both layouts of experts"


def decoder(fields: Fields) -> Decoder:
    """Describes a Mixtral from its config."""
    fields.only("hidden_act", "silu")
    layer = Layer(
        mixer=shared.heads(fields, theta=1e6, window=fields.window()),
        block=Routed(
            experts=fields.size("num_local_experts"),
            width=fields.size("intermediate_size"),
            routing=Routing(top_k=fields.size("num_experts_per_tok")),
        ),
    )
    return shared.model(fields, [layer] * fields.size("num_hidden_layers"), norm_eps=1e-5)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer; published checkpoints name experts' projections w1, w3, w2."""
    at = "block_sparse_moe.experts.{e}"
    old = [linear("block.router", "block_sparse_moe.gate"), *gated("block.experts", at, NUMBERED)]
    new = [linear("block.router", "mlp.gate"), *experts("mlp")[1]]
    return [*shared.norms(), *shared.attention(layer.mixer), (old, new)]
