"""Weights that checkpoints keep in few bits: which tensors they lie in, and what these stand for.

A linear layer `X` has, instead of a float tensor `X.weight` [d_out, d_in], tensors of one of these
kinds, whose names tell it. With codes c, scales s and zeros z of a group of inputs or of a block:

    FP8 in blocks         X.weight s                  X.weight_scale_inv            (DeepSeek-V3)
    MXFP4                 value(c) 2^(s - 127)        X_blocks, X_scales            (gpt-oss)
    GPTQ                  s (c - z)                   X.qweight, qzeros, scales, g_idx
    AWQ                   s (c - z)                   X.qweight, qzeros, scales
    compressed-tensors    s (c - z)                   X.weight_packed or X.weight, weight_scale, ...

Values are those of the libraries that define the formats, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of four bits e2m1."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours the first, second, ... four bits of a word are."""

_REFUSED = {
    r"\.(absmax|quant_map|SCB|quant_state\.bitsandbytes.*)$": "bitsandbytes",
    r"\.(Wf|codebooks|codes)$": "AQLM",
    r"\.W_q$": "HQQ",
}

_UNREAD = re.compile(r"(\.(input|input_global|output|k|v)|[._]activation)_scale$")
"""Scales of activations, which are not rounded here."""


class Packed(NamedTuple):
    """A weight in few bits.

    Attributes:
      kind: its format's name.
      parts: the names of its tensors, by their last word.
    """

    kind: str
    parts: dict[str, str]


def packed_weights(
    names: Collection[str], settings: Mapping[str, Any]
) -> tuple[dict[str, Packed], set[str]]:
    """Finds the weights that are in few bits.

    Args:
      names: of all tensors.
      settings: the config's `quantization_config`.

    Returns:
      From the name of each weight to its tensors; and tensors about activations, to be ignored.

    Raises:
      ValueError: for formats that are not read.
    """
    found: dict[str, Packed] = {}
    wanted: tuple[str, ...]
    more: tuple[str, ...]
    ignored = set()
    for name in names:
        for pattern, format_name in _REFUSED.items():
            if re.search(pattern, name):
                raise ValueError(
                    f"{name} is of a {format_name} checkpoint, which is not read; give the model "
                    "in bf16, f16 or f32, as its makers publish it"
                )
        if _UNREAD.search(name):
            ignored.add(name)
        base, _, last = name.rpartition(".")
        if last == "qweight":
            kind = "AWQ" if settings.get("quant_method") == "awq" else "GPTQ"
            wanted = ("qweight", "qzeros", "scales")
            found[f"{base}.weight"] = _packed(kind, names, base, wanted, ("g_idx",))
        elif last == "weight_packed":
            wanted = ("weight_packed", "weight_scale", "weight_shape")
            more = ("weight_zero_point", "weight_g_idx")
            found[f"{base}.weight"] = _packed("compressed-tensors", names, base, wanted, more)
        elif last == "weight_scale_inv":
            parts = _packed("FP8", names, base, ("weight", "weight_scale_inv"), ())
            found[f"{base}.weight"] = parts
        elif last == "weight_scale" and f"{base}.weight_packed" not in names:
            wanted = ("weight", "weight_scale")
            found[f"{base}.weight"] = _packed(
                "compressed-tensors", names, base, wanted, ("weight_zero_point",)
            )
        elif last.endswith("_scale_inv") and name.removesuffix("_scale_inv") in names:
            base = name.removesuffix("_scale_inv")
            found[base] = Packed("FP8", {"weight": base, "weight_scale_inv": name})
        elif name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            if f"{base}_scales" not in names:
                raise ValueError(f"{name} has no {base}_scales beside it")
            found[base] = Packed("MXFP4", {"blocks": name, "scales": f"{base}_scales"})
    return found, ignored


def _packed(kind, names, base, wanted, more) -> Packed:
    missing = [part for part in wanted if f"{base}.{part}" not in names]
    if missing:
        raise ValueError(f"{base} is a {kind} weight without {', '.join(missing)}")
    have = [part for part in more if f"{base}.{part}" in names]
    return Packed(kind, {part: f"{base}.{part}" for part in (*wanted, *have)})


