"""The fields of a config.json, of which none may go unread."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mcjax.models.rope import ROPE_TYPES, Rope, RopeConfig

_MISSING = object()

ATTENTION_TYPES = ("full_attention", "sliding_attention")

HARMLESS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "eod_token_id",
        "ep_size",
        "experts_implementation",
        "head_dim",
        "hidden_dropout",
        "id2label",
        "initial_context_length",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "mtp_num_hidden_layers",
        "num_nextn_predict_layers",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "sep_token_id",
        "seq_aux",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    )
)
"""Fields that change no logit of a model as it is served (`head_dim` where it is derived)."""


class Fields:
    """Reads fields of a config by name, with types, and refuses those that nobody read."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.read: set[str] = set()
        # What may stand among the rotation's parameters and is read elsewhere. Of text all sections
        # of mrope have the same positions.
        self.of_rope = {"type", "rope_type", "max_position_embeddings"}
        self.of_rope |= {"partial_rotary_factor", "mrope_section", "mrope_interleaved"}

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """A field's value; `default` where it is missing or null.

        Raises:
          ValueError: if it is missing and has no default.
        """
        self.read.add(name)
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise ValueError(f"config: field {name!r} is missing")
        return default

    def size(self, name: str, default: Any = _MISSING) -> int:
        """A positive integer.

        Raises:
          ValueError: if it is not one.
        """
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        return value

    def window(self) -> int | None:
        """Keys that a query can see, None for all before it."""
        return None if self.get("sliding_window", None) is None else self.size("sliding_window")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self.get(name, default))

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number.

        Raises:
          ValueError: if it is not one.
        """
        value = self.get(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"config: {name} must be a number, got {value!r}")
        return float(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Reads a field that this family serves at certain values alone, the first by default.

        Raises:
          ValueError: if it has another.
        """
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"config: {name} {value!r} is not supported; {allowed} are")

    def rotated(self, head_dim: int, share: float = 1.0) -> int:
        """How many features of a head are rotated; `share` where the config does not say."""
        given = self._of_rotation()
        if self.get("rotary_dim", None) is not None:
            share = self.size("rotary_dim") / head_dim
        share = self.number("partial_rotary_factor", given.get("partial_rotary_factor", share))
        return int(head_dim * share)

    def _of_rotation(self) -> Mapping[str, Any]:
        given = self.get("rope_parameters", None) or self.get("rope_scaling", None) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"config: parameters of the rotation must be an object, got {given!r}")
        return given

    def layer_types(
        self, usual: Sequence[str], known: Collection[str] = ATTENTION_TYPES
    ) -> Sequence[str]:
        """The type of each layer, `usual` where the config does not say.

        Raises:
          ValueError: if they are not one for each layer, or not of the `known` types.
        """
        types = self.get("layer_types", usual)
        if len(types) != len(usual):
            raise ValueError(f"config: {len(types)} layer_types for {len(usual)} layers")
        for kind in types:
            if kind not in known:
                raise ValueError(f"config: layer type {kind!r} is not supported; {[*known]} are")
        return types

    def eos(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        given = self.get("eos_token_id", ())
        return tuple(given) if isinstance(given, list | tuple) else (given,)

    def rope(
        self, dim: int, kind: str | None = None, theta: float = 10000.0, interleaved: bool = False
    ) -> Rope:
        """Rotary positions, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes them.

        Args:
          dim: features that are rotated.
          kind: the type of layer, where parameters are given for each.
          theta: the base where none is given.
          interleaved: see `Rope`.

        Raises:
          ValueError: for an unknown type or parameter, or an impossible base.
        """
        longest = self.size("max_position_embeddings")
        given = self._of_rotation()
        if kind is not None and kind in given:
            given = given[kind]
        known = {f.name for f in dataclasses.fields(RopeConfig)}
        unread = {k: v for k, v in given.items() if k not in known | self.of_rope and v is not None}
        if unread:
            raise ValueError(f"config: of the rotation, {unread} is not known")
        own = {k: v for k, v in given.items() if k in known and v is not None}
        own["rope_type"] = given.get("type") or given.get("rope_type") or "default"
        if own["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"config: unknown rope type {own['rope_type']!r}; one of {ROPE_TYPES}")
        base = self.get("rope_theta", theta)
        for name, value in {"rope_theta": base, **own}.items():
            if name not in ("rope_type", "short_factor", "long_factor") and not isinstance(
                value, int | float
            ):
                raise ValueError(f"config: {name} of the rotation must be a number, got {value!r}")
        own["rope_theta"] = float(own.get("rope_theta", base))
        if not math.isfinite(own["rope_theta"]) or own["rope_theta"] <= 0:
            raise ValueError(f"config: rope_theta must be positive, got {own['rope_theta']!r}")
        for name in ("short_factor", "long_factor"):
            own[name] = tuple(float(v) for v in own.get(name, ()))
        if own["rope_type"] in ("yarn", "llama3", "longrope"):
            # transformers lets the field outside the rope parameters win.
            outside = self.get("original_max_position_embeddings", None)
            original = outside or own.get("original_max_position_embeddings") or longest
            own["original_max_position_embeddings"] = original
            own.setdefault("factor", longest / original)
        if dim % 2:
            raise ValueError(f"config: {dim} features cannot be rotated in pairs")
        return Rope(config=RopeConfig(**own), dim=dim, longest=longest, interleaved=interleaved)

    def finish(self) -> None:
        """Refuses fields that were not read and may change the model.

        Raises:
          ValueError: naming them.
        """
        unread = {
            name: value
            for name, value in self.values.items()
            if name not in self.read | HARMLESS
            and not name.startswith("_")
            and value not in (None, False, {}, [])
        }
        if unread:
            raise ValueError(
                f"config: {', '.join(f'{k}={v!r}' for k, v in unread.items())}: not known for "
                f"model_type {self.values.get('model_type')!r}, and may change what it computes"
            )
