"""gpt-oss (arXiv 2508.10925): sinks, windows in every other layer, biased experts with limits."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import Activation, Decoder, Layer, Routed, Routing
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import interleaved, keep, linear

MODEL_TYPES = ("gpt_oss",)
NAME = "gpt-oss"
CHECKED = "sinks, windows, yarn, limits of the activation; MXFP4"


def decoder(fields: Fields) -> Decoder:
    """Describes a gpt-oss from its config."""
    fields.only("hidden_act", "silu")
    count, window = fields.size("num_hidden_layers"), fields.window()
    bias = fields.flag("attention_bias", True)
    mixer = shared.heads(fields, theta=150000.0, bias=bias, out_bias=bias, sinks=True)
    mixers = {"sliding_attention": replace(mixer, window=window), "full_attention": mixer}
    top_k = fields.size("num_experts_per_tok", fields.get("experts_per_token", None))
    block = Routed(
        experts=fields.size("num_local_experts"),
        width=fields.size("intermediate_size"),
        routing=Routing(top_k=top_k, bias=True),
        activation=Activation(
            alpha=fields.number("swiglu_alpha", 1.702),
            limit=fields.number("swiglu_limit", 7.0),
            shift=1.0,
        ),
        bias=True,
    )
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    layers = [Layer(mixer=mixers[kind], block=block) for kind in fields.layer_types(usual)]
    return shared.model(fields, layers, norm_eps=1e-5)


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    gate, up, down = (f"block.experts.{n}" for n in ("gate", "up", "down"))
    return [
        *shared.norms(),
        *shared.attention(layer.mixer),
        linear("block.router", "mlp.router"),
        keep("block.router_bias", "mlp.router.bias"),
        interleaved(gate, up, "mlp.experts.gate_up_proj"),
        interleaved(gate + "_bias", up + "_bias", "mlp.experts.gate_up_proj_bias"),
        keep(down, "mlp.experts.down_proj"),
        keep(down + "_bias", "mlp.experts.down_proj_bias"),
    ]
