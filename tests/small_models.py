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
TOP_2 = {"num_experts_per_tok": 2}
ROUTED = TOP_2 | {"moe_intermediate_size": 28}
LATENT = ROUTED | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 28,
    "kv_lora_rank": 28,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 22,
    "v_head_dim": 14,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": None,
    "qk_head_dim": None,
}
INDEXED = LATENT | {"index_n_heads": 4, "index_head_dim": 14}
DELTA = {
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 14,
}
PARTLY = {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.43}}
FULL = {"head_dim": 14, "num_key_value_heads": 1}

SIZES = {
    "mixtral": HEADS | TOP_2,
    "qwen3_moe": HEADS | ROUTED | {"num_local_experts": 4},
    "deepseek_v3": LATENT,
    "gpt_oss": HEADS | {"num_local_experts": 4},
    "gemma3": HEADS,
    "qwen3_next": HEADS | ROUTED | DELTA | PARTLY | {"num_experts": 4},
    "deepseek_v32": INDEXED,
    "llama4": HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 28},
    "lfm2_moe": HEADS | ROUTED | {"num_experts": 4, "head_dim": None},
    "llama": HEADS,
    "qwen2_moe": HEADS
    | ROUTED
    | {"num_experts": 4, "shared_expert_intermediate_size": 28, "hidden_size": 28},
    "olmoe": HEADS | TOP_2 | {"num_experts": 4},
    "olmo2": HEADS,
    "flex_olmo": HEADS | TOP_2 | {"num_experts": 4},
    "granitemoe": HEADS | TOP_2 | {"num_local_experts": 4},
    "granitemoeshared": HEADS | TOP_2 | {"num_local_experts": 4, "shared_intermediate_size": 28},
    "glm4_moe": HEADS | ROUTED | PARTLY | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1},
    "glm4_moe_lite": LATENT,
    "deepseek_v2": LATENT,
    "glm_moe_dsa": INDEXED,
    "minimax_m2": HEADS | TOP_2 | {"num_local_experts": 4},
    "mistral4": LATENT,
    "ernie4_5_moe": HEADS | {"moe_intermediate_size": 28, "moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": HEADS | ROUTED | {"num_experts": 4},
    "solar_open": HEADS | ROUTED | {"n_routed_experts": 4},
    "gemma4": HEADS
    | {"num_experts": 4, "moe_intermediate_size": 28, "per_layer_config": {"2": FULL, "5": FULL}},
    "qwen3_5_moe": HEADS | ROUTED | DELTA | PARTLY | {"num_experts": 4},
    "dots1": HEADS | ROUTED | {"n_routed_experts": 4},
    "hunyuan_v1_moe": HEADS | {"num_experts": 4, "moe_topk": 2},
    "mistral": HEADS,
    "qwen2": HEADS | {"head_dim": None},
    "qwen3": HEADS,
}
"""How each family's fixture is changed."""


def small_config(name):
    """The config.json of a family's small model."""
    path = FIXTURES / ("mixtral_base.npz" if name == "mixtral" else f"family_{name}.npz")
    config = json.loads(str(np.load(path)["config"])) | SHARED | SIZES[name]
    return {key: value for key, value in config.items() if value is not None}


def small_model(folder, name, **changes):
    """Writes a random model in which no weight is as it begins, of a config with some changes."""
    config = small_config(name) | changes
    params = weights.init(describe(config)[1], jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(0).standard_normal
    moved = [
        np.asarray(leaf) + (0.3 if np.std(leaf) == 0 else 0.1) * draw(leaf.shape) for leaf in leaves
    ]
    folder.mkdir()
    write(folder, config, jax.tree.unflatten(tree, moved))
    return folder


def with_tokenizer(folder, text_file):
    """The folder of a small model, with a tokenizer for some text."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=64, show_progress=False)
    tokenizer.train_from_iterator([*text_file.read_text().split(" ")[:500], " "], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
