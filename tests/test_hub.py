"""Folders in every form that they come in, and written back."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import NAMES, fixture
from test_families import write as write_fixture

from mcjax import hub
from mcjax.hub import Folder
from mcjax.models.families import describe

MIXTRAL = "mixtral_base.npz"
STRETCHED = ["yarn", "llama3", "linear", "dynamic", "longrope_long", "longrope_factor", "base"]


def unpack(name, folder):
    config, _, _, tensors = fixture(name)
    tensors.pop("bfloat16", None)
    write_fixture(folder, config, tensors)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fused_experts_give_the_same_parameters(tmp_path):
    unpack(MIXTRAL, tmp_path)
    before = Folder(tmp_path).read()
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
    same(Folder(tmp_path).read(), before)


def test_shards_give_the_same_parameters(tmp_path):
    unpack(MIXTRAL, tmp_path)
    before = Folder(tmp_path).read()
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({k: tensors[k] for k in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {k: file for file, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    same(Folder(tmp_path).read(), before)


def test_any_tensor_that_differs_makes_another_model(tmp_path):
    unpack(MIXTRAL, tmp_path)
    tensors, one = load_file(tmp_path / "model.safetensors"), Folder(tmp_path).source_hash()
    assert Folder(tmp_path).source_hash() == one
    seen = {one}
    for name in tensors:
        save_file({**tensors, name: tensors[name] * 1.5}, tmp_path / "model.safetensors")
        seen.add(Folder(tmp_path).source_hash())
    assert len(seen) == 1 + len(tensors)


@pytest.mark.parametrize("name", STRETCHED)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_config_of_transformers_4(name, key):
    values = fixture(f"mixtral_{name}.npz")[0]
    _, new = describe(values)
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    rope[key] = rope.pop("rope_type")
    values["rope_scaling"] = None if rope[key] == "default" else rope
    assert describe(values)[1] == new


@pytest.mark.parametrize("name", [MIXTRAL, *NAMES])
def test_written_folder_reads_back(name, tmp_path):
    unpack(name, tmp_path)
    folder = Folder(tmp_path)
    params = folder.read(np.float32)
    (tmp_path / "again").mkdir()
    hub.write(tmp_path / "again", folder.values, params, np.float32)
    again = Folder(tmp_path / "again")
    assert again.decoder == folder.decoder
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again.read(), params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 7}, "7 features cannot be rotated in pairs"),
        ({"num_experts_per_tok": 9}, "9 experts per token of 4"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ],
)
def test_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        describe(fixture(MIXTRAL)[0] | change)


def test_a_sentencepiece_tokenizer_says_how_to_get_the_other(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not read; .*save_pretrained"):
        print(hub.Checkpoint(tmp_path).tokenizer_path)
