"""Weights in few bits: equal to what the libraries make of them, and read in whole models."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_families import FIXTURES, error, fixture, write

import mcjax
from mcjax.hub import Folder
from mcjax.hub.formats import AWQ_ORDER, FP4, Packed, packed_weights, unpacked
from mcjax.notes import Note

ARRAYS = dict(np.load(FIXTURES / "formats.npz"))
CASES = sorted({name.split("/")[0] for name in ARRAYS})


def stored(case):
    """A case's kind, settings, tensors and what they stand for."""
    tensors = {}
    for name, value in ARRAYS.items():
        of, last = name.split("/")
        if of == case and "." in last:
            part, dtype = last.split(".")
            kind = getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, dtype) else np.dtype(dtype)
            tensors[part] = value.view(kind)
    kind, settings = (str(ARRAYS[f"{case}/{name}"]) for name in ("kind", "settings"))
    return kind, json.loads(settings), tensors, tensors.pop("expected")


@pytest.mark.parametrize("case", CASES)
def test_floats_are_the_librarys_bit_for_bit(case):
    kind, settings, parts, expected = stored(case)
    got = unpacked(kind, parts, settings, ml_dtypes.bfloat16)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_blocks_at_the_edge_are_smaller():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 9)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((3, 3)).astype(np.float32)
    got = unpacked(
        "FP8",
        {"weight": weight, "weight_scale_inv": scale},
        {"weight_block_size": [4, 4]},
        np.float32,
    )
    for i in range(10):
        for j in range(9):
            assert got[i, j] == np.float32(weight[i, j]) * scale[i // 4, j // 4]


def test_one_scale_of_a_whole_weight():
    weight = np.array([[1, -2, 3]], ml_dtypes.float8_e4m3fn)
    for scale in (np.float32(0.5), np.array([0.5], np.float32)):
        parts = {"weight": weight, "weight_scale_inv": np.asarray(scale)}
        got = unpacked("FP8", parts, {"weight_block_size": None}, np.float32)
        np.testing.assert_array_equal(got, [[0.5, -1, 1.5]])


def test_blocks_of_compressed_tensors_are_as_its_settings_say():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 9)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random((3, 3)).astype(np.float32)
    arguments = {"strategy": "block", "block_structure": [4, 4]}
    settings = {"config_groups": {"group_0": {"weights": arguments}}}
    got = unpacked("compressed-tensors", {"weight": weight, "weight_scale": scale}, settings, None)
    wide = np.repeat(np.repeat(scale, 4, 0), 4, 1)[:10, :9]
    np.testing.assert_array_equal(got, np.float32(weight) * wide)
    arguments |= {"strategy": "group", "group_size": 5, "block_structure": None}
    parts = {"weight": weight.astype(np.int8), "weight_scale": scale[:1, :2].repeat(10, 0)}
    got = unpacked("compressed-tensors", parts, settings, None)
    np.testing.assert_array_equal(got[0], parts["weight"][0] * scale[0, [0] * 5 + [1] * 4])
    arguments["group_size"] = 2
    with pytest.raises(ValueError, match="is not of groups of 2 of 9"):
        unpacked("compressed-tensors", parts, settings, None)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("fp8", {"weight_scale_inv": np.ones((5, 5), np.float32)}, r"scales \(5, 5\) are not of"),
        ("fp8", {"weight_scale_inv": np.ones(5, np.float32)}, r"scales \(5,\) are not of"),
        ("mxfp4", {"scales": np.ones((3, 6, 3), np.uint8)}, "do not fit scales"),
        ("gptq_4_gptq_shuffled", {"scales": np.ones((3, 32), np.float16)}, "do not fit scales"),
        ("gptq_4_gptq_shuffled", {"g_idx": np.full(64, 2, np.int32)}, "g_idx names group 2 of 2"),
        ("gptq_4_gptq_shuffled", {"qweight": np.zeros((8, 32))}, "int32"),
        ("awq", {"scales": np.ones((2, 24), np.float16)}, "does not fit scales"),
        ("compressed_4", {"weight_scale": np.ones((7, 2), np.float16)}, "does not fit a weight"),
        ("compressed_4", {"weight_shape": np.array([48, 640])}, "is not of a weight"),
    ],
)
def test_shapes_that_do_not_fit(case, change, message):
    kind, settings, parts, _ = stored(case)
    with pytest.raises(ValueError, match=message):
        unpacked(kind, parts | change, settings, np.float32)


@pytest.mark.parametrize(
    ("kind", "case", "settings", "message"),
    [
        ("GPTQ", "gptq_4_gptq_shuffled", {"bits": 5}, "GPTQ of 5 bits is not read"),
        ("AWQ", "awq", {"version": "gemv"}, "AWQ of version 'gemv', 4 bits is not read"),
    ],
)
def test_settings_that_are_not_read(kind, case, settings, message):
    _, usual, parts, _ = stored(case)
    with pytest.raises(ValueError, match=message):
        unpacked(kind, parts, usual | settings, np.float32)


