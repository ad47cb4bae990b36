"""Families of models, a page each: what a config describes, and which tensor is which weight.

A page has `MODEL_TYPES`, `NAME`, `CHECKED` (what its tests compare with the family's module in
transformers), `decoder(fields)`, `outside(decoder)` and `tensors(layer)`. The last two list rules
of `tensors`; an entry that is a tuple holds alternative lists, of which the first whose tensors are
all there is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mcjax.models.decoder import Decoder
from mcjax.models.families import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    dots1,
    ernie4_5_moe,
    exaone_moe,
    gemma3,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite,
    hunyuan_moe,
    lfm2_moe,
    llama,
    llama4,
    minimax_m2,
    mistral4,
    mixtral,
    olmo,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from mcjax.models.families.fields import Fields

PAGES: dict[str, ModuleType] = {
    name: page
    for page in (
        mixtral,
        qwen3_moe,
        qwen2_moe,
        qwen3_next,
        deepseek_v3,
        deepseek_v2,
        deepseek_v32,
        glm4_moe,
        minimax_m2,
        mistral4,
        gpt_oss,
        llama4,
        gemma4,
        lfm2_moe,
        olmo,
        ernie4_5_moe,
        granite,
        exaone_moe,
        hunyuan_moe,
        dots1,
        llama,
        qwen3,
        gemma3,
    )
    for name in page.MODEL_TYPES
}


def families() -> dict[str, str]:
    """The `model_type`s that are known, each with what of it was compared with the reference."""
    return {kind: f"{page.NAME}: {page.CHECKED}" for kind, page in PAGES.items()}


def describe(config: Mapping[str, Any]) -> tuple[ModuleType, Decoder]:
    """A config.json's page and what it describes; a wrapper's `text_config` is found.

    Raises:
      ValueError: for an unknown model_type, a missing or impossible field, or one not read.
    """
    kind = str(config.get("model_type"))
    if kind not in PAGES and isinstance(config.get("text_config"), Mapping):
        inner = dict(config["text_config"])
        for name in ("tie_word_embeddings", "eos_token_id"):
            if inner.get(name) is None and config.get(name) is not None:
                inner[name] = config[name]
        return describe(inner)
    if kind not in PAGES:
        given = config.get("model_type")
        raise ValueError(f"config: model_type {given!r} is not supported; {', '.join(PAGES)} are")
    fields = Fields(config)
    try:
        decoder = PAGES[kind].decoder(fields)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"config: a field has an impossible value: {error}") from None
    fields.finish()
    return PAGES[kind], decoder
