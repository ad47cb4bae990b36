"""A language model in a folder: its description, and its tensors as weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mcjax.hub.checkpoint import Checkpoint, read_json
from mcjax.hub.formats import packed_weights, unpacked
from mcjax.models import weights
from mcjax.models.decoder import Layer
from mcjax.models.families import describe
from mcjax.models.families.tensors import Rule
from mcjax.notes import note

PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""What may stand before the names of a language model's tensors."""


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
        self._find_packed()
        self.page, self.decoder = describe(self.values)
        self.prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in self.names), None)
        if self.prefix is None:
            raise ValueError(f"{self.path} has no tensor embed_tokens.weight")
        for file in sorted(set(self.shards.values())):
            self._open(file)
        self._check_tensors()

    def read(
        self,
        dtype: Any = None,
        progress: Callable = lambda items: items,
        *,
        on_host: bool = False,
    ) -> dict[str, Any]:
        """All parameters of a `LanguageModel`, each put where it belongs as it is read.

        Args:
          dtype: of the weights, None for what they are stored in.
          progress: wraps the iteration over layers.
          on_host: leaves them there, NumPy arrays, for whoever shares them out on devices.
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
        return tree if on_host else jax.device_put(tree)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight as it is stored, the embedding's for all."""
        name = f"{self.prefix}embed_tokens.weight"
        if name in self._packed:
            return np.dtype(self._dtype).itemsize
        return 4 if self._open(self.shards[name]).get_slice(name).get_dtype() == "F32" else 2

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
        return next((n for n in (name, f"language_model.{name}") if n in self.names), name)

    def _inner(self, i: int) -> Callable[[str], str]:
        return lambda name: f"{self.prefix}layers.{i}.{name}"

    def _rules(self, i: int, layer: Layer) -> Iterator[Rule]:
        for entry in self.page.tensors(layer):
            if isinstance(entry, Rule):
                yield entry
                continue
            name = self._inner(i)
            there = [
                all(name(n.format(e=0)) in self.names for rule in rules for n in rule.names)
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
        missing = [name for name in read if name not in self.names]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} tensors of a {self.values.get('model_type')} are "
                f"missing, first {missing[0]}"
            )
        surplus = sorted(n for n in self.names - set(read) if not self._harmless(n))
        if surplus:
            raise ValueError(
                f"{self.path}: {len(surplus)} tensors that nothing reads and that may change what "
                f"the model computes, first {surplus[0]}"
            )

    def _harmless(self, name: str) -> bool:
        further = ("mtp.", f"{self.prefix}mtp_")  # predict tokens further on
        if name.endswith("rotary_emb.inv_freq") or name.startswith(further):
            return True
        if self.decoder.tied and name.endswith("lm_head.weight"):
            return True
        if name.endswith(".bias") and name.removesuffix("bias") + "weight" in self._packed:
            return not self._value(name).any()  # which some packers write beside every weight
        part = name.removeprefix(f"{self.prefix}layers.").split(".")[0]
        if part.isdigit() and name.startswith(f"{self.prefix}layers."):
            # Layers after the last predict more tokens at once; they change no logit.
            ahead = self.values.get("num_nextn_predict_layers") or 0
            count = len(self.decoder.layers)
            return count <= int(part) < count + ahead
        inside = self.prefix != "model." and self.prefix and not name.startswith(self.prefix)
        return bool(inside) and "lora_" not in name  # images' tensors of a wrapper

    def _find_packed(self) -> None:
        """Finds weights in few bits, and the `names` that there are with these as if in floats."""
        inner = self.values.get("text_config")
        if isinstance(inner, dict):
            self.values["text_config"] = inner = dict(inner)
        every = [self.values, *([inner] if isinstance(inner, dict) else [])]
        names = ("quantization_config", "compression_config")
        found = [own.pop(name, None) for own in every for name in names]
        settings = next((own for own in found if isinstance(own, dict)), None)
        self._settings = settings or {}
        types = [own.get(name) for own in every for name in ("dtype", "torch_dtype")]
        self._dtype = next(
            (t for t in types if t in ("bfloat16", "float16", "float32")), "bfloat16"
        )
        try:
            self._packed, ignored = packed_weights(self.shards.keys(), self._settings)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        parts = {name for packed in self._packed.values() for name in packed.parts.values()}
        self.names = (self.shards.keys() - parts - ignored) | self._packed.keys()
        if self._packed:
            kinds = " and ".join(sorted({packed.kind for packed in self._packed.values()}))
            count = len(self._packed)
            note(f"{self.path}: {count} weights are {kinds}, dequantised as they are read")
        elif settings is not None:
            note(f"{self.path}: quantization_config is not read, since the tensors are floats")

    def _value(self, name: str) -> np.ndarray:
        """A tensor as it is stored, or what its few bits stand for."""
        if name not in self._packed:
            return super()._value(name)
        packed = self._packed[name]
        parts = {part: super(Folder, self)._value(own) for part, own in packed.parts.items()}
        try:
            return unpacked(packed.kind, parts, self._settings, np.dtype(self._dtype))
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None
