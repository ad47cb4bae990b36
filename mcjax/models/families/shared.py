"""What most families' tensors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcjax.models.decoder import Decoder, Layer, segments
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import Rule, keep, linear, vectors


def model(
    fields: Fields,
    layers: Sequence[Layer],
    norm_eps: float = 1e-6,
    tied: bool = False,
    **more: Any,
) -> Decoder:
    """A model of these layers, the rest of it read from fields that every family has.

    Args:
      fields: of the config.
      layers: in order.
      norm_eps: where the config has none; likewise `tied`.
      tied: see `norm_eps`.
      **more: other attributes of `Decoder`.
    """
    return Decoder(
        vocab_size=fields.size("vocab_size"),
        width=fields.size("hidden_size"),
        segments=segments(layers),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", norm_eps),
        tied=fields.flag("tie_word_embeddings", tied),
        eos_token_ids=fields.eos(),
        **more,
    )


def outside(decoder: Decoder, norm=keep) -> list[Rule]:
    """Embedding, last norm and head."""
    rules = [keep("embedding", "embed_tokens.weight"), norm("norm", "norm.weight")]
    return rules if decoder.tied else [*rules, keep("head", "lm_head.weight")]


def attention(spec: Any, norm=keep) -> list[Rule]:
    """Projections of `Heads`, with what the spec adds to them."""
    q = spec.heads * spec.head_dim * (2 if spec.gated else 1)
    sizes = (q, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
    projections = [f"self_attn.{n}_proj" for n in "qkv"]
    rules = [
        linear("mixer.qkv", *projections, sizes=sizes),
        linear("mixer.o", "self_attn.o_proj"),
    ]
    if spec.bias:
        rules.append(vectors("mixer.qkv_bias", *(f"{p}.bias" for p in projections), sizes=sizes))
    if spec.out_bias:
        rules.append(keep("mixer.o_bias", "self_attn.o_proj.bias"))
    if spec.qk_norm:
        rules += [norm(f"mixer.{n}_norm", f"self_attn.{n}_norm.weight") for n in "qk"]
    if spec.sinks:
        rules.append(keep("mixer.sinks", "self_attn.sinks"))
    return rules


def norms(norm=keep) -> list[Rule]:
    """The two norms of a layer that normalises before mixer and block."""
    return [
        norm("mixer_norm", "input_layernorm.weight"),
        norm("block_norm", "post_attention_layernorm.weight"),
    ]
