"""Mixtral against Hugging Face's own logits, and every form its folders come in."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mcjax.convert import HuggingFaceFolder, write_hugging_face
from mcjax.models import Mixtral, MixtralConfig

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("mixtral_*.npz"))


def unpack(fixture, folder):
    """Writes a fixture as a Hugging Face folder; returns its tokens and logits."""
    data = dict(np.load(fixture))
    config, bfloat16 = str(data.pop("config")), bool(data.pop("bfloat16"))
    tokens, logits = data.pop("tokens"), data.pop("logits")
    if bfloat16:
        data = {k: v.view(ml_dtypes.bfloat16) for k, v in data.items()}
    (folder / "config.json").write_text(config)
    save_file(data, folder / "model.safetensors")
    return tokens, logits


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.stem)
def test_logits_equal_hugging_face(fixture, tmp_path):
    tokens, logits = unpack(fixture, tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    apply = jax.jit(Mixtral(folder.config).apply)
    got = apply({"params": folder.read(np.float32)}, tokens)
    np.testing.assert_allclose(got, logits, atol=1e-4)
    assert np.abs(logits).mean() > 0.3


def test_jit_equals_eager(tmp_path):
    tokens, _ = unpack(FIXTURES[0], tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    module, params = Mixtral(folder.config), {"params": folder.read(np.float32)}
    eager = module.apply(params, tokens)
    np.testing.assert_allclose(jax.jit(module.apply)(params, tokens), eager, atol=1e-5)


def test_fused_experts_give_the_same_parameters(tmp_path):
    unpack(FIXTURES[0], tmp_path)
    before = HuggingFaceFolder(tmp_path).read()
    tensors = load_file(tmp_path / "model.safetensors")
    fused = {k: v for k, v in tensors.items() if "block_sparse_moe" not in k}
    for i in range(2):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        each = [[tensors[f"{old}experts.{e}.w{j}.weight"] for e in range(4)] for j in (1, 2, 3)]
        w1, w2, w3 = (np.stack(w) for w in each)
        fused[new + "experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[new + "experts.down_proj"] = w2
        fused[new + "gate.weight"] = tensors[old + "gate.weight"]
    save_file(fused, tmp_path / "model.safetensors")
    same(HuggingFaceFolder(tmp_path).read(), before)


def test_shards_give_the_same_parameters(tmp_path):
    unpack(FIXTURES[0], tmp_path)
    before = HuggingFaceFolder(tmp_path).read()
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({k: tensors[k] for k in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(HuggingFaceFolder(tmp_path).read(), before)


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda f: f.stem)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_config_of_transformers_4(fixture, key, tmp_path):
    unpack(fixture, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    new = MixtralConfig.from_hugging_face(values)
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    rope[key] = rope.pop("rope_type")
    values["rope_scaling"] = None if rope[key] == "default" else rope
    assert MixtralConfig.from_hugging_face(values) == new
    assert MixtralConfig.from_dict(json.loads(json.dumps(new.to_dict()))) == new


def test_written_folder_reads_back(tmp_path):
    unpack(FIXTURES[0], tmp_path)
    folder = HuggingFaceFolder(tmp_path)
    params = folder.read(np.float32)
    (tmp_path / "again").mkdir()
    write_hugging_face(tmp_path / "again", folder.config, params, np.float32)
    again = HuggingFaceFolder(tmp_path / "again")
    assert again.config == folder.config
    same(again.read(), params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 4"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ],
)
def test_impossible_sizes(change, message, tmp_path):
    unpack(FIXTURES[0], tmp_path)
    config = HuggingFaceFolder(tmp_path).config
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)
