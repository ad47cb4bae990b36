"""What a language model is made of, described by data: no arrays, no code of any one family.

A `Decoder` is a list of segments. A `Segment` is a period of layers, each of a structure of its
own, repeated; its weights are stacked over the repeats and its layers scanned, so what a program
costs to compile depends on the number of different layers and not on their count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcjax.models.rope import Rope


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """How queries and keys are normalised.

    Attributes:
      over: "head", every head by itself, or "all", the features of all heads together.
      scale: whether the features have a learned scale.
      rotated: whether it comes after the rotation.
    """

    over: str = "head"
    scale: bool = True
    rotated: bool = False


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Sharpens far queries: ``1 + scale log(1 + floor((position + shift) / length))`` times each.

    (arXiv 2501.19399.)
    """

    scale: float
    length: int
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Grouped-query attention: ``softmax(scale q k' [+ sink]) v``.

    Attributes:
      heads: of queries.
      kv_heads: of keys and values; each serves `heads / kv_heads` heads of queries.
      head_dim: features of one head.
      scale: multiplies the scores.
      rope: rotary positions of the first `rope.dim` features of a head, None for none.
      window: keys a query can see, itself included; None for all before it.
      chunked: whether a query instead sees no key before the last multiple of `window`.
      bias: whether queries, keys and values have a bias.
      out_bias: whether the output has one.
      qk_norm: of queries and keys, None for none.
      value_norm: whether each head of values is divided by its root mean square.
      shared_values: whether values are what keys are before their norm and rotation.
      clip: bounds of queries, keys and values before their rotation, None for none.
      temperature: of the queries, None for 1.
      sinks: whether each head has a learned score that takes part in the softmax and gives nothing.
      gated: whether each head's output is multiplied by the sigmoid of a gate beside its query.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    chunked: bool = False
    bias: bool = False
    out_bias: bool = False
    qk_norm: QKNorm | None = None
    value_norm: bool = False
    shared_values: bool = False
    clip: float | None = None
    temperature: Temperature | None = None
    sinks: bool = False
    gated: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"config: {self.heads} attention heads cannot share {self.kv_heads} key-value heads"
            )


