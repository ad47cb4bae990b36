"""What families with latent attention have in common."""

from __future__ import annotations

import math
from typing import Any

from mcjax.models.decoder import Latent
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import Rule, keep, linear

AT = "self_attn"


def latent(fields: Fields, *, interleaved: bool | None = None, **more: Any) -> Latent:
    """Latent attention from a config.

    Args:
      fields: of the config.
      interleaved: whether neighbours are rotated, None for what `rope_interleave` says.
      **more: attributes of `Latent` to add.
    """
    heads, nope = fields.size("num_attention_heads"), fields.size("qk_nope_head_dim")
    fields.only("num_key_value_heads", heads)
    fields.get("qk_head_dim", None)
    fields.get("partial_rotary_factor", None)  # the rotated features are counted apart
    if interleaved is None:
        interleaved = fields.flag("rope_interleave", True)
    rope = fields.rope(fields.size("qk_rope_head_dim"), interleaved=interleaved)
    scale = (nope + rope.dim) ** -0.5
    if rope.config.rope_type != "default" and rope.config.mscale_all_dim and rope.config.factor > 1:
        scale *= (0.1 * rope.config.mscale_all_dim * math.log(rope.config.factor) + 1) ** 2
    return Latent(
        heads=heads,
        query_rank=fields.get("q_lora_rank", None),
        rank=fields.size("kv_lora_rank"),
        nope_dim=nope,
        value_dim=fields.size("v_head_dim"),
        scale=scale,
        rope=rope,
        bias=fields.flag("attention_bias"),
        **more,
    )


def attention(m: Latent) -> list[Rule]:
    """Its tensors."""
    rules = [
        linear("mixer.o", f"{AT}.o_proj"),
        linear("mixer.kv_a", f"{AT}.kv_a_proj_with_mqa"),
        linear("mixer.kv_b", f"{AT}.kv_b_proj"),
        keep("mixer.kv_norm", f"{AT}.kv_a_layernorm.weight"),
    ]
    if m.query_rank is None:
        rules.append(linear("mixer.q", f"{AT}.q_proj"))
    else:
        rules += [linear("mixer.q_a", f"{AT}.q_a_proj"), linear("mixer.q_b", f"{AT}.q_b_proj")]
        rules.append(keep("mixer.q_norm", f"{AT}.q_a_layernorm.weight"))
    if m.bias:
        rules.append(keep("mixer.kv_a_bias", f"{AT}.kv_a_proj_with_mqa.bias"))
        rules.append(keep("mixer.o_bias", f"{AT}.o_proj.bias"))
        if m.query_rank is not None:
            rules.append(keep("mixer.q_a_bias", f"{AT}.q_a_proj.bias"))
    if m.index is not None:
        rules += [
            linear("mixer.index_q", f"{AT}.indexer.wq_b"),
            linear("mixer.index_k", f"{AT}.indexer.wk"),
            keep("mixer.index_norm", f"{AT}.indexer.k_norm.weight"),
            keep("mixer.index_norm_bias", f"{AT}.indexer.k_norm.bias"),
            linear("mixer.index_weight", f"{AT}.indexer.weights_proj"),
        ]
    return rules
