"""The weights of a described model: one walk gives every weight's path, shape and beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax.models.decoder import Decoder, Delta, Dense, Heads, Latent, Layer

_normal = nn.initializers.normal(0.02)
_ones, _zeros = nn.initializers.ones, nn.initializers.zeros


class Role(NamedTuple):
    """One weight of a layer.

    Attributes:
      path: keys from the layer's parameters to it.
      shape: of one layer's.
      start: its initialiser.
      matrix: whether it is a product's weight [..., d_in, d_out], which planes can take.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    start: Any
    matrix: bool


def roles(layer: Layer, width: int) -> Iterator[Role]:
    """Walks over the weights of a layer whose tokens have `width` features."""

    def matrix(path, *shape):
        batch = tuple(range(len(shape) - 2))
        start = nn.initializers.lecun_normal(batch_axis=batch)
        return Role(tuple(path.split(".")), shape, start, True)

    def vector(path, *shape, start=_zeros):
        return Role(tuple(path.split(".")), shape, start, False)

    def norm(path, size=width):
        return vector(path, size, start=_ones)

    yield norm("mixer_norm")
    yield norm("block_norm")
    if layer.sandwich:
        yield norm("mixer_after")
        yield norm("block_after")

    m = layer.mixer
    if isinstance(m, Heads):
        queries = m.heads * m.head_dim * (2 if m.gated else 1)
        qkv = queries + 2 * m.kv_heads * m.head_dim
        yield matrix("mixer.qkv", width, qkv)
        yield matrix("mixer.o", m.heads * m.head_dim, width)
        if m.bias:
            yield vector("mixer.qkv_bias", qkv)
        if m.out_bias:
            yield vector("mixer.o_bias", width)
        if m.qk_norm:
            yield norm("mixer.q_norm", m.head_dim)
            yield norm("mixer.k_norm", m.head_dim)
        if m.sinks:
            yield vector("mixer.sinks", m.heads)
    elif isinstance(m, Latent):
        queries = m.heads * (m.nope_dim + m.rope.dim)
        if m.query_rank is None:
            yield matrix("mixer.q", width, queries)
        else:
            yield matrix("mixer.q_a", width, m.query_rank)
            yield norm("mixer.q_norm", m.query_rank)
            yield matrix("mixer.q_b", m.query_rank, queries)
        yield matrix("mixer.kv_a", width, m.rank + m.rope.dim)
        yield norm("mixer.kv_norm", m.rank)
        yield matrix("mixer.kv_b", m.rank, m.heads * (m.nope_dim + m.value_dim))
        yield matrix("mixer.o", m.heads * m.value_dim, width)
        if m.bias:
            if m.query_rank is not None:
                yield vector("mixer.q_a_bias", m.query_rank)
            yield vector("mixer.kv_a_bias", m.rank + m.rope.dim)
            yield vector("mixer.o_bias", width)
    elif isinstance(m, Delta):
        values = m.value_heads * m.value_dim
        yield matrix("mixer.qkvz", width, m.channels + values)
        yield matrix("mixer.ba", width, 2 * m.value_heads)
        yield vector("mixer.conv", m.channels, m.kernel, start=_normal)
        yield vector("mixer.dt_bias", m.value_heads, start=_ones)
        yield vector("mixer.decay", m.value_heads)
        yield norm("mixer.norm", m.value_dim)
        yield matrix("mixer.o", values, width)

    b = layer.block
    if isinstance(b, Dense):
        yield from _gated(matrix, "block", (), width, b.width)
        return
    yield vector("block.router", width, b.experts, start=nn.initializers.lecun_normal())
    if b.routing.bias:
        yield vector("block.router_bias", b.experts)
    if b.routing.correction:
        yield vector("block.correction", b.experts)
    yield from _gated(matrix, "block.experts", (b.experts,), width, b.width)
    if b.bias:
        yield vector("block.experts.gate_bias", b.experts, b.width)
        yield vector("block.experts.up_bias", b.experts, b.width)
        yield vector("block.experts.down_bias", b.experts, width)
    if b.shared:
        yield from _gated(matrix, "block.shared", (), width, b.shared)
    if b.shared_gate:
        yield vector("block.shared_gate", width, 1, start=nn.initializers.lecun_normal())


def _gated(matrix, path, batch, width, hidden) -> Iterator[Role]:
    yield matrix(f"{path}.gate", *batch, width, hidden)
    yield matrix(f"{path}.up", *batch, width, hidden)
    yield matrix(f"{path}.down", *batch, hidden, width)


def rest(decoder: Decoder) -> Iterator[Role]:
    """Walks over the weights outside the layers: embedding, norm and, if untied, head."""
    table = (decoder.vocab_size, decoder.width)
    yield Role(("embedding",), table, _normal, False)
    yield Role(("norm",), (decoder.width,), _ones, False)
    if not decoder.tied:
        yield Role(("head",), table, nn.initializers.lecun_normal(in_axis=-1, out_axis=-2), False)


def segment_name(s: int) -> str:
    """What the parameters of segment s are called."""
    return f"segment_{s}"


def layer_name(member: int) -> str:
    """What those of a layer of its period are called below that."""
    return f"layer_{member}"


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts a value into nested dicts, making those that are missing."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def get(tree: Any, path: tuple[str, ...]) -> Any:
    """A value out of nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def expert_weights(decoder: Decoder, params: Any) -> list[Any]:
    """The weights that a budget is about: of routed experts or, where there are none, of MLPs."""
    found: dict[bool, list[Any]] = {True: [], False: []}
    for s, segment in enumerate(decoder.segments):
        for member, layer in enumerate(segment.period):
            block = params[segment_name(s)][layer_name(member)]["block"]
            routed = not isinstance(layer.block, Dense)
            own = block["experts"] if routed else block
            found[routed] += [own[name] for name in ("gate", "up", "down")]
    return found[True] or found[False]


def init(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
    """Draws parameters, float32: those of layers stacked over the repeats of their segment."""
    params: dict[str, Any] = {}
    for n, role in enumerate(rest(decoder)):
        put(params, role.path, role.start(jax.random.fold_in(key, n), role.shape, jnp.float32))
    for s, segment in enumerate(decoder.segments):
        for member, layer in enumerate(segment.period):
            of_layer = jax.random.fold_in(jax.random.fold_in(key, 1000 + s), member)
            for n, role in enumerate(roles(layer, decoder.width)):
                keys = jax.random.split(jax.random.fold_in(of_layer, n), segment.repeats)
                stack = jax.vmap(lambda k, r=role: r.start(k, r.shape, jnp.float32))(keys)
                put(params, (segment_name(s), layer_name(member), *role.path), stack)
    return params
