"""Mixtral (arXiv 2401.04088)."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Heads, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, linear

MODEL_TYPES = ("mixtral",)


def decoder(fields: Fields) -> Decoder:
    """Describes a Mixtral from its config."""
    fields.only("hidden_act", "silu")
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", width // heads)
    layer = Layer(
        mixer=Heads(
            heads=heads,
            kv_heads=fields.size("num_key_value_heads", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            rope=fields.rope(head_dim, theta=1e6),
            window=fields.window(),
        ),
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
    named = [
        linear(f"block.experts.{ours}", f"{at}.{theirs}")
        for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ]
    old = [linear("block.router", "block_sparse_moe.gate"), *named]
    new = [linear("block.router", "mlp.gate"), *experts("mlp")[1]]
    return [*shared.norms(), *shared.attention(layer.mixer), (old, new)]
