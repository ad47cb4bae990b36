"""What most families' tensors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcjax.models.decoder import Decoder, Heads, Layer, Routing, segments
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import Rule, keep, linear, vectors


def heads(
    fields: Fields,
    head_dim: int | None = None,
    *,
    theta: float = 1e4,
    share: float = 1.0,
    interleaved: bool = False,
    **more: Any,
) -> Heads:
    """Grouped-query attention as most families have it.

    Args:
      fields: of the config.
      head_dim: where the config has none, None for the width over the number of heads; likewise
        `theta` and `share`.
      theta: base of the rotation.
      share: of a head's features that are rotated.
      interleaved: as in `Rope`.
      **more: attributes of `Heads` to differ in.
    """
    count = fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", head_dim or fields.size("hidden_size") // count)
    rope = fields.rope(fields.rotated(head_dim, share), theta=theta, interleaved=interleaved)
    usual: dict[str, Any] = {
        "heads": count,
        "kv_heads": fields.size("num_key_value_heads", count),
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "rope": rope,
    }
    return Heads(**usual | more)


def both_biases(fields: Fields) -> dict[str, bool]:
    """Biases of all of an attention's projections."""
    bias = fields.flag("attention_bias")
    return {"bias": bias, "out_bias": bias}


def windows(fields: Fields, layers: int, always: bool = False) -> list[int | None]:
    """Each layer's window in families whose last layers have one if `use_sliding_window`.

    Args:
      fields: of the config.
      layers: how many.
      always: whether they have one without that field.
    """
    window = fields.window() if always or fields.flag("use_sliding_window") else None
    first = fields.get("max_window_layers", 28)
    fields.get("sliding_window", None)
    usual = [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(layers)
    ]
    types = fields.layer_types(usual)
    return [window if kind == "sliding_attention" else None for kind in types]


def sigmoid_routing(fields: Fields, normalise: bool = True) -> Routing:
    """DeepSeek-V3's: sigmoid scores, a correction, groups (arXiv 2412.19437, section 2.1.2)."""
    return Routing(
        top_k=fields.size("num_experts_per_tok"),
        score="sigmoid",
        correction=True,
        groups=fields.size("n_group", 1),
        groups_kept=fields.size("topk_group", 1),
        normalise=fields.flag("norm_topk_prob", normalise),
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def model(
    fields: Fields,
    layers: Sequence[Layer],
    norm_eps: float = 1e-6,
    tied: bool = False,
    eps_field: str = "rms_norm_eps",
    **more: Any,
) -> Decoder:
    """A model of these layers, the rest of it read from fields that every family has.

    Args:
      fields: of the config.
      layers: in order.
      norm_eps: where the config has none; likewise `tied`.
      tied: see `norm_eps`.
      eps_field: the config's name for it.
      **more: other attributes of `Decoder`.
    """
    return Decoder(
        vocab_size=fields.size("vocab_size"),
        width=fields.size("hidden_size"),
        segments=segments(layers),
        max_position_embeddings=fields.size("max_position_embeddings"),
        norm_eps=fields.number(eps_field, norm_eps),
        tied=fields.flag("tie_word_embeddings", tied),
        eos_token_ids=fields.eos(),
        **more,
    )


def outside(decoder: Decoder, norm=keep) -> list[Rule]:
    """Embedding, last norm and head."""
    rules = [keep("embedding", "embed_tokens.weight"), norm("norm", "norm.weight")]
    return rules if decoder.tied else [*rules, keep("head", "lm_head.weight")]


def attention(
    spec: Any, norm=keep, out: str = "o_proj", norms: tuple[str, str] = ("q_norm", "k_norm")
) -> list[Rule]:
    """Projections of `Heads`, with what the spec adds to them.

    Args:
      spec: the `Heads`.
      norm: the kind of rule that norms have.
      out: the name of the output projection.
      norms: names of the norms of queries and keys.
    """
    q = spec.heads * spec.head_dim * (2 if spec.gated else 1)
    names = "qk" if spec.shared_values else "qkv"
    sizes = (q, *[spec.kv_heads * spec.head_dim] * (len(names) - 1))
    projections = [f"self_attn.{n}_proj" for n in names]
    rules = [
        linear("mixer.qkv", *projections, sizes=sizes),
        linear("mixer.o", f"self_attn.{out}"),
    ]
    if spec.bias:
        rules.append(vectors("mixer.qkv_bias", *(f"{p}.bias" for p in projections), sizes=sizes))
    if spec.out_bias:
        rules.append(keep("mixer.o_bias", f"self_attn.{out}.bias"))
    if spec.qk_norm is not None and spec.qk_norm.scale:
        both = zip("qk", norms, strict=True)
        rules += [norm(f"mixer.{n}_norm", f"self_attn.{name}.weight") for n, name in both]
    if spec.sinks:
        rules.append(keep("mixer.sinks", "self_attn.sinks"))
    return rules


def norms_on_both_sides(norm=keep) -> list[Rule]:
    """The four norms of a layer that also normalises what comes out of mixer and block."""
    return [
        norm("mixer_norm", "input_layernorm.weight"),
        norm("mixer_after", "post_attention_layernorm.weight"),
        norm("block_norm", "pre_feedforward_layernorm.weight"),
        norm("block_after", "post_feedforward_layernorm.weight"),
    ]


def norms(norm=keep) -> list[Rule]:
    """The two norms of a layer that normalises before mixer and block."""
    return [
        norm("mixer_norm", "input_layernorm.weight"),
        norm("block_norm", "post_attention_layernorm.weight"),
    ]