def test_names_tell_the_format():
    names = [
        "a.qweight", "a.qzeros", "a.scales", "a.g_idx", "a.bias", "b.weight", "b.weight_scale_inv",
        "c_blocks", "c_scales", "c_bias", "d.weight", "d.weight_scale", "d.input_scale", "e.weight",
        "f.gate_up_proj", "f.gate_up_proj_scale_inv", "f.gate_up_proj_activation_scale",
    ]  # fmt: skip
    found, ignored = packed_weights(names, {})
    assert {name: packed.kind for name, packed in found.items()} == {
        "a.weight": "GPTQ", "b.weight": "FP8", "c": "MXFP4", "d.weight": "compressed-tensors",
        "f.gate_up_proj": "FP8",
    }  # fmt: skip
    assert found["c"] == Packed("MXFP4", {"blocks": "c_blocks", "scales": "c_scales"})
    assert ignored == {"d.input_scale", "f.gate_up_proj_activation_scale"}
    assert packed_weights(names[:3], {"quant_method": "awq"})[0]["a.weight"].kind == "AWQ"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.qweight", "a.scales"], "a is a GPTQ weight without qzeros"),
        (["a.weight_scale_inv"], "a is a FP8 weight without weight"),
        (["a_blocks"], "a_blocks has no a_scales"),
        (["a.weight", "a.weight.absmax"], "absmax is of a bitsandbytes checkpoint"),
        (["a.weight", "a.weight.quant_state.bitsandbytes__nf4"], "of a bitsandbytes checkpoint"),
    ],
)
def test_formats_that_are_not_whole_or_not_read(names, message):
    with pytest.raises(ValueError, match=message):
        packed_weights(names, {})


def fp8(name, weight):
    scale = np.abs(weight).max() / 448 * np.linspace(0.5, 2, -(-len(weight) // 8))
    scale = np.repeat(scale[:, None], -(-weight.shape[1] // 8), axis=1).astype(np.float32)
    blocks = np.repeat(np.repeat(scale, 8, 0), 8, 1)[: len(weight), : weight.shape[1]]
    codes = np.clip(weight / blocks, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}


def packed_words(codes, bits):
    """Codes [n, m] as int32 words along the first axis, lowest bits first."""
    at = np.arange(bits)[None, :, None]
    bit = (codes.astype(np.uint64)[:, None] >> at.astype(np.uint64) & np.uint64(1)).astype(np.uint8)
    flat = bit.reshape(-1, codes.shape[1])
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0))).reshape(-1, 32, codes.shape[1])
    place = (np.uint32(1) << np.arange(32, dtype=np.uint32))[None, :, None]
    return np.sum(flat * place, axis=1, dtype=np.uint32).view(np.int32)


def groups_of(weight, bits=4, size=4):
    """Codes, zeros and scales of groups of inputs of a weight [d_out, d_in]."""
    w = weight.T.reshape(-1, size, len(weight))
    low, high = w.min(1), w.max(1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / np.float32(scales)), 0, 2**bits - 1)
    codes = np.clip(np.round(w / np.float32(scales)[:, None] + zeros[:, None]), 0, 2**bits - 1)
    return codes.reshape(-1, len(weight)), zeros, scales


def gptq(name, weight):
    codes, zeros, scales = groups_of(weight)
    zeros = packed_words(np.maximum(zeros, 1).T - 1, 4).T
    return {
        f"{name}.qweight": packed_words(codes, 4),
        f"{name}.qzeros": np.ascontiguousarray(zeros),
        f"{name}.scales": scales,
        f"{name}.g_idx": (np.arange(weight.shape[1]) // 4).astype(np.int32),
        f"{name}.bias": np.zeros(len(weight), np.float16),
    }


def awq(name, weight):
    codes, zeros, scales = groups_of(weight)

    def pack(values):
        order = values.reshape(len(values), -1, 8)[..., list(AWQ_ORDER)].reshape(len(values), -1)
        return np.ascontiguousarray(packed_words(order.T, 4).T)

    return {
        f"{name}.qweight": pack(codes),
        f"{name}.qzeros": pack(zeros),
        f"{name}.scales": scales,
    }


SETTINGS = {
    fp8: {"quant_method": "fp8", "weight_block_size": [8, 8]},
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 4},
    awq: {"quant_method": "awq", "bits": 4, "group_size": 4},
}


