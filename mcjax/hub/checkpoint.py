"""The files of a Hugging Face folder, and the tensors in them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""The types of eight bits that a safetensors file can have."""


SAMPLE = 1 << 14
"""Bytes of a tensor that tell it from another one, taken twice."""


class Checkpoint:
    """A folder with config.json, safetensors and tokenizer.json, read lazily.

    Raises:
      ValueError: for anything missing, malformed or unsafe, with what and where.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder")
        self._files: dict[str, Any] = {}

    @cached_property
    def shards(self) -> dict[str, Path]:
        """Where each tensor is: its name to a safetensors file."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise ValueError(f"{index} has no weight_map")
            for file in set(names.values()):
                if not isinstance(file, str) or Path(file).name != file or file in ("", "..", "."):
                    raise ValueError(f"{index} names {file!r}, which is outside the folder")
                if not file.endswith(".safetensors"):
                    raise ValueError(f"{index} names {file!r}, which is not a safetensors file")
                if not (self.path / file).is_file():
                    raise ValueError(f"shard {file} is missing from {self.path}")
            return {name: self.path / file for name, file in names.items()}
        single = self.path / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            if any(any(self.path.glob(pattern)) for pattern in PICKLES):
                raise ValueError(
                    f"{self.path} holds only pickled weights, which can run code when read; "
                    "convert them to safetensors first"
                )
            raise ValueError(f"{self.path} holds no *.safetensors file")
        if len(files) > 1:
            raise ValueError(
                f"{self.path} holds {len(files)} shards but no model.safetensors.index.json"
            )
        return {name: files[0] for name in self._open(files[0]).keys()}  # noqa: SIM118

    @property
    def tokenizer_path(self) -> Path:
        """Its tokenizer.json."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            if (self.path / "tokenizer.model").is_file():
                raise ValueError(
                    f"{path} is missing, and tokenizer.model is not read; transformers makes one "
                    f"of the other: AutoTokenizer.from_pretrained({str(self.path)!r})"
                    f".save_pretrained({str(self.path)!r})"
                )
            raise ValueError(f"{path} is missing")
        return path

    def source_hash(self) -> str:
        """sha256 over config, names, sizes and headers of weight files, and some of each tensor.

        That is `SAMPLE` bytes at its start and in its midst, so that a model that was trained on is
        another one, whichever of its tensors that changed.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self.shards.values())):
            self._open(file)  # refuses what is no such file
            with file.open("rb") as stream:
                digest.update(f"{file.name} {file.stat().st_size}".encode())
                size = stream.read(8)
                header = stream.read(int.from_bytes(size, "little"))
                digest.update(header)
                for name, tensor in sorted(json.loads(header).items()):
                    if name == "__metadata__":
                        continue
                    first, end = tensor["data_offsets"]
                    for at in (first, (first + end) // 2):
                        stream.seek(8 + len(header) + at)
                        digest.update(stream.read(min(SAMPLE, end - at)))
        return digest.hexdigest()

    def _open(self, file: Path):
        if file.name not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                self._files[file.name] = safe_open(file, framework="flax")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
        return self._files[file.name]

    def unmap(self) -> None:
        """Lets go of the pages of weight files that were read; reading more maps them again."""
        self._files.clear()

    def tensor(self, name: str, shape: tuple[int, ...] | None, dtype: Any = None) -> np.ndarray:
        """A tensor, of the type that it is stored in or of `dtype`.

        Raises:
          ValueError: if it cannot be read, is not of this shape or of floats, or is not finite.
        """
        file, value = self.shards.get(name, self.path), self._value(name)
        if shape is not None and value.shape != shape:
            raise ValueError(f"{file}: {name} has shape {value.shape}, config.json implies {shape}")
        if value.dtype.name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"{file}: {name} is {value.dtype}; bf16, f16 and f32 are supported")
        wide = value.astype(np.float32)
        if not np.isfinite(wide).all():
            bad = int(np.size(wide) - np.isfinite(wide).sum())
            raise ValueError(f"{file}: {name} holds {bad} NaN or infinite values")
        return value if dtype is None else wide.astype(dtype)

    def _value(self, name: str) -> np.ndarray:
        """A tensor as it is stored."""
        file = self.shards[name]
        try:
            kind = self._open(file).get_slice(name).get_dtype()
            if kind in FLOAT8:  # which safetensors has no NumPy type for
                return _mapped(file, name, FLOAT8[kind])
            return np.asarray(self._open(file).get_tensor(name))
        except Exception as error:
            raise ValueError(f"{file}: cannot read {name}: {error}") from None


def _mapped(file: Path, name: str, dtype: Any) -> np.ndarray:
    """A tensor of a safetensors file by its header: its length, JSON, then all data."""
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(start - 8))[name]
    offset = start + entry["data_offsets"][0]
    return np.memmap(file, dtype, "r", offset, tuple(entry["shape"]))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: if it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
