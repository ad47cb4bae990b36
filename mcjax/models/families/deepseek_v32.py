"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 whose queries attend to indexed keys; GLM-5 too."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Index
from mcjax.models.families import deepseek_v3, shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.latent import latent

MODEL_TYPES = ("deepseek_v32", "glm_moe_dsa")
NAME = "DeepSeek-V3.2, GLM-5"
CHECKED = "indexed keys, whole and from a cache; layers that share an index are refused"


def decoder(fields: Fields) -> Decoder:
    """Describes a DeepSeek-V3.2 or a GLM-5 from its config."""
    count = fields.size("num_hidden_layers")
    index = Index(
        heads=fields.size("index_n_heads", 64),
        dim=fields.size("index_head_dim", 128),
        top_k=fields.size("index_topk", 2048),
        interleaved=fields.get("model_type") == "glm_moe_dsa",
    )
    fields.only("layer_types", ["indexed_attention"] * count)
    fields.only("indexer_types", ["full"] * count)  # others reuse an earlier layer's keys
    fields.only("index_topk_freq", 1)
    fields.only("rope_interleave", True)
    fields.only("indexer_rope_interleave", index.interleaved)
    if fields.get("q_lora_rank", None) is None:
        raise ValueError("config: q_lora_rank is missing, from whose latent the index is made")
    fields.only("index_topk_pattern", None, "F" * count)
    fields.get("index_skip_topk_offset", None)
    return deepseek_v3.of_layers(fields, latent(fields, interleaved=True, index=index))


outside, tensors = shared.outside, deepseek_v3.tensors
