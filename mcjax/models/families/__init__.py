"""Families of models, a page each: what a config describes, and which tensor is which weight.

A page has `MODEL_TYPES`, `decoder(fields)`, `outside(decoder)` and `tensors(layer)`. The last two
list rules of `tensors`; an entry of `tensors(layer)` that is a tuple holds alternative lists, of
which the first whose tensors are all there is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mcjax.models.decoder import Decoder
from mcjax.models.families import (
    deepseek_v3,
    gemma3,
    gpt_oss,
    mixtral,
    qwen3_moe,
    qwen3_next,
)
from mcjax.models.families.fields import Fields

PAGES: dict[str, ModuleType] = {
    name: page
    for page in (mixtral, qwen3_moe, deepseek_v3, gpt_oss, gemma3, qwen3_next)
    for name in page.MODEL_TYPES
}


def families() -> tuple[str, ...]:
    """The `model_type`s that are known."""
    return tuple(PAGES)


def describe(config: Mapping[str, Any]) -> tuple[ModuleType, Decoder]:
    """A config.json's page and what it describes; a wrapper's `text_config` is found.

    Raises:
      ValueError: for an unknown model_type, a missing or impossible field, or one not read.
    """
    kind = config.get("model_type")
    if kind not in PAGES and isinstance(config.get("text_config"), Mapping):
        inner = dict(config["text_config"])
        for name in ("tie_word_embeddings", "eos_token_id"):
            if inner.get(name) is None and config.get(name) is not None:
                inner[name] = config[name]
        return describe(inner)
    if kind not in PAGES:
        raise ValueError(f"config: model_type {kind!r} is not supported; {families()} are")
    fields = Fields(config)
    try:
        decoder = PAGES[kind].decoder(fields)
    except TypeError as error:
        raise ValueError(f"config: a field has the wrong type: {error}") from None
    fields.finish()
    return PAGES[kind], decoder
