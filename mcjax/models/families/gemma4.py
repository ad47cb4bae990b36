"""Gemma 4, text, without embeddings for each layer: experts beside a network, each normalised."""

from __future__ import annotations

from dataclasses import replace

from mcjax.models.decoder import (
    Activation,
    Decoder,
    Dense,
    Heads,
    Layer,
    QKNorm,
    Routed,
    Routing,
)
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import gated, keep, linear, two_in_one

MODEL_TYPES = ("gemma4_text",)
NAME = "Gemma 4 (text)"
CHECKED = (
    "experts beside a network, shared keys and values, two sizes of heads, proportional "
    "rotation; embeddings for each layer are refused"
)


def decoder(fields: Fields) -> Decoder:
    """Describes a Gemma 4 from its config."""
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    fields.only("use_bidirectional_attention", None, "vision")
    fields.only("num_kv_shared_layers", 0)
    if fields.get("hidden_size_per_layer_input", 256):
        raise ValueError(
            "config: hidden_size_per_layer_input is not 0: embeddings for each layer, which the "
            "small models have, are not supported"
        )
    fields.get("vocab_size_per_layer_input", None)
    fields.get("use_double_wide_mlp", None)  # of layers that share keys
    width, count = fields.size("hidden_size"), fields.size("num_hidden_layers")
    fields.get("rope_parameters")  # which differ between layers, so none is the usual one
    usual = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(count)]
    types = [*fields.layer_types(usual)[:-1], "full_attention"]
    local = Heads(
        heads=fields.size("num_attention_heads"),
        kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim", 256),
        scale=1.0,
        rope=fields.rope(fields.size("head_dim", 256), "sliding_attention"),
        window=fields.size("sliding_window", 512),
        qk_norm=QKNorm(),
        value_norm=True,
        bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
    )
    head_dim, kv_heads = fields.size("global_head_dim", 512), local.kv_heads
    alike = fields.flag("attention_k_eq_v")
    everywhere = fields.get("num_global_key_value_heads", None)
    # As transformers 5 writes it: what differs in a layer, here in those of full attention.
    own = {int(i): given for i, given in fields.get("per_layer_config", {}).items()}
    differing = {tuple(sorted(given.items())) for given in own.values()}
    if own and (len(differing) > 1 or any(types[i] != "full_attention" for i in own)):
        raise ValueError(f"config: per_layer_config {own} is not alike in all full attention")
    given = dict(*differing)
    head_dim = given.pop("head_dim", head_dim)
    kv_heads = given.pop("num_key_value_heads", everywhere if alike and everywhere else kv_heads)
    if given:
        raise ValueError(f"config: per_layer_config has {given}, which is not supported")
    full = replace(
        local,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=fields.rope(head_dim, "full_attention", 1e6),
        window=None,
        shared_values=alike,
    )
    activation = Activation(kind="gelu_tanh")
    mlp = fields.size("intermediate_size")
    block: Dense | Routed = Dense(width=mlp, activation=activation)
    for name in ("num_experts", "moe_intermediate_size", "top_k_experts"):
        fields.get(name, None)
    if fields.flag("enable_moe_block"):
        block = Routed(
            experts=fields.size("num_experts"),
            width=fields.size("moe_intermediate_size"),
            routing=Routing(top_k=fields.size("top_k_experts"), norm=True, expert_scale=True),
            activation=activation,
            shared=mlp,
            apart=True,
        )
    mixers = {"sliding_attention": local, "full_attention": full}
    layers = [Layer(mixer=mixers[k], block=block, norms="both", scaled=True) for k in types]
    return shared.model(
        fields,
        layers,
        embedding_scale=width**0.5,
        logit_cap=fields.get("final_logit_softcapping", None),
        tied=True,
    )


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = [
        *shared.norms_on_both_sides(),
        keep("scale", "layer_scalar"),
        *shared.attention(layer.mixer),
    ]
    if isinstance(layer.block, Dense):
        return rules + gated("block", "mlp")
    return [
        *rules,
        linear("block.router", "router.proj"),
        keep("block.router_norm", "router.scale"),
        keep("block.expert_scale", "router.per_expert_scale"),
        keep("block.experts_norm", "pre_feedforward_layernorm_2.weight"),
        keep("block.experts_after", "post_feedforward_layernorm_2.weight"),
        keep("block.shared_after", "post_feedforward_layernorm_1.weight"),
        *gated("block.shared", "mlp"),
        *two_in_one("block.experts", "experts.gate_up_proj", "experts.down_proj"),
    ]
