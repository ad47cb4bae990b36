"""Hugging Face folders: the files, the tensors in them, and the weights that they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mcjax.models import weights
from mcjax.models.decoder import Layer
from mcjax.models.families import describe
from mcjax.models.families.tensors import Rule
from mcjax.notes import note

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""What may stand before the names of a language model's tensors."""


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
            raise ValueError(f"{path} is missing")
        return path

    def source_hash(self) -> str:
        """sha256 over config and the names, sizes and headers of the weight files."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self.shards.values())):
            with file.open("rb") as stream:
                digest.update(f"{file.name} {file.stat().st_size}".encode())
                digest.update(stream.read(1 << 20))
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
        file = self.shards[name]
        try:
            value = np.asarray(self._open(file).get_tensor(name))
        except Exception as error:
            raise ValueError(f"{file}: cannot read {name}: {error}") from None
        if shape is not None and value.shape != shape:
            raise ValueError(f"{file}: {name} has shape {value.shape}, config.json implies {shape}")
        if value.dtype.name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"{file}: {name} is {value.dtype}; bf16, f16 and f32 are supported")
        wide = value.astype(np.float32)
        if not np.isfinite(wide).all():
            bad = int(np.size(wide) - np.isfinite(wide).sum())
            raise ValueError(f"{file}: {name} holds {bad} NaN or infinite values")
        return value if dtype is None else wide.astype(dtype)


class Folder(Checkpoint):
    """A language model of any known family.

    Attributes:
      decoder: what its config.json describes.

    Raises:
      ValueError: also for tensors that are missing, and for those that nobody reads and that may
        change what the model computes.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.values = read_json(self.path / "config.json")
        self._refuse_quantized()
        if self.values.pop("quantization_config", None) is not None:
            note(f"{self.path}: quantization_config is not read, since the tensors are floats")
        self.page, self.decoder = describe(self.values)
        self.prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in self.shards), None)
        if self.prefix is None:
            raise ValueError(f"{self.path} has no tensor embed_tokens.weight")
        for file in sorted(set(self.shards.values())):
            self._open(file)
        self._check_tensors()

    def read(self, dtype: Any = None, progress: Callable = lambda items: items) -> dict[str, Any]:
        """All parameters of a `LanguageModel`, each put where it belongs as it is read.

        Args:
          dtype: of the weights, None for what they are stored in.
          progress: wraps the iteration over layers.
        """
        tree = self.read_rest(dtype)
        places = self.decoder.places
        for i in progress(range(len(places))):
            s, member, repeat = places[i]
            at = weights.segment_name(s), weights.layer_name(member)
            for path, value in self.read_layer(i, dtype):
                where = (*at, *path.split("."))
                if repeat == 0:
                    room = (self.decoder.segments[s].repeats, *value.shape)
                    weights.put(tree, where, np.empty(room, value.dtype))
                weights.get(tree, where)[repeat] = value
            self.unmap()
        return jax.device_put(tree)

    def read_rest(self, dtype: Any = None) -> dict[str, Any]:
        """Weights outside the layers: embedding, norm and, if untied, head."""
        tree: dict[str, Any] = {}
        outside = {role.name: role for role in weights.rest(self.decoder)}
        for rule in self.page.outside(self.decoder):
            for path, value in self._apply(rule, self._outer, outside, 1, dtype):
                weights.put(tree, tuple(path.split(".")), value)
        return tree

    def read_layer(self, i: int, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
        """Path and value of every weight of layer i."""
        layer = self.decoder.layers[i]
        roles = {r.name: r for r in weights.roles(layer, self.decoder.width)}
        experts = getattr(layer.block, "experts", 1)
        for rule in self._rules(i, layer):
            yield from self._apply(rule, self._inner(i), roles, experts, dtype)

    def _apply(self, rule: Rule, name, roles, experts, dtype):
        found = []
        for own in rule.names:
            if "{e}" in own:
                each = [self.tensor(name(own.format(e=e)), None, dtype) for e in range(experts)]
                found.append(np.stack(each))
            else:
                found.append(self.tensor(name(own), None, dtype))
        try:
            values = rule.read(found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {rule.names} do not fit together: {error}") from None
        for path, value in zip(rule.paths, values, strict=True):
            if value.shape != roles[path].shape:
                shapes = [a.shape for a in found]
                raise ValueError(
                    f"{self.path}: {', '.join(map(name, rule.names))} has shape {shapes}, "
                    f"config.json implies {roles[path].shape} for {path}"
                )
            yield path, value

    def _outer(self, name: str) -> str:
        if name != "lm_head.weight":
            return f"{self.prefix}{name}"
        return next((n for n in (name, f"language_model.{name}") if n in self.shards), name)

    def _inner(self, i: int) -> Callable[[str], str]:
        return lambda name: f"{self.prefix}layers.{i}.{name}"

    def _rules(self, i: int, layer: Layer) -> Iterator[Rule]:
        for entry in self.page.tensors(layer):
            if isinstance(entry, Rule):
                yield entry
                continue
            name = self._inner(i)
            there = [
                all(name(n.format(e=0)) in self.shards for rule in rules for n in rule.names)
                for rules in entry
            ]
            yield from entry[there.index(True) if True in there else 0]

    def _names(self) -> Iterator[str]:
        """Every tensor that is read."""
        for rule in self.page.outside(self.decoder):
            yield from map(self._outer, rule.names)
        for i, layer in enumerate(self.decoder.layers):
            name, experts = self._inner(i), getattr(layer.block, "experts", 1)
            for rule in self._rules(i, layer):
                for own in rule.names:
                    several = range(experts) if "{e}" in own else range(1)
                    yield from (name(own.format(e=e)) for e in several)

    def _check_tensors(self) -> None:
        read = list(self._names())
        missing = [name for name in read if name not in self.shards]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} tensors of a {self.values.get('model_type')} are "
                f"missing, first {missing[0]}"
            )
        surplus = sorted(n for n in self.shards.keys() - set(read) if not self._harmless(n))
        if surplus:
            raise ValueError(
                f"{self.path}: {len(surplus)} tensors that nothing reads and that may change what "
                f"the model computes, first {surplus[0]}"
            )

    def _harmless(self, name: str) -> bool:
        if name.endswith("rotary_emb.inv_freq") or name.startswith("mtp."):
            return True
        if self.decoder.tied and name.endswith("lm_head.weight"):
            return True
        part = name.removeprefix(f"{self.prefix}layers.").split(".")[0]
        if part.isdigit() and name.startswith(f"{self.prefix}layers."):
            # Layers after the last predict more tokens at once; they change no logit.
            ahead = self.values.get("num_nextn_predict_layers") or 0
            count = len(self.decoder.layers)
            return count <= int(part) < count + ahead
        inside = self.prefix != "model." and self.prefix and not name.startswith(self.prefix)
        return bool(inside) and "lora_" not in name  # images' tensors of a wrapper

    def _refuse_quantized(self) -> None:
        for ending, kind in (
            (".qweight", "GPTQ or AWQ"),
            (".weight_scale_inv", "FP8"),
            ("_blocks", "MXFP4"),
            (".weight_packed", "compressed-tensors"),
        ):
            name = next((n for n in self.shards if n.endswith(ending)), None)
            if name is not None:
                raise ValueError(
                    f"{self.path} is a {kind} checkpoint ({name}), whose weights are quantised "
                    "already; give the model in bf16, f16 or f32, as its makers publish it"
                )