@dataclass(frozen=True, kw_only=True)
class Index:
    """Which keys a query attends to: those of the `top_k` greatest index scores (arXiv 2512.02556).

        score_ts = sum_h w_th relu(q_th . k_s / sqrt(dim)) / sqrt(heads)

    Attributes:
      heads: of index queries, which come from the queries' latent; they share one key a token.
      dim: features of a head, of which the first are rotated as those of the attention.
      top_k: keys of a query.
      interleaved: as in `Rope`, for index queries and keys.
    """

    heads: int
    dim: int
    top_k: int
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): keys and values share one latent a token.

    Attributes:
      heads: of queries.
      query_rank: features of the queries' latent, None for queries straight from the input.
      rank: features of the keys' and values' latent.
      nope_dim: features of a head that are not rotated.
      value_dim: features of a head's value.
      scale: multiplies the scores.
      rope: of the `rope.dim` rotated features of a head; their key is shared by all heads.
      bias: whether the two projections into latents and the output have a bias.
      temperature: as in `Heads`.
      index: chooses keys, None for all.
    """

    heads: int
    query_rank: int | None
    rank: int
    nope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    bias: bool = False
    temperature: Temperature | None = None
    index: Index | None = None


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A short gated convolution: ``c * conv(b * x)`` of three projections b, c and x of a token.

    Attributes:
      kernel: taps of the causal convolution over each feature.
      bias: whether projections and convolution have biases.
    """

    kernel: int
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The gated delta rule (arXiv 2412.06464): a matrix a head that tokens decay and correct.

    With keys k and queries q of unit length, decay a_t in (0, 1) and rate b_t in (0, 1):

        S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})' k_t))',   o_t = S_t' q_t / sqrt(key_dim)

    Attributes:
      key_heads: heads of queries and keys; each serves `value_heads / key_heads` heads of values.
      value_heads: heads of values.
      key_dim: features of a head of queries or keys.
      value_dim: features of a head of values.
      kernel: taps of the causal convolution over each feature of queries, keys and values.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    def __post_init__(self):
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"config: {self.value_heads} heads of values cannot share {self.key_heads} of keys"
            )

    @property
    def channels(self) -> int:
        """Features that are convolved."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What joins gate g and up u of a gated network: ``(min(u) + shift) * act(g)``.

    Attributes:
      kind: "silu", ``g sigmoid(alpha g)``, or "gelu_tanh".
      alpha: see above.
      limit: g is kept below it and u within plus or minus it, None for no limit.
      shift: added to u.
    """

    kind: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A gated network for every token: ``down(act(gate(x), up(x)))``.

    Attributes:
      width: hidden features.
      activation: see `Activation`.
      bias: whether the three projections have biases.
    """

    width: int
    activation: Activation = Activation()
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a token's experts are chosen and weighed.

    Attributes:
      top_k: experts of a token.
      score: "softmax" over all experts, or "sigmoid" of each.
      bias: whether the router's logits have one.
      correction: whether a learned bias is added to scores for choosing, not for weighing.
      groups: experts lie in so many groups, of which the best are kept.
      groups_kept: how many groups.
      group_best: a group's score is the sum of so many best ones of its own.
      normalise: whether chosen weights are divided by their sum.
      floor: added to that sum.
      scale: multiplies the weights.
      expert_scale: whether each expert has a learned factor on its weights.
      norm: whether the router sees what the block's norm is of, at unit length times a learned
        scale, instead of what that norm gives.
      inputs: whether weights multiply what goes into experts, not what comes out of them.
    """

    top_k: int
    score: str = "softmax"
    bias: bool = False
    correction: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 2
    normalise: bool = True
    floor: float = 1e-20
    scale: float = 1.0
    expert_scale: bool = False
    norm: bool = False
    inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class Routed:
    """Experts of which each token meets few, and perhaps one that it always meets.

    Attributes:
      experts: how many.
      width: hidden features of each.
      routing: how they are chosen.
      activation: of experts and of the shared one.
      bias: whether the experts' three projections have biases.
      shared: hidden features of the shared expert, 0 for none.
      shared_gate: whether its output is multiplied by the sigmoid of a gate.
      apart: whether experts have a norm of their own of what the block's norm is of, and what they
        and the shared expert give is normalised before it is added.
    """

    experts: int
    width: int
    routing: Routing
    activation: Activation = Activation()
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    apart: bool = False

    def __post_init__(self):
        if self.routing.top_k > self.experts:
            raise ValueError(f"config: {self.routing.top_k} experts per token of {self.experts}")
        r = self.routing
        if self.experts % r.groups:
            raise ValueError(
                f"config: {self.experts} experts do not lie in {r.groups} equal groups"
            )
        each = self.experts // r.groups
        if r.groups > 1 and not (r.groups_kept <= r.groups and r.group_best <= each):
            raise ValueError(
                f"config: {r.groups_kept} of {r.groups} groups of {each} experts cannot be kept"
            )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: a mixer of tokens and a network, each added back to what it is given.

    Attributes:
      mixer: of tokens.
      block: the network.
      norms: of what goes into each of them, "before", of what comes out of them, "after", or
        "both".
      residual: multiplies what comes out of them.
      scaled: whether the layer's output is multiplied by a learned number.
    """

    mixer: Heads | Latent | Convolution | Delta
    block: Dense | Routed
    norms: str = "before"
    residual: float = 1.0
    scaled: bool = False


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Layers `period[0], period[1], ...`, all of them `repeats` times over."""

    period: tuple[Layer, ...]
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model.

    Attributes:
      vocab_size: rows of its embedding.
      width: features of a token.
      segments: its layers, in order.
      max_position_embeddings: positions that it was made for.
      norm_eps: of every norm of tokens.
      embedding_scale: multiplies embeddings.
      logit_scale: multiplies logits.
      logit_cap: bounds logits z to ``logit_cap tanh(z / logit_cap)``, None for no bound.
      tied: whether the head is the embedding.
      eos_token_ids: tokens that end a text.
    """

    vocab_size: int
    width: int
    segments: tuple[Segment, ...]
    max_position_embeddings: int
    norm_eps: float = 1e-6
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    tied: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for token in self.eos_token_ids:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"config: eos_token_id must be 0 to {self.vocab_size - 1}, got {token!r}"
                )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer, in order."""
        return tuple(layer for s in self.segments for layer in s.period * s.repeats)

    @property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """For every layer, in order: its segment, its place in the period, and which repeat."""
        return tuple(
            (s, member, repeat)
            for s, segment in enumerate(self.segments)
            for repeat in range(segment.repeats)
            for member in range(len(segment.period))
        )


def segments(layers: Sequence[Layer]) -> tuple[Segment, ...]:
    """Finds the repeats in a list of layers.

    From each layer on, the period is taken that covers the most layers by repeating, of equals the
    shortest; a layer that begins no repeat is a segment of its own.
    """
    found: list[Segment] = []
    start = 0
    while start < len(layers):
        best, repeats = 1, 1
        for period in range(1, (len(layers) - start) // 2 + 1):
            count = 1
            body = layers[start : start + period]
            while layers[start + count * period : start + (count + 1) * period] == body:
                count += 1
            if count > 1 and period * count > best * repeats:
                best, repeats = period, count
        found.append(Segment(period=tuple(layers[start : start + best]), repeats=repeats))
        start += best * repeats
    return tuple(found)
