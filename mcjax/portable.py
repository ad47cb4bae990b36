"""Planes and models outside of a process: `jax.export` and `flax.serialization`.

Both keep arrays by themselves and ask only for what is static beside them, which here is JSON.
Pickling and Orbax need nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, cast

import flax.serialization
import jax.numpy as jnp
import numpy as np
from jax import export

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models import decoder, rope
from mcjax.models.language_model import LanguageModel
from mcjax.serving import Model

_DESCRIPTIONS: dict[str, Any] = {
    name: kind
    for module in (decoder, rope)
    for name, kind in vars(module).items()
    if dataclasses.is_dataclass(kind)
}


def encode(value: Any) -> Any:
    """A description, or a module that has one, as plain JSON values."""
    if isinstance(value, LanguageModel):
        return {
            "LanguageModel": {
                "decoder": encode(value.decoder),
                "dtype": np.dtype(value.dtype).name,
                "act_bits": value.act_bits,
                "cache_dtype": value.cache_dtype and np.dtype(value.cache_dtype).name,
            }
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {type(value).__name__: fields}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`.

    Raises:
      ValueError: for the name of something that is no description.
    """
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    ((name, fields),) = value.items()
    fields = {key: decode(item) for key, item in fields.items()}
    if name == "LanguageModel":
        kinds = {n: fields[n] and getattr(jnp, fields[n]) for n in ("dtype", "cache_dtype")}
        return LanguageModel(**fields | kinds)
    if name not in _DESCRIPTIONS:
        raise ValueError(f"{name!r} describes no part of a model")
    return _DESCRIPTIONS[name](**fields)


def _register(kind: Any, data: tuple[str, ...], meta: tuple[str, ...]) -> None:
    def dump(static: Any) -> bytes:
        return json.dumps(encode(tuple(static))).encode()

    def load(text: Any) -> Any:
        return decode(json.loads(bytes(text)))

    def make(static: Any, children: Iterable[Any]) -> Any:
        fields = zip(meta + data, (*static, *children), strict=True)
        return kind(**dict(fields))

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"mcjax.{kind.__name__}",
        serialize_auxdata=dump,
        deserialize_auxdata=load,
        from_children=cast(Any, make),
    )

    def to_state(value: Any) -> dict[str, Any]:
        return {n: flax.serialization.to_state_dict(getattr(value, n)) for n in data}

    def from_state(target: Any, state: Any) -> Any:
        own = {n: getattr(target, n) for n in data}
        new = {n: flax.serialization.from_state_dict(own[n], state[n], name=n) for n in data}
        return dataclasses.replace(target, **new)

    flax.serialization.register_serialization_state(kind, to_state, from_state)


_register(BitPlanes, ("planes", "tables"), ("widths", "d_in", "group_size", "rotated"))
_register(MixedPlanes, ("stacks", "stack", "slot"), ("most",))
_register(Model, ("params",), ("module", "path", "bytes_read", "expert_bytes_read"))
