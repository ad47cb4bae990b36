"""The weights of a described model: one walk gives every weight's path, shape and beginning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models.decoder import Convolution, Decoder, Delta, Dense, Heads, Latent, Layer, Routed

_normal = nn.initializers.normal(0.02)
_ones, _zeros = nn.initializers.ones, nn.initializers.zeros


BLOCK = ("block",)
"""Where a layer's network is, to which pruning adds what it needs; see `mcjax.odp`."""

ROUTER = ("block", "router")
"""What chooses experts."""

EXPERTS = ("block", "experts")
"""Where the weights of routed experts are."""

PLACES = ("block", "places")
"""Which device has which expert, where they are shared out; see `mcjax.ops.exchange`."""

AFTER = "block_after"
"""The scale of the norm of what a network gives, in layers that have one."""


EXPERT, OUT, IN = "expert", "out", "in"
"""Names of axes of weights, see `Role.axes`."""


class Role(NamedTuple):
    """One weight of a layer.

    Attributes:
      path: keys from the layer's parameters to it.
      shape: of one layer's.
      start: its initialiser.
      tap: what its product multiplies, by the name that `run_layer` gives it, of a weight
        [..., d_in, d_out] that planes can take; None for others.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    start: Any
    tap: str | None

    @property
    def name(self) -> str:
        """The path, dotted."""
        return ".".join(self.path)

    @property
    def routed(self) -> bool:
        """Whether it has a matrix for each of the layer's experts."""
        return self.tap is not None and len(self.shape) == 3

    @property
    def axes(self) -> tuple[str | None, ...]:
        """What each of its axes is, for a mesh to share out: "expert", "in", "out" or None.

        Latents' up-projections are split by heads where they are used, so they have no "out"; the
        output features of embedding and head are tokens.
        """
        expert = (EXPERT,) if self.path[:-1] == EXPERTS else ()
        if self.tap is not None and self.tap != "latent":
            return (*expert, IN, OUT)
        if self.path in (("embedding",), ("head",)):
            return (OUT, IN)
        of_network = self.path[-1] in ("gate_bias", "up_bias", "down_bias")
        return (*expert, *[None] * (len(self.shape) - len(expert) - 1), OUT if of_network else None)


def roles(layer: Layer, width: int) -> Iterator[Role]:
    """Walks over the weights of a layer whose tokens have `width` features."""

    def matrix(path, tap, *shape):
        batch = tuple(range(len(shape) - 2))
        start = nn.initializers.lecun_normal(batch_axis=batch)
        return Role(tuple(path.split(".")), shape, start, tap)

    def vector(path, *shape, start=_zeros):
        return Role(tuple(path.split(".")), shape, start, None)

    def norm(path, size=width):
        return vector(path, size, start=_ones)

    if layer.norms in ("before", "both"):
        yield norm("mixer_norm")
        yield norm("block_norm")
    if layer.norms in ("after", "both"):
        yield norm("mixer_after")
        yield norm("block_after")
    if layer.scaled:
        yield norm("scale", 1)

    m = layer.mixer
    if isinstance(m, Heads):
        queries = m.heads * m.head_dim * (2 if m.gated else 1)
        qkv = queries + (1 if m.shared_values else 2) * m.kv_heads * m.head_dim
        yield matrix("mixer.qkv", "mixer_input", width, qkv)
        yield matrix("mixer.o", "mixer_output", m.heads * m.head_dim, width)
        if m.bias:
            yield vector("mixer.qkv_bias", qkv)
        if m.out_bias:
            yield vector("mixer.o_bias", width)
        if m.qk_norm is not None and m.qk_norm.scale:
            each = m.qk_norm.over == "head"
            yield norm("mixer.q_norm", (1 if each else m.heads) * m.head_dim)
            yield norm("mixer.k_norm", (1 if each else m.kv_heads) * m.head_dim)
        if m.sinks:
            yield vector("mixer.sinks", m.heads)
    elif isinstance(m, Latent):
        queries = m.heads * (m.nope_dim + m.rope.dim)
        if m.query_rank is None:
            yield matrix("mixer.q", "mixer_input", width, queries)
        else:
            yield matrix("mixer.q_a", "mixer_input", width, m.query_rank)
            yield norm("mixer.q_norm", m.query_rank)
            yield matrix("mixer.q_b", "query_latent", m.query_rank, queries)
        yield matrix("mixer.kv_a", "mixer_input", width, m.rank + m.rope.dim)
        yield norm("mixer.kv_norm", m.rank)
        yield matrix("mixer.kv_b", "latent", m.rank, m.heads * (m.nope_dim + m.value_dim))
        yield matrix("mixer.o", "mixer_output", m.heads * m.value_dim, width)
        if m.bias:
            if m.query_rank is not None:
                yield vector("mixer.q_a_bias", m.query_rank)
            yield vector("mixer.kv_a_bias", m.rank + m.rope.dim)
            yield vector("mixer.o_bias", width)
        if m.index is not None:
            index = m.index.heads * m.index.dim
            yield matrix("mixer.index_q", "query_latent", m.query_rank, index)
            yield matrix("mixer.index_k", "mixer_input", width, m.index.dim)
            yield norm("mixer.index_norm", m.index.dim)
            yield vector("mixer.index_norm_bias", m.index.dim)
            yield vector("mixer.index_weight", width, m.index.heads, start=_normal)
    elif isinstance(m, Convolution):
        yield matrix("mixer.bcx", "mixer_input", width, 3 * width)
        yield vector("mixer.conv", width, m.kernel, start=_normal)
        yield matrix("mixer.o", "mixer_output", width, width)
        if m.bias:
            yield vector("mixer.bcx_bias", 3 * width)
            yield vector("mixer.conv_bias", width)
            yield vector("mixer.o_bias", width)
    elif isinstance(m, Delta):
        values = m.value_heads * m.value_dim
        yield matrix("mixer.qkvz", "mixer_input", width, m.channels + values)
        yield matrix("mixer.ba", "mixer_input", width, 2 * m.value_heads)
        yield vector("mixer.conv", m.channels, m.kernel, start=_normal)
        yield vector("mixer.dt_bias", m.value_heads, start=_ones)
        yield vector("mixer.decay", m.value_heads)
        yield norm("mixer.norm", m.value_dim)
        yield matrix("mixer.o", "mixer_output", values, width)

    b = layer.block
    if isinstance(b, Dense):
        yield from _gated(matrix, "block", "block", (), width, b.width)
        if b.bias:
            yield from _biases(vector, "block", (), width, b.width)
        return
    yield vector(".".join(ROUTER), width, b.experts, start=nn.initializers.lecun_normal())
    if b.routing.bias:
        yield vector("block.router_bias", b.experts)
    if b.routing.correction:
        yield vector("block.correction", b.experts)
    if b.routing.expert_scale:
        yield norm("block.expert_scale", b.experts)
    if b.routing.norm:
        yield norm("block.router_norm")
    yield from _gated(matrix, "block.experts", "expert", (b.experts,), width, b.width)
    if b.bias:
        yield from _biases(vector, "block.experts", (b.experts,), width, b.width)
    if b.shared:
        yield from _gated(matrix, "block.shared", "shared", (), width, b.shared)
    if b.apart:
        yield norm("block.experts_norm")
        yield norm("block.experts_after")
        yield norm("block.shared_after")
    if b.shared_gate:
        yield vector("block.shared_gate", width, 1, start=nn.initializers.lecun_normal())


