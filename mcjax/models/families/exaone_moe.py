"""K-EXAONE: local layers rotated, global ones not, DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm, Routed
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, keep, linear

MODEL_TYPES = ("exaone_moe",)
NAME = "K-EXAONE"
CHECKED = "local layers rotated and global ones not, groups of experts, dense first layer"


def decoder(fields: Fields) -> Decoder:
    """Describes a K-EXAONE from its config."""
    fields.only("hidden_act", "silu")
    window, count = fields.window(), fields.size("num_hidden_layers")
    every = fields.get("sliding_window_pattern", 4)
    if isinstance(every, str):  # "LLLG": local and global
        local_ones = [every[i % len(every)] == "L" for i in range(count)]
    else:
        local_ones = [window is not None and (i + 1) % every != 0 for i in range(count)]
    usual = ["sliding_attention" if own else "full_attention" for own in local_ones]
    local = shared.heads(fields, qk_norm=QKNorm(), window=window)
    mixers = {
        "sliding_attention": local,
        # Without any window every layer is rotated.
        "full_attention": local if window is None else replace(local, window=None, rope=None),
    }
    width = fields.size("moe_intermediate_size")
    sparse = Routed(
        experts=fields.size("num_experts", fields.get("num_local_experts", None)),
        width=width,
        routing=shared.sigmoid_routing(fields),
        shared=width * fields.get("num_shared_experts", 1),
    )
    each = zip(fields.layer_types(usual), deepseek_v3.blocks(fields, sparse, 1), strict=True)
    layers = [Layer(mixer=mixers[kind], block=block) for kind, block in each]
    return shared.model(fields, layers, norm_eps=1e-5)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules: list = [*shared.norms(), *shared.attention(layer.mixer)]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    rules += [
        linear("block.router", "mlp.gate"),
        keep("block.correction", "mlp.e_score_correction_bias"),
        experts("mlp"),
    ]
    return rules + (gated("block.shared", "mlp.shared_experts") if layer.block.shared else [])
