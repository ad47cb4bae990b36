"""Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, linear

MODEL_TYPES = ("qwen3_moe",)
NAME = "Qwen3-MoE"
CHECKED = "routing normalised or not, top-1, biases, windows, dense layers between"


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen3-MoE from its config."""
    fields.only("hidden_act", "silu")
    window = fields.window() if fields.flag("use_sliding_window") else None
    fields.get("sliding_window", None)
    fields.get("max_window_layers", None)
    mixer = shared.heads(fields, window=window, qk_norm=QKNorm(), **shared.both_biases(fields))
    layers = [Layer(mixer=mixer, block=block) for block in blocks(fields)]
    return shared.model(fields, layers)


def blocks(fields: Fields, normalise: bool = False, **more: Any) -> list[Dense | Routed]:
    """The network of each layer, of all of Qwen's families with experts.

    Args:
      fields: of the config.
      normalise: where the config does not say.
      **more: attributes of `Routed`.
    """
    routed = Routed(
        experts=fields.size("num_experts", fields.get("num_local_experts", None)),
        width=fields.size("moe_intermediate_size"),
        routing=Routing(
            top_k=fields.size("num_experts_per_tok"),
            normalise=fields.flag("norm_topk_prob", normalise),
        ),
        **more,
    )
    count, step = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step", 1)
    without = fields.get("mlp_only_layers", ())
    fields.get("intermediate_size", None)
    sparse = [i not in without and not (i + 1) % step for i in range(count)]
    dense = None if all(sparse) else Dense(width=fields.size("intermediate_size"))
    return [routed if own or dense is None else dense for own in sparse]


def shared_expert(fields: Fields) -> dict[str, Any]:
    """The attributes of `Routed` that are about a gated shared expert."""
    return {"shared": fields.size("shared_expert_intermediate_size"), "shared_gate": True}


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    return [*shared.norms(), *shared.attention(layer.mixer), *network(layer.block)]


def network(block: Dense | Routed) -> list:
    """Those of its network."""
    if isinstance(block, Dense):
        return gated("block", "mlp")
    rules: list = [linear("block.router", "mlp.gate"), experts("mlp")]
    if block.shared:
        rules.append(linear("block.shared_gate", "mlp.shared_expert_gate"))
        rules += gated("block.shared", "mlp.shared_expert")
    return rules
