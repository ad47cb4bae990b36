"""DeepSeek-V3 (arXiv 2412.19437): latent attention, experts chosen in groups by sigmoid scores."""

from __future__ import annotations

import math
from typing import Any

from mcjax.models.decoder import Decoder, Dense, Latent, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, gated, keep, linear

MODEL_TYPES = ("deepseek_v3",)


def decoder(fields: Fields) -> Decoder:
    """Describes a DeepSeek-V3 from its config."""
    fields.only("hidden_act", "silu")
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    heads, nope = fields.size("num_attention_heads"), fields.size("qk_nope_head_dim")
    fields.only("num_key_value_heads", heads)
    fields.get("qk_head_dim", None)
    rope = fields.rope(
        fields.size("qk_rope_head_dim"), interleaved=fields.flag("rope_interleave", True)
    )
    scale = (nope + rope.dim) ** -0.5
    if rope.config.rope_type != "default" and rope.config.mscale_all_dim and rope.config.factor > 1:
        scale *= (0.1 * rope.config.mscale_all_dim * math.log(rope.config.factor) + 1) ** 2
    mixer = Latent(
        heads=heads,
        query_rank=fields.get("q_lora_rank", None),
        rank=fields.size("kv_lora_rank"),
        nope_dim=nope,
        value_dim=fields.size("v_head_dim"),
        scale=scale,
        rope=rope,
        bias=fields.flag("attention_bias"),
    )
    width = fields.size("moe_intermediate_size")
    routed = Routed(
        experts=fields.size("n_routed_experts", fields.get("num_local_experts", None)),
        width=width,
        routing=Routing(
            top_k=fields.size("num_experts_per_tok"),
            score="sigmoid",
            correction=True,
            groups=fields.size("n_group", 1),
            groups_kept=fields.size("topk_group", 1),
            normalise=fields.flag("norm_topk_prob", True),
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        shared=width * fields.get("n_shared_experts", 0),
    )
    dense, first = (
        Dense(width=fields.size("intermediate_size")),
        fields.get("first_k_dense_replace", 0),
    )
    layers = [
        Layer(mixer=mixer, block=dense if i < first else routed)
        for i in range(fields.size("num_hidden_layers"))
    ]
    return shared.model(fields, layers)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    at = "self_attn"
    m: Any = layer.mixer
    rules: list = [*shared.norms(), linear("mixer.o", f"{at}.o_proj")]
    rules += [
        linear("mixer.kv_a", f"{at}.kv_a_proj_with_mqa"),
        linear("mixer.kv_b", f"{at}.kv_b_proj"),
    ]
    rules.append(keep("mixer.kv_norm", f"{at}.kv_a_layernorm.weight"))
    if m.query_rank is None:
        rules.append(linear("mixer.q", f"{at}.q_proj"))
    else:
        rules += [linear("mixer.q_a", f"{at}.q_a_proj"), linear("mixer.q_b", f"{at}.q_b_proj")]
        rules.append(keep("mixer.q_norm", f"{at}.q_a_layernorm.weight"))
    if m.bias:
        rules.append(keep("mixer.kv_a_bias", f"{at}.kv_a_proj_with_mqa.bias"))
        rules.append(keep("mixer.o_bias", f"{at}.o_proj.bias"))
        if m.query_rank is not None:
            rules.append(keep("mixer.q_a_bias", f"{at}.q_a_proj.bias"))
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    rules += [linear("block.router", "mlp.gate")]
    rules.append(keep("block.correction", "mlp.gate.e_score_correction_bias"))
    if layer.block.shared:
        rules += gated("block.shared", "mlp.shared_experts")
    return [*rules, experts("mlp")]
