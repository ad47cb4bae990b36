"""Hunyuan-A13B: queries and keys normalised after their rotation, a shared expert."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear

MODEL_TYPES = ("hunyuan_v1_moe",)
NAME = "Hunyuan-A13B"
CHECKED = "norms after the rotation, shared expert"


def decoder(fields: Fields) -> Decoder:
    """Describes a Hunyuan-A13B from its config."""
    fields.only("hidden_act", "silu")
    width, count = fields.size("intermediate_size"), fields.size("num_hidden_layers")
    _fold_alpha(fields)
    layer = Layer(
        mixer=shared.heads(fields, qk_norm=QKNorm(rotated=True), **shared.both_biases(fields)),
        block=Routed(
            experts=_same(fields, "num_experts", count),
            width=width,
            routing=Routing(top_k=_same(fields, "moe_topk", count)),
            shared=width,
        ),
    )
    return shared.model(fields, [layer] * count, norm_eps=1e-5)


def _fold_alpha(fields: Fields) -> None:
    """Makes of a "dynamic" rotation with an alpha, whose base is fixed, the usual one of that base.

    theta' = theta alpha^(d / (d - 2))
    """
    for name in ("rope_parameters", "rope_scaling"):
        given = fields.values.get(name) or {}
        if given.get("alpha") and given.get("type", given.get("rope_type")) == "dynamic":
            heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
            d = fields.size("head_dim", width // heads)
            theta = given.get("rope_theta", fields.get("rope_theta", 1e4))
            base = theta * given["alpha"] ** (d / (d - 2))
            fields.values[name] = {"rope_type": "default", "rope_theta": base}


def _same(fields: Fields, name: str, layers: int) -> int:
    """A size that the config may give for each layer, alike in all."""
    value = fields.get(name)
    values = set(value[:layers]) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ValueError(f"config: {name} differs between layers, which is not supported: {value}")
    return values.pop()


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    return [
        *shared.norms(),
        *shared.attention(layer.mixer, norms=("query_layernorm", "key_layernorm")),
        linear("block.router", "mlp.gate.wg"),
        *gated("block.shared", "mlp.shared_mlp"),
        experts("mlp"),
    ]