def _gated(matrix, path, tap, batch, width, hidden) -> Iterator[Role]:
    yield matrix(f"{path}.gate", f"{tap}_input", *batch, width, hidden)
    yield matrix(f"{path}.up", f"{tap}_input", *batch, width, hidden)
    yield matrix(f"{path}.down", f"{tap}_hidden", *batch, hidden, width)


def _biases(vector, path, batch, width, hidden) -> Iterator[Role]:
    yield vector(f"{path}.gate_bias", *batch, hidden)
    yield vector(f"{path}.up_bias", *batch, hidden)
    yield vector(f"{path}.down_bias", *batch, width)


def corrected(layer: Layer, width: int) -> tuple[Role, ...]:
    """The weights of a layer that each width has a correction of: its outer norms and its router.

    A correction is a factor of each entry of their last axis.
    """
    paths = {(name,) for name in ("mixer_norm", "mixer_after", "block_norm", AFTER)}
    return tuple(r for r in roles(layer, width) if r.path in paths or r.path == ROUTER)


def by_tap(layer: Layer, width: int) -> dict[str, tuple[Role, ...]]:
    """The weights of a layer that planes can take, by what they multiply."""
    found: dict[str, tuple[Role, ...]] = {}
    for role in roles(layer, width):
        if role.tap is not None:
            found[role.tap] = (*found.get(role.tap, ()), role)
    return found


def rest(decoder: Decoder) -> Iterator[Role]:
    """Walks over the weights outside the layers: embedding, norm and, if untied, head."""
    table = (decoder.vocab_size, decoder.width)
    yield Role(("embedding",), table, _normal, None)
    yield Role(("norm",), (decoder.width,), _ones, None)
    if not decoder.tied:
        yield Role(("head",), table, nn.initializers.lecun_normal(in_axis=-1, out_axis=-2), None)


def segment_name(s: int) -> str:
    """What the parameters of segment s are called."""
    return f"segment_{s}"


def layer_name(member: int) -> str:
    """What those of a layer of its period are called below that."""
    return f"layer_{member}"


class Member(NamedTuple):
    """The layers of one structure and place in a segment's period, whose weights are stacked.

    Attributes:
      path: keys to their weights.
      layer: their structure.
      numbers: which layers they are, in order.
    """

    path: tuple[str, str]
    layer: Layer
    numbers: tuple[int, ...]