def write(
    directory: str | Path, config: Mapping[str, Any], params: Any, dtype: Any = ml_dtypes.bfloat16
) -> None:
    """Writes dense parameters as config.json and model.safetensors that transformers reads.

    Args:
      directory: an existing folder.
      config: what its config.json is to say, `model_type` with it.
      params: of the `LanguageModel` that it describes.
      dtype: of the stored weights.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    page, decoder = describe(config)
    tensors: dict[str, np.ndarray] = {}

    def put(rule: Rule, tree: Any, prefix: str) -> None:
        own = [np.asarray(weights.get(tree, tuple(path.split(".")))) for path in rule.paths]
        for name, value in zip(rule.names, rule.write(own), strict=True):
            several = "{e}" in name
            for e, one in enumerate(value if several else [value]):
                full = name if name.startswith("lm_head.") else prefix + name.format(e=e)
                tensors[full] = np.ascontiguousarray(one.astype(dtype))

    for rule in page.outside(decoder):
        put(rule, params, PREFIXES[0])
    for i, layer in enumerate(decoder.layers):
        own = weights.of_layer(decoder, params, i)
        for entry in page.tensors(layer):
            for rule in [entry] if isinstance(entry, Rule) else entry[0]:
                put(rule, own, f"{PREFIXES[0]}layers.{i}.")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**config, "dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


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
