"""Qwen3-Next and Qwen3.5-MoE: three layers of the gated delta rule, then one of gated attention."""

from __future__ import annotations

from typing import Any

from mcjax.models.decoder import Decoder, Delta, Heads, Layer, QKNorm
from mcjax.models.families import qwen3_moe, shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import by_head, keep, linear, plus_one, squeezed

MODEL_TYPES = ("qwen3_next", "qwen3_5_moe_text")
NAME = "Qwen3-Next, Qwen3.5-MoE (text)"
CHECKED = (
    "gated delta rule and gated attention in turns and mixed, both layouts of projections, "
    "partial rotation"
)


def decoder(fields: Fields) -> Decoder:
    """Describes a Qwen3-Next from its config."""
    fields.only("hidden_act", "silu")
    fields.only("attn_output_gate", True)
    fields.get("mamba_ssm_dtype", None)  # of the recurrent state, which is float32 here
    count = fields.size("num_hidden_layers")
    mixers: dict[str, Any] = {
        "full_attention": shared.heads(
            fields,
            share=0.25,
            qk_norm=QKNorm(),
            gated=True,
            **shared.both_biases(fields),
        ),
        "linear_attention": Delta(
            key_heads=fields.size("linear_num_key_heads"),
            value_heads=fields.size("linear_num_value_heads"),
            key_dim=fields.size("linear_key_head_dim"),
            value_dim=fields.size("linear_value_head_dim"),
            kernel=fields.size("linear_conv_kernel_dim"),
        ),
    }
    every = fields.size("full_attention_interval", 4)
    usual = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    types = fields.layer_types(usual, mixers)
    each = qwen3_moe.blocks(fields, True, **qwen3_moe.shared_expert(fields))
    layers = [Layer(mixer=mixers[k], block=block) for k, block in zip(types, each, strict=True)]
    return shared.model(fields, layers)


def outside(decoder: Decoder) -> list:
    """Embedding, last norm and head."""
    return shared.outside(decoder, plus_one)


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    m: Any = layer.mixer
    rules: list = shared.norms(plus_one)
    if isinstance(m, Heads):
        rules += shared.attention(m, plus_one)
    else:
        at, each = "linear_attn", m.value_heads // m.key_heads
        values = each * m.value_dim
        together = [
            linear("mixer.qkvz", f"{at}.in_proj_qkvz"),
            linear("mixer.ba", f"{at}.in_proj_ba"),
        ]
        qkv = f"{at}.in_proj_qkv", (m.key_dim, m.key_dim, values)
        apart = [
            by_head("mixer.qkvz", m.key_heads, qkv, (f"{at}.in_proj_z", (values,))),
            by_head(
                "mixer.ba", m.key_heads, (f"{at}.in_proj_b", (each,)), (f"{at}.in_proj_a", (each,))
            ),
        ]
        rules += [
            (together, apart),
            squeezed("mixer.conv", "linear_attn.conv1d.weight"),
            keep("mixer.dt_bias", "linear_attn.dt_bias"),
            keep("mixer.decay", "linear_attn.A_log"),
            keep("mixer.norm", "linear_attn.norm.weight"),
            linear("mixer.o", "linear_attn.out_proj"),
        ]
    return rules + qwen3_moe.network(layer.block)
