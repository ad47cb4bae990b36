"""The shape of a Mixtral, as Hugging Face's config.json describes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcjax.models.rope import ROPE_TYPES, RopeConfig


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """Sizes and constants of a Mixtral; names follow Hugging Face.

    Attributes:
      sliding_window: keys a query can see, itself included; None for all before it.
      eos_token_ids: tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    rope: RopeConfig = RopeConfig()  # noqa: RUF009, frozen
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"config: {field.name} must be a positive integer, got {value!r}")
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(
                f"config: sliding_window must be a positive integer or null, got {window!r}"
            )
        for token in self.eos_token_ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"config: eos_token_id must be 0 to {self.vocab_size - 1}, got {token!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"config: head_dim must be even for rotary embeddings: {self.head_dim}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"config: {self.num_experts_per_tok} experts per token of {self.num_local_experts}"
            )
        if self.rope.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"config: unknown rope type {self.rope.rope_type!r}; one of {ROPE_TYPES}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MixtralConfig:
        """Rebuilds what `to_dict` wrote."""
        rope: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["rope"].items()
        }
        eos = tuple(values["eos_token_ids"])
        return cls(**{**values, "rope": RopeConfig(**rope), "eos_token_ids": eos})

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> MixtralConfig:
        """Reads a config.json, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes it.

        Raises:
          ValueError: for another architecture, a missing field or an impossible size.
        """
        kind = values.get("model_type")
        if kind != "mixtral":
            raise ValueError(f"config: model_type {kind!r} is not supported; only 'mixtral' is")
        activation = values.get("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(f"config: hidden_act {activation!r} is not supported; only 'silu' is")
        try:
            heads, hidden = values["num_attention_heads"], values["hidden_size"]
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=hidden,
                intermediate_size=values["intermediate_size"],
                num_hidden_layers=values["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=values.get("num_key_value_heads") or heads,
                head_dim=values.get("head_dim") or hidden // heads,
                num_local_experts=values["num_local_experts"],
                num_experts_per_tok=values["num_experts_per_tok"],
                max_position_embeddings=values["max_position_embeddings"],
                rms_norm_eps=float(values.get("rms_norm_eps", 1e-5)),
                sliding_window=values.get("sliding_window"),
                tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
                rope=_rope(values),
                eos_token_ids=_eos(values),
            )
        except KeyError as error:
            raise ValueError(f"config: field {error.args[0]!r} is missing") from None
        except TypeError as error:
            raise ValueError(f"config: a field has the wrong type: {error}") from None


def _eos(values: Mapping[str, Any]) -> tuple[Any, ...]:
    given = values.get("eos_token_id")
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)


def _rope(values: Mapping[str, Any]) -> RopeConfig:
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    given["rope_type"] = given.pop("type", None) or given.get("rope_type") or "default"
    theta = given.get("rope_theta") or values.get("rope_theta")
    if theta is None:
        theta = 1e6  # transformers' default for Mixtral
    fields = {field.name for field in dataclasses.fields(RopeConfig)}
    known = {k: v for k, v in given.items() if k in fields and v is not None}
    known["rope_theta"] = float(theta)
    for name in ("short_factor", "long_factor"):
        known[name] = tuple(float(v) for v in known.get(name, ()))
    if known["rope_type"] in ("yarn", "llama3", "longrope"):
        longest = values["max_position_embeddings"]
        original = known.get("original_max_position_embeddings") or longest
        # transformers lets the field outside the rope parameters win.
        original = values.get("original_max_position_embeddings") or original
        known["original_max_position_embeddings"] = original
        known.setdefault("factor", longest / original)
    if not math.isfinite(known["rope_theta"]) or known["rope_theta"] <= 0:
        raise ValueError(f"config: rope_theta must be positive, got {theta!r}")
    return RopeConfig(**known)