@pytest.mark.parametrize("pack", SETTINGS, ids=lambda pack: pack.__name__)
def test_a_model_in_few_bits_is_the_model_of_its_floats(tmp_path, pack):
    config, tokens, logits, tensors = fixture("deepseek_v3")
    eight = pack is awq  # whose words are eight outputs
    packed, floats = {}, {}
    for name, value in tensors.items():
        linear = re.fullmatch(r"(.*(mlp|self_attn).*_proj)\.weight", name)
        few = linear and not value.shape[1] % 4 and not (eight and value.shape[0] % 8)
        if not few:
            packed[name] = floats[name] = value
            continue
        own = pack(linear[1], value.astype(np.float32))
        packed |= {part: np.ascontiguousarray(tensor) for part, tensor in own.items()}
        kind = {fp8: "FP8", gptq: "GPTQ", awq: "AWQ"}[pack]
        parts = {part.rpartition(".")[2]: tensor for part, tensor in own.items()}
        value = unpacked(kind, parts, SETTINGS[pack], np.dtype(config["dtype"]))
        floats[name] = np.ascontiguousarray(value)
    assert len(packed) > len(floats) + 20
    exact = write(tmp_path / "floats", config, floats)
    settings = {"quantization_config": SETTINGS[pack]}
    folder = write(tmp_path / "model", config | settings, packed)
    with pytest.warns(Note, match="weights are (FP8|GPTQ|AWQ), dequantised as they are read"):
        model = mcjax.load(folder)
    assert error(model(tokens), np.asarray(mcjax.load(exact)(tokens))) < 1e-6
    assert np.corrcoef(np.ravel(model(tokens)), np.ravel(logits))[0, 1] > 0.7


def test_gpt_oss_as_its_makers_publish_it(tmp_path):
    config, tokens, _, tensors = fixture("gpt_oss")
    config = config | {"hidden_size": 32, "intermediate_size": 32}
    rng = np.random.default_rng(0)
    packed, floats = {}, {}
    for name, value in tensors.items():
        shape = [32 if n in (28, 18) else 64 if n == 36 else n for n in value.shape]
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = floats[name] = rng.standard_normal(shape).astype(np.float16) / 5
            continue
        experts, d_in, d_out = shape
        blocks = rng.integers(0, 256, (experts, d_out, d_in // 32, 16), np.uint8)
        scales = rng.integers(122, 126, (experts, d_out, d_in // 32), np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        value = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], -1).reshape(*scales.shape, 32)
        value = value * np.exp2(scales[..., None].astype(np.float32) - 127)
        value = np.swapaxes(value.reshape(experts, d_out, d_in), 1, 2)
        floats[name] = np.ascontiguousarray(value).astype(ml_dtypes.bfloat16)
    exact = mcjax.load(write(tmp_path / "floats", config, floats))
    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.warns(Note, match="8 weights are MXFP4"):
        model = mcjax.load(write(tmp_path / "model", config | settings, packed))
    assert error(model(tokens), np.asarray(exact(tokens))) < 1e-6


def test_settings_inside_a_wrapper(tmp_path):
    config, tokens, logits, tensors = fixture("gemma3")
    name = "model.layers.0.mlp.gate_proj"
    tensors |= fp8(name, tensors[f"{name}.weight"].astype(np.float32))
    inner = config | {"quantization_config": SETTINGS[fp8]}
    outer = {"model_type": "gemma3", "text_config": inner}
    with pytest.warns(Note, match="1 weights are FP8"):
        model = mcjax.load(write(tmp_path / "model", outer, tensors))
    assert np.corrcoef(np.ravel(model(tokens)), np.ravel(logits))[0, 1] > 0.9


def test_a_packed_bias_that_is_not_zero_is_refused(tmp_path):
    config, _, _, tensors = fixture("qwen3_moe")
    name = "model.layers.0.mlp.experts.0.gate_proj"
    weight = tensors.pop(f"{name}.weight").astype(np.float32)
    own = gptq(name, weight)
    tensors |= {part: np.ascontiguousarray(tensor) for part, tensor in own.items()}
    settings = {"quantization_config": SETTINGS[gptq]}
    Folder(write(tmp_path / "model", config | settings, tensors))
    tensors[f"{name}.bias"][0] = 1
    with pytest.raises(ValueError, match=r"nothing reads .*gate_proj\.bias"):
        Folder(write(tmp_path / "model", config | settings, tensors))


def test_a_part_of_the_wrong_shape_is_named(tmp_path):
    config, _, _, tensors = fixture("qwen3_moe")
    name = "model.layers.0.mlp.experts.0.gate_proj"
    tensors |= fp8(name, tensors[f"{name}.weight"].astype(np.float32))
    tensors[f"{name}.weight_scale_inv"] = np.ones((7, 3), np.float32)
    folder = write(tmp_path / "model", config, {})
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"gate_proj\.weight: scales \(7, 3\) are not of blocks"):
        mcjax.load(folder)