def members(decoder: Decoder) -> tuple[Member, ...]:
    """Every stack of layers."""
    first, found = 0, []
    for s, segment in enumerate(decoder.segments):
        period = len(segment.period)
        end = first + period * segment.repeats
        for m, layer in enumerate(segment.period):
            path = segment_name(s), layer_name(m)
            found.append(Member(path, layer, tuple(range(first + m, end, period))))
        first = end
    return tuple(found)


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


def budgeted(decoder: Decoder, layer: Layer) -> tuple[Role, ...]:
    """The weights of a layer that a budget shares bits out to.

    They are those of routed experts. A decoder that has none anywhere has its networks instead,
    each the one expert of its layer.
    """
    dense = isinstance(layer.block, Dense)
    if dense and any(isinstance(other.block, Routed) for other in decoder.layers):
        return ()
    path = BLOCK if dense else EXPERTS
    every = roles(layer, decoder.width)
    return tuple(r for r in every if r.tap is not None and r.path[:-1] == path)


def budgeted_layers(decoder: Decoder) -> tuple[int, ...]:
    """The layers that have such weights."""
    return tuple(i for i, layer in enumerate(decoder.layers) if budgeted(decoder, layer))


def expert_weights(decoder: Decoder, params: Any) -> list[Any]:
    """The weights that a budget is about, stacked over layers."""
    return [
        get(params, member.path + role.path)
        for member in members(decoder)
        for role in budgeted(decoder, member.layer)
    ]


def of_layer(decoder: Decoder, params: Any, i: int) -> Any:
    """The weights of layer i out of the stacks of its segment."""
    s, member, repeat = decoder.places[i]
    own = params[segment_name(s)][layer_name(member)]
    return jax.tree.map(
        lambda w: w.at(repeat) if isinstance(w, MixedPlanes) else w[repeat],
        own,
        is_leaf=lambda w: isinstance(w, MixedPlanes),
    )


def stacked(decoder: Decoder, layers: Sequence[Any]) -> dict[str, Any]:
    """The inverse of `of_layer`, for arrays: trees of every layer to those of the segments."""
    params: dict[str, Any] = {}
    for member in members(decoder):
        each = [layers[i] for i in member.numbers]
        put(params, member.path, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
    return params


def labels(decoder: Decoder, function: Callable[[Role], Any]) -> dict[str, Any]:
    """A tree like the parameters with `function` of every weight's role."""
    tree: dict[str, Any] = {}
    for role in rest(decoder):
        put(tree, role.path, function(role))
    for member in members(decoder):
        for role in roles(member.layer, decoder.width):
            put(tree, member.path + role.path, function(role))
    return tree


def split_stacks(own: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """What a scan over a segment's layers takes apart, and how to put one layer together again.

    Planes belong to all layers, even where each layer has one weight of them: the scan closes over
    them, and each layer looks its own up. Only places are taken apart, as all other weights are.

    Returns:
      A list of arrays [R, ...], and a function of the list of one layer's to its weights.
    """
    leaves, structure = jax.tree.flatten(
        own, is_leaf=lambda w: isinstance(w, BitPlanes | MixedPlanes)
    )
    leaves = [looked_up(w) if isinstance(w, BitPlanes) else w for w in leaves]
    apart = [(w.stack, w.slot) if isinstance(w, MixedPlanes) else w for w in leaves]

    def together(values):
        one = [
            replace(w, stack=v[0], slot=v[1]) if isinstance(w, MixedPlanes) else v
            for w, v in zip(leaves, values, strict=True)
        ]
        return jax.tree.unflatten(structure, one)

    return apart, together


def looked_up(planes: BitPlanes) -> MixedPlanes:
    """Planes [R, ..., d_in, d_out] as one stack, in which layers look theirs up."""
    first = planes.shape[:-2]
    stack = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(first) :]), planes)
    slot = jnp.arange(math.prod(first), dtype=jnp.int32).reshape(first)
    return MixedPlanes(stacks=(stack,), stack=jnp.zeros_like(slot), slot=slot)


def init(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
    """Draws parameters, float32: those of layers stacked over the repeats of their segment."""
    params: dict[str, Any] = {}
    for n, role in enumerate(rest(decoder)):
        put(params, role.path, role.start(jax.random.fold_in(key, n), role.shape, jnp.float32))
    for m, member in enumerate(members(decoder)):
        of_member = jax.random.fold_in(key, 1000 + m)
        for n, role in enumerate(roles(member.layer, decoder.width)):
            keys = jax.random.split(jax.random.fold_in(of_member, n), len(member.numbers))
            stack = jax.vmap(lambda k, r=role: r.start(k, r.shape, jnp.float32))(keys)
            put(params, member.path + role.path, stack)
    return params
