"""Small random models of every family, alike in the shapes of their weights.

What takes long about compressing a small model is compiling the quantiser for each shape of matrix;
here most matrices of all families are [28, 28] or [28, 56]. Odd sizes, which differ from family to
family, are in the fixtures.
"""

import json
from pathlib import Path

import jax
import numpy as np

from mcjax.hub import write
from mcjax.models import weights
from mcjax.models.families import describe

FIXTURES = Path(__file__).parent / "fixtures"

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 14}
SHARED = {"hidden_size": 28, "intermediate_size": 28, "max_position_embeddings": 64}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 28}

SIZES = {
    "mixtral": HEADS | {"num_experts_per_tok": 2},
    "qwen3_moe": HEADS | ROUTED | {"num_local_experts": 4},
    "deepseek_v3": ROUTED
    | {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 28, "kv_lora_rank": 28}
    | {"qk_rope_head_dim": 6, "qk_nope_head_dim": 22, "v_head_dim": 14, "n_shared_experts": 1}
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "head_dim": None, "qk_head_dim": None},
    "gpt_oss": HEADS | {"num_local_experts": 4},
    "gemma3": HEADS,
    "qwen3_next": HEADS
    | ROUTED
    | {"num_experts": 4, "shared_expert_intermediate_size": 28, "linear_num_key_heads": 1}
    | {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 14}
    | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.43}},
}
"""How each family's fixture is changed."""


def small_config(name):
    """The config.json of a family's small model."""
    path = FIXTURES / ("mixtral_base.npz" if name == "mixtral" else f"family_{name}.npz")
    return json.loads(str(np.load(path)["config"])) | SHARED | SIZES[name]


def small_model(folder, name):
    """Writes a random model in which no weight is as it begins."""
    config = small_config(name)
    params = weights.init(describe(config)[1], jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(0).standard_normal
    moved = [
        np.asarray(leaf) + (0.3 if np.std(leaf) == 0 else 0.1) * draw(leaf.shape) for leaf in leaves
    ]
    folder.mkdir()
    write(folder, config, jax.tree.unflatten(tree, moved))
    return folder