def unpacked(
    kind: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any], dtype: Any
) -> np.ndarray:
    """The floats that a weight's tensors stand for.

    Args:
      kind: its format's name.
      parts: its tensors, as `Packed` names them.
      settings: the config's `quantization_config`.
      dtype: of the model, to which scaled FP8 is rounded.

    Returns:
      [d_out, d_in]; of MXFP4 [experts, d_in, d_out].

    Raises:
      ValueError: if shapes or settings do not fit.
    """
    if kind == "MXFP4":
        return _mxfp4(**parts)
    if kind == "FP8":
        block = settings.get("weight_block_size")
        return _in_blocks(parts["weight"], parts["weight_scale_inv"], block, dtype)
    if kind == "AWQ":
        return _awq(parts, settings)
    if kind == "GPTQ":
        return _gptq(parts, settings)
    return _compressed(parts, settings)


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks uint8 [..., d_out, n, 16] and scales uint8 [..., d_out, n], in bf16."""
    if blocks.shape[:-1] != scales.shape or blocks.dtype != np.uint8:
        raise ValueError(f"MXFP4 blocks {blocks.shape} do not fit scales {scales.shape}")
    both = np.stack([FP4[blocks & 15], FP4[blocks >> 4]], axis=-1)
    both = both.reshape(*scales.shape, -1)
    value = np.ldexp(both, scales.astype(np.int32)[..., None] - 127)
    value = value.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)
    return np.swapaxes(value, -1, -2)


def _in_blocks(weight: np.ndarray, scale: np.ndarray, block: Any, dtype: Any) -> np.ndarray:
    """A weight [d_out, d_in] times the scale of each of its blocks."""
    if scale.dtype == np.uint8:  # exponents
        scale = np.exp2(scale.astype(np.float32) - 127)
    if scale.size == 1:
        return (weight.astype(np.float32) * scale.astype(np.float32).reshape(-1)[0]).astype(dtype)
    sizes = []
    if scale.ndim != weight.ndim:
        raise ValueError(f"scales {scale.shape} are not of blocks of a weight {weight.shape}")
    for axis in (-2, -1):
        length, count = weight.shape[axis], scale.shape[axis]
        size = block[axis] if block else 0
        if not size or -(-length // size) != count:
            size = length // count
            if not count or length % count:
                raise ValueError(
                    f"scales {scale.shape} are not of blocks of {block} of a weight {weight.shape}"
                )
        sizes.append(size)
    wide = scale.astype(np.float32)
    for axis, size in zip((-2, -1), sizes, strict=True):
        wide = np.repeat(wide, size, axis=axis)
    wide = wide[..., : weight.shape[-2], : weight.shape[-1]]
    return (weight.astype(np.float32) * wide).astype(dtype)


def _gptq(parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    scales, words = parts["scales"], parts["qweight"]
    groups, d_out = scales.shape
    bits = settings.get("bits", 4)
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"GPTQ of {bits} bits is not read; 2, 3, 4 and 8 are")
    d_in = len(parts["g_idx"]) if "g_idx" in parts else words.shape[0] * 32 // bits
    if words.shape != (-(-d_in * bits // 32), d_out) or len(parts["qzeros"]) != groups:
        raise ValueError(
            f"qweight {words.shape} and qzeros {parts['qzeros'].shape} of {bits} bits do not fit "
            f"scales {scales.shape}"
        )
    group_size = settings.get("group_size", 128)
    group = parts.get(
        "g_idx", np.arange(d_in) // (d_in if group_size in (-1, None) else group_size)
    )
    if group.min(initial=0) < 0 or group.max(initial=0) >= groups:
        raise ValueError(f"g_idx names group {group.max()} of {groups}")
    less_one, words_of_zeros = (
        settings.get("checkpoint_format", "gptq") != "gptq_v2",
        parts["qzeros"],
    )
    if (
        less_one and 32 % bits == 0
    ):  # word by word, so that what one code borrows its neighbour lends
        ones = np.uint32(sum(1 << place for place in range(0, 32, bits)))
        words_of_zeros = (words_of_zeros.view(np.uint32) + ones).view(np.int32)
    zeros = _unpack(words_of_zeros, bits, d_out, axis=1)
    if less_one and 32 % bits:
        zeros = (zeros + 1) & (2**bits - 1)
    codes = _unpack(words, bits, d_in, axis=0)
    return _scaled(codes - zeros[group], scales[group]).T


def _awq(parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    version = str(settings.get("version", "gemm")).lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise ValueError(f"AWQ of version {version!r}, {bits} bits is not read; gemm of 4 bits is")
    scales = parts["scales"]
    groups, d_out = scales.shape

    def unpack(words):
        codes = _unpack(words, 4, words.shape[1] * 8, axis=1).reshape(len(words), -1, 8)
        return codes[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)

    codes, zeros = unpack(parts["qweight"]), unpack(parts["qzeros"])
    if zeros.shape != scales.shape or codes.shape[1] != d_out or len(codes) % groups:
        raise ValueError(f"qweight {parts['qweight'].shape} does not fit scales {scales.shape}")
    each = len(codes) // groups
    return _scaled(codes - np.repeat(zeros, each, axis=0), np.repeat(scales, each, axis=0)).T


def _compressed(parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    scale, arguments = parts["weight_scale"], _weight_arguments(settings)
    if arguments.get("block_structure") and "weight_packed" not in parts:
        return _in_blocks(parts["weight"], scale, arguments["block_structure"], scale.dtype)
    zero = parts.get("weight_zero_point")
    if "weight_packed" in parts:
        d_out, d_in = (int(n) for n in parts["weight_shape"])
        words = parts["weight_packed"]
        bits = next((b for b in range(1, 9) if -(-d_in * b // 32) == words.shape[-1]), None)
        if bits is None or len(words) != d_out:
            raise ValueError(f"weight_packed {words.shape} is not of a weight {(d_out, d_in)}")
        codes = _unpack(words, bits, d_in, axis=1) - 2 ** (bits - 1)
        if zero is not None:
            zero = _unpack(zero, bits, d_out, axis=0) - 2 ** (bits - 1)
    else:
        codes = parts["weight"]
    d_out, d_in = codes.shape
    scale = scale.reshape(1, 1) if scale.size == 1 else scale
    if scale.ndim != 2 or d_out % scale.shape[0]:
        raise ValueError(f"weight_scale {scale.shape} does not fit a weight {codes.shape}")
    zero = zero if zero is None or zero.size > 1 else zero.reshape(1, 1)
    if "weight_g_idx" in parts:
        columns = parts["weight_g_idx"].astype(np.int64)
    else:
        size = arguments.get("group_size") if arguments.get("strategy") == "group" else None
        size = size or -(-d_in // scale.shape[1])
        if -(-d_in // size) != scale.shape[1]:
            raise ValueError(f"weight_scale {scale.shape} is not of groups of {size} of {d_in}")
        columns = np.arange(d_in) // size
    rows = np.arange(d_out) // (d_out // scale.shape[0])
    if columns.shape != (d_in,) or columns.max() >= scale.shape[1]:
        raise ValueError(f"weight_scale {scale.shape} does not fit a weight {codes.shape}")
    at = np.ix_(rows, columns)
    codes = codes.astype(np.float32)
    if zero is not None:
        codes = codes - zero.astype(np.float32)[at]
    return _scaled(codes, scale[at])


def _weight_arguments(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors' settings say of weights, where they say the same of all."""
    groups = settings.get("config_groups") or {}
    found = [group.get("weights") or {} for group in groups.values()]
    return found[0] if found and all(own == found[0] for own in found) else {}


def _scaled(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Small numbers times scales, rounded once to the scales' type."""
    return (codes.astype(np.float32) * scale.astype(np.float32)).astype(scale.dtype)


def _unpack(words: np.ndarray, bits: int, count: int, axis: int) -> np.ndarray:
    """The first `count` codes of `bits` bits along an axis of int32 words, lowest bits first."""
    if words.dtype != np.int32:
        raise ValueError(f"packed words must be int32, got {words.dtype}")
    words = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint32)
    at = np.arange(count) * bits
    if count and at[-1] // 32 >= words.shape[-1]:
        raise ValueError(f"{words.shape[-1]} words hold fewer than {count} codes of {bits} bits")
    wide = np.concatenate([words, np.zeros_like(words[..., :1])], axis=-1).astype(np.uint64)
    both = wide[..., at // 32] | wide[..., at // 32 + 1] << np.uint64(32)
    codes = both >> (at % 32).astype(np.uint64) & np.uint64(2**bits - 1)
    return np.moveaxis(codes.astype(np.int32), -1, axis)
