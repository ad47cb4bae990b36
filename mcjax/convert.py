"""Hugging Face folders to parameters, layer by layer, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mcjax.hub import Checkpoint, read_json
from mcjax.models.config import MixtralConfig


class HuggingFaceFolder(Checkpoint):
    """A folder with config.json, safetensors and tokenizer.json, checked and read lazily.

    Both layouts of experts are read: `block_sparse_moe.experts.N.w1/w2/w3` and the fused
    `mlp.experts.gate_up_proj/down_proj`. Every tensor is checked for shape and finiteness.

    Raises:
      ValueError: for anything missing, malformed, unsupported or unsafe, with what and where.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.config = MixtralConfig.from_hugging_face(read_json(self.path / "config.json"))
        self._check_complete()

    def read_layer(self, i: int, dtype: Any = None) -> dict[str, Any]:
        """Parameters of layer i for `mcjax.models.mixtral.Layer`."""
        c = self.config
        d, f, e = c.hidden_size, c.intermediate_size, c.num_local_experts
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        at = f"model.layers.{i}."

        def read(name, shape):
            return self.tensor(at + name, shape, dtype)

        if self._fused:
            moe = at + "mlp."
            gate_up = self.tensor(moe + "experts.gate_up_proj", (e, 2 * f, d), dtype)
            gate, up = gate_up[:, :f].swapaxes(1, 2), gate_up[:, f:].swapaxes(1, 2)
            down = self.tensor(moe + "experts.down_proj", (e, d, f), dtype).swapaxes(1, 2)
        else:
            moe = at + "block_sparse_moe."

            def stack(name, shape):
                each = [
                    self.tensor(f"{moe}experts.{n}.{name}.weight", shape, dtype) for n in range(e)
                ]
                return np.stack([w.T for w in each])

            gate, up, down = stack("w1", (f, d)), stack("w3", (f, d)), stack("w2", (d, f))
        return {
            "attention_norm": {"scale": read("input_layernorm.weight", (d,))},
            "attention": {
                "qkv": np.concatenate(
                    [
                        read(f"self_attn.{name}_proj.weight", (features, d)).T
                        for name, features in (("q", q), ("k", kv), ("v", kv))
                    ],
                    axis=1,
                ),
                "o": read("self_attn.o_proj.weight", (d, q)).T,
            },
            "moe_norm": {"scale": read("post_attention_layernorm.weight", (d,))},
            "moe": {
                "router": self.tensor(moe + "gate.weight", (e, d), dtype).T,
                "experts": {"gate": gate, "up": up, "down": down},
            },
        }

    def read_rest(self, dtype: Any = None) -> dict[str, Any]:
        """Parameters outside the layers: embedding, norm and, if untied, head."""
        c = self.config
        embedding = self.tensor("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), dtype)
        rest = {
            "embedding": embedding,
            "norm": {"scale": self.tensor("model.norm.weight", (c.hidden_size,), dtype)},
        }
        if not c.tie_word_embeddings:
            rest["head"] = self.tensor("lm_head.weight", (c.vocab_size, c.hidden_size), dtype)
        return rest

    def read(self, dtype: Any = None, progress: Callable = lambda items: items) -> dict[str, Any]:
        """All parameters, as `Mixtral(config).init` would shape them, on the default device."""
        params = self.read_rest(dtype)
        for i in progress(range(self.config.num_hidden_layers)):
            params[f"layer_{i}"] = self.read_layer(i, dtype)
        return jax.tree.map(jax.numpy.asarray, params)

    @property
    def _fused(self) -> bool:
        return "model.layers.0.mlp.experts.gate_up_proj" in self.shards

    def _check_complete(self):
        """Finds missing tensors and damaged files before any work is done."""
        for file in sorted(set(self.shards.values())):
            self._open(file)
        c, kind = self.config, ("mlp" if self._fused else "block_sparse_moe")
        experts = (
            ["gate_up_proj", "down_proj"]
            if self._fused
            else [f"{n}.w{j}.weight" for n in range(c.num_local_experts) for j in (1, 2, 3)]
        )
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        names += [] if c.tie_word_embeddings else ["lm_head.weight"]
        for i in range(c.num_hidden_layers):
            at = f"model.layers.{i}."
            names += [at + f"self_attn.{p}_proj.weight" for p in "qkvo"]
            names += [at + f"{p}_layernorm.weight" for p in ("input", "post_attention")]
            names += [at + f"{kind}.gate.weight"] + [at + f"{kind}.experts.{x}" for x in experts]
        missing = [name for name in names if name not in self.shards]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} tensors of a Mixtral are missing, first {missing[0]}"
            )


def write_hugging_face(
    directory: str | Path, config: MixtralConfig, params: Any, dtype: Any = ml_dtypes.bfloat16
) -> None:
    """Writes dense parameters as config.json and model.safetensors that transformers reads.

    Args:
      directory: an existing folder.
      config: the model's sizes.
      params: as `Mixtral(config).init` shapes them.
      dtype: of the stored weights.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = np.asarray(params["head"])
    for i in range(config.num_hidden_layers):
        at, layer = f"model.layers.{i}.", params[f"layer_{i}"]
        tensors[at + "input_layernorm.weight"] = layer["attention_norm"]["scale"]
        tensors[at + "post_attention_layernorm.weight"] = layer["moe_norm"]["scale"]
        attention = layer["attention"]
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        split = np.split(np.asarray(attention["qkv"]), (q, q + kv), axis=1)
        for name, w in zip("qkvo", [*split, np.asarray(attention["o"])], strict=True):
            tensors[at + f"self_attn.{name}_proj.weight"] = w.T
        moe = at + "block_sparse_moe."
        tensors[moe + "gate.weight"] = np.asarray(layer["moe"]["router"]).T
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            for n, w in enumerate(np.asarray(layer["moe"]["experts"][ours])):
                tensors[moe + f"experts.{n}.{theirs}.weight"] = w.T
    save_file(
        {name: np.ascontiguousarray(np.asarray(w).astype(dtype)) for name, w in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    values = config.to_dict()
    rope = {k: v for k, v in values.pop("rope").items() if v not in (None, ())}
    eos = values.pop("eos_token_ids")
    values |= {
        "eos_token_id": list(eos) or None,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "rope_parameters": rope,
        "dtype": np.dtype(dtype).name,
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2))
