"""Llama 4, text: chunks of attention, layers that are not rotated, few experts of scaled inputs."""

from __future__ import annotations

from typing import Any

from mcjax.models.decoder import Decoder, Dense, Layer, QKNorm, Routed, Routing, Temperature
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import experts, fused, gated, keep, linear

MODEL_TYPES = ("llama4_text",)
NAME = "Llama 4 (text)"
CHECKED = (
    "chunks, layers not rotated, temperatures, top-1 and top-2 of scaled inputs, dense layers "
    "between"
)


def decoder(fields: Fields) -> Decoder:
    """Describes a Llama 4 from its config."""
    fields.only("hidden_act", "silu")
    fields.get("for_llm_compressor", None)
    count = fields.size("num_hidden_layers")
    every = fields.size("no_rope_layer_interval", 4)
    rotated = fields.get("no_rope_layers", ()) or [(i + 1) % every != 0 for i in range(count)]
    if len(rotated) != count:
        raise ValueError(f"config: {len(rotated)} no_rope_layers for {count} layers")
    chunk: int | None = fields.size("attention_chunk_size", 8192)
    if fields.values.get("attention_chunk_size", chunk) is None:
        chunk = None
    types = fields.layer_types(
        ["chunked_attention" if r and chunk else "full_attention" for r in rotated],
        ("full_attention", "chunked_attention"),
    )
    head_dim = fields.size("head_dim", 128)
    rope = fields.rope(head_dim, theta=5e5, interleaved=True)
    norm = QKNorm(scale=False, rotated=True) if fields.flag("use_qk_norm", True) else None
    length, scale = fields.size("floor_scale", 8192), fields.number("attn_scale", 0.1)
    tuned = None
    if fields.flag("attn_temperature_tuning", True):
        tuned = Temperature(scale=scale, length=length, shift=1)
    biases: dict[str, Any] = shared.both_biases(fields)

    def mixer(rotated, kind):
        local: Any = {"window": chunk, "chunked": True} if kind == "chunked_attention" else {}
        if rotated:
            return shared.heads(fields, head_dim, rope=rope, qk_norm=norm, **local, **biases)
        return shared.heads(fields, head_dim, rope=None, temperature=tuned, **local, **biases)

    width = fields.size("intermediate_size")
    routed = Routed(
        experts=fields.size("num_local_experts"),
        width=width,
        routing=Routing(
            top_k=fields.size("num_experts_per_tok", 1),
            score="sigmoid",
            normalise=False,
            inputs=True,
        ),
        shared=width,
    )
    step = fields.size("interleave_moe_layer_step", 1)
    sparse = fields.get("moe_layers", range(step - 1, count, step))
    dense = Dense(width=fields.size("intermediate_size_mlp", 16384))
    layers = [
        Layer(mixer=mixer(r, kind), block=routed if i in sparse else dense)
        for i, (r, kind) in enumerate(zip(rotated, types, strict=True))
    ]
    return shared.model(fields, layers, norm_eps=1e-5)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = [*shared.norms(), *shared.attention(layer.mixer)]
    at = "feed_forward"
    if isinstance(layer.block, Dense):
        return rules + gated("block", at)
    gate, up, down = (f"block.experts.{n}" for n in ("gate", "up", "down"))
    return [
        *rules,
        linear("block.router", f"{at}.router"),
        *gated("block.shared", f"{at}.shared_expert"),
        (
            [
                fused(gate, up, f"{at}.experts.gate_up_proj", -1, False),
                keep(down, f"{at}.experts.down_proj"),
            ],
            experts(at)[0],  # of checkpoints that llm-compressor made
        ),
    ]
