"""Serving an artifact at a budget: `load`, and `refine` to more bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import allocate, checkpoint, odp, parameters, programme, refine, sharding
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.hub import Folder, local
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.language_model import LanguageModel
from mcjax.notes import note
from mcjax.ops import Adapted
from mcjax.ops.adapted import plain

ATTENTION_BITS = 4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["module", "path", "bytes_read", "expert_bytes_read"],
)
@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Model:
    """A language model and its parameters, as one pytree.

    Attributes:
      params: for `module.apply({"params": params}, tokens)`.
      module: the Linen module that `params` fit.
      path: the artifact or folder.
      bytes_read: uncompressed bytes read from there.
      expert_bytes_read: those of them that are expert weights with their tables.
    """

    params: Any
    module: Any
    path: str
    bytes_read: int
    expert_bytes_read: int

    def __call__(self, tokens: jax.typing.ArrayLike | Sequence[Sequence[int]]) -> Any:
        """Reads tokens.

        Args:
          tokens: int [B, T], or as many lists of one length.

        Returns:
          Next-token logits [B, T, vocab].

        Raises:
          TypeError: if concrete tokens are not integers.
          ValueError: if they are not [B, T], or outside the vocabulary.
        """
        return _logits(self.module, self.params, _checked(tokens, self.module.config.vocab_size))

    @property
    def _shared_out(self) -> list[Any]:
        """The weights that a budget is about."""
        return list(map(plain, weights.expert_weights(self.module.decoder, self.params)))

    @property
    def widths(self) -> dict[tuple[int, str], np.ndarray]:
        """Each part's width by its layer and what it multiplies, see `mcjax.allocate`.

        Raises:
          ValueError: if the model has no planes.
        """
        decoder = self.module.decoder
        found: dict[tuple[int, str], np.ndarray] = {}
        for member in weights.members(decoder):
            for tap, roles in weights.by_tap(member.layer, decoder.width).items():
                held = plain(weights.get(self.params, member.path + roles[0].path))
                if isinstance(held, BitPlanes):
                    held = weights.looked_up(held)
                if not isinstance(held, MixedPlanes):
                    raise ValueError(
                        f"the model of {self.path} has dense weights, not planes; make an artifact "
                        "of it with `mcjax compress`"
                    )
                every = held.allocation
                if roles[0].routed and (spread := self.spread(member)) is not None:
                    every = np.take_along_axis(every, spread.place, axis=1)
                found |= {(i, tap): w for i, w in zip(member.numbers, every, strict=True)}
        return found

    def spread(self, member: weights.Member) -> parameters.Spread | None:
        """Where experts of some layers are on a mesh; None if every device has all."""
        block = weights.get(self.params, member.path + weights.BLOCK)
        return parameters.Spread.of(block, self.module.shared)

    @property
    def allocation(self) -> np.ndarray:
        """Each expert's width, int [L, E]; L counts the layers that a budget is about.

        Where the widths of an expert's matrices differ it is [L, E, 2]: of `gate` and `up`, and of
        `down`.

        Raises:
          ValueError: if the model has no planes.
        """
        return allocate.to_experts(self.module.decoder, self.widths)

    @property
    def average_bits(self) -> float:
        """Average width of expert weights, tables not counted; of dense weights their own."""
        if not isinstance(self._shared_out[0], MixedPlanes):
            return self.effective_bits
        decoder, widths, total, count = self.module.decoder, self.widths, 0.0, 0
        for i, layer in enumerate(decoder.layers):
            for role in weights.budgeted(decoder, layer):
                size = math.prod(role.shape)
                total, count = total + size * np.mean(widths[i, str(role.tap)]), count + size
        return float(total / count)

    @property
    def effective_bits(self) -> float:
        """Bits per expert weight as held, tables included, and what fills a mesh's devices up."""
        decoder = self.module.decoder
        every = (role for layer in decoder.layers for role in weights.budgeted(decoder, layer))
        held = sum(weight.nbytes for weight in self._shared_out)
        return 8 * held / sum(math.prod(role.shape) for role in every)

    def refine(
        self,
        budget: float | str | None = None,
        *,
        bits: int | None = None,
        allocation: Sequence[Any] | None = None,
        policy: str = "loss",
    ) -> Model:
        """The same artifact at other widths, reading only the planes that are not here yet.

        What the budget is not about stays as it is; a budget in bytes is about everything. On a
        mesh experts stay on their devices, each of which has room for as many of a width as the one
        that has most; `load` gives them places that suit the widths.

        Args:
          budget: as in `load`.
          bits: as in `load`.
          allocation: as in `load`.
          policy: as in `load`.

        Returns:
          A new `Model`; this one stays as it is.

        Raises:
          ValueError: if it has adapters, or as `load`.
        """
        refuse_adapters(self.params)
        held = self.widths
        reader = checkpoint.ArtifactReader(self.path)
        wanted = resolve_widths(reader, budget, bits, allocation, None, policy)
        if not isinstance(_parsed(budget), programme.Bytes):
            parts = allocate.parts(reader.decoder, reader.manifest)
            wanted |= {(p.layer, p.tap): held[p.layer, p.tap] for p in parts if not p.budgeted}
        shared = self.module.shared
        params = refine.refine_layers(reader, self.params, wanted, shared)
        return replace(
            self,
            params=params,
            bytes_read=self.bytes_read + reader.bytes_read,
            expert_bytes_read=self.expert_bytes_read + reader.expert_bytes_read,
        )


def refuse_adapters(params: Any) -> None:
    """Raises ValueError if a weight has adapters, for what reads further planes of weights."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    if any(isinstance(leaf, Adapted) for leaf in leaves):
        raise ValueError(
            "the model has adapters: take it without, and apply them to what it becomes"
        )


def _checked(tokens: Any, vocab_size: int) -> Any:
    """Tokens as an array, checked as far as they are concrete and on this host."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tokens)):
        return jnp.asarray(tokens)
    if not isinstance(tokens, jax.Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise ValueError("tokens must be [B, T]; these rows differ in length") from None
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], got {tokens.ndim} dimensions: {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.size and getattr(tokens, "is_fully_addressable", True):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"tokens must be 0 to {vocab_size - 1}, got {low} to {high}")
    return tokens


@partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens):
    return module.apply({"params": params}, tokens)


def load(
    path: str | Path,
    budget: float | str | None = None,
    *,
    bits: int | None = None,
    allocation: Sequence[Any] | None = None,
    attention_bits: int | None = None,
    policy: str = "loss",
    dtype: Any = jnp.float32,
    act_bits: int | None = None,
    cache_dtype: Any = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str | Sequence[str] | None] | None = None,
) -> Model:
    """Loads an artifact at a precision chosen now, reading only the bytes that it needs.

    A Hugging Face folder of a known family is served dense, its weights as they are stored.

    Args:
      path: written by `mcjax compress`; or a folder with config.json and *.safetensors, or a name
        on the hub, see `mcjax.hub.local`.
      budget: average bits per expert weight; or what may be read in all, in bytes, "4.2GB" or
        "4GiB", which attention and all else then share. See `mcjax.allocate`.
      bits: one width for every expert instead.
      allocation: each expert's width [L, E] instead, or [L, E, 2] for `gate` and `up`, and `down`.
        Without any of the three, all planes.
      attention_bits: width of all that a budget in bits is not about: attention, shared experts,
        dense layers beside routed ones; None for 4.
      policy: how a budget is shared out: "loss", by what was measured at the end of the model; or
        "paper", by MC-MoE's rule for experts, see `mcjax.pmq`.
      dtype: of activations.
      act_bits: None, or 8 or 16 bits to round activations to, see `mcjax.dot`.
      cache_dtype: of the caches of past tokens, None for `dtype`.
      prune: None, or the policy by which `mcjax.odp` skips experts, "affine" or "paper".
      quantile: share of the lower-ranked experts that is skipped on calibration text.
      mesh: of devices that share weights, caches and sequences; None for one device.
      rules: which of its axes shares what, see `mcjax.sharding.RULES`, which hold where these say
        nothing.

    Returns:
      A `Model`.

    Raises:
      ValueError: if the artifact is damaged or of another version, or the precision is not
        feasible.
    """
    shared = None if mesh is None else sharding.resolve(mesh, rules)
    reader = open_source(path)
    if isinstance(reader, Folder):
        of_artifacts = budget, bits, allocation, attention_bits, act_bits, prune
        return _load_folder(reader, of_artifacts, dtype, cache_dtype, shared)
    reserved = 0 if prune is None else parameters.pruning_bytes(reader.decoder)
    widths = resolve_widths(reader, budget, bits, allocation, attention_bits, policy, reserved)
    params = parameters.read_rest(reader, shared)
    params |= parameters.read_layers(reader, widths, shared)
    if prune is not None:
        pruning = parameters.read_pruning(reader)
        params = with_pruning(reader.decoder, params, pruning, prune, quantile)
    if shared is not None:
        params = sharding.put_on(reader.decoder, params, shared)
    return Model(
        params=params,
        module=LanguageModel(reader.decoder, dtype, act_bits, cache_dtype, shared),
        path=str(reader.directory),
        bytes_read=reader.bytes_read,
        expert_bytes_read=reader.expert_bytes_read,
    )


def open_source(path: str | Path) -> checkpoint.ArtifactReader | Folder:
    """An artifact or a Hugging Face folder, its `decoder` known and no weights read.

    Raises:
      ValueError: if it is neither.
    """
    folder = local(path)
    if folder.is_dir() and not (folder / checkpoint.MANIFEST).is_file():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{path} is not an mcjax artifact: it has no {checkpoint.MANIFEST}; and no Hugging "
                "Face folder: config.json is missing"
            )
        return Folder(folder)
    return checkpoint.ArtifactReader(folder, "model")


def _load_folder(
    folder: Folder, of_artifacts: tuple, dtype: Any, cache_dtype: Any, shared: Any
) -> Model:
    if any(value is not None for value in of_artifacts):
        raise ValueError(
            f"{folder.path} is not an artifact, so budgets, bits, allocations, activation bits and "
            "pruning do not apply; make one with `mcjax compress`"
        )
    params = folder.read(on_host=shared is not None)
    if shared is not None:
        params = sharding.put_on(folder.decoder, params, shared)
    return Model(
        params=params,
        module=LanguageModel(folder.decoder, dtype, None, cache_dtype, shared),
        path=str(folder.path),
        bytes_read=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        expert_bytes_read=sum(w.nbytes for w in weights.expert_weights(folder.decoder, params)),
    )


def with_pruning(
    decoder: Decoder,
    params: Any,
    statistics: Sequence[odp.PruningStatistics],
    policy: str,
    quantile: float = odp.QUANTILE,
) -> Any:
    """Parameters by which a `LanguageModel` skips experts as a policy says.

    Args:
      decoder: the model.
      params: its parameters, dense or planes.
      statistics: of each layer of routed experts.
      policy: "affine" or "paper".
      quantile: as in `load`.

    Raises:
      ValueError: for an unknown policy or a quantile outside 0 to 1.
    """
    if policy not in odp.POLICIES:
        raise ValueError(f"unknown pruning policy {policy!r}; one of {odp.POLICIES}")
    if all(np.size(of_layer.ratio) == 0 for of_layer in statistics):
        routings = [s.block.routing for s in decoder.layers if isinstance(s.block, Routed)]
        why = "each token has one expert" if routings else "the model has no routed experts"
        if any(routing.top_k > 1 for routing in routings):
            why = "weights multiply what goes into experts, so none stands in for another"
        note(f"{why}: there is none to skip, nothing is pruned")
        return params
    params = jax.tree.map(lambda a: a, params)
    routed = [i for i, layer in enumerate(decoder.layers) if isinstance(layer.block, Routed)]
    for member in weights.members(decoder):
        if not isinstance(member.layer.block, Routed):
            continue
        own = [statistics[routed.index(i)] for i in member.numbers]
        ratio = np.stack([each.ratio for each in own])
        mu = odp.thresholds(ratio, quantile, apart=policy == "paper")
        more = {"threshold": jnp.asarray(mu)}
        if policy == "affine":
            more["slope"] = jnp.asarray(np.stack([each.slope for each in own]), jnp.float32)
            more["intercept"] = jnp.asarray(np.stack([each.intercept for each in own]))
        weights.get(params, member.path + weights.BLOCK).update(more)
    return params


def resolve_widths(
    reader: checkpoint.ArtifactReader,
    budget: float | str | None,
    bits: int | None,
    allocation: Sequence[Any] | None,
    attention_bits: int | None,
    policy: str = "loss",
    reserved: int = 0,
) -> dict[tuple[int, str], np.ndarray]:
    """Each part's width from whichever one of budget, bits and allocation is given.

    The others are as in `load`; `reserved` are bytes that are read beside weights.

    Raises:
      ValueError: if more than one is given, or the given one is not feasible.
    """
    decoder, manifest = reader.decoder, reader.manifest
    if sum(value is not None for value in (budget, bits, allocation)) > 1:
        raise ValueError("give one of budget, bits and allocation, not several")
    if policy not in allocate.POLICIES:
        raise ValueError(f"policy must be one of {allocate.POLICIES}, got {policy!r}")
    wanted, stored = _parsed(budget), tuple(manifest["statistics"]["bits"])
    in_bytes = isinstance(wanted, programme.Bytes)
    if in_bytes and (attention_bits is not None or policy != "loss"):
        raise ValueError(
            f"the budget {budget} chooses every width by loss; leave attention_bits and policy out"
        )
    others = ATTENTION_BITS if attention_bits is None else attention_bits
    if others not in manifest["attention_widths"]:
        raise ValueError(f"attention_bits {others} is not one of {manifest['attention_widths']}")
    if wanted is not None and policy == "loss":
        return allocate.allocate(decoder, manifest, wanted, others, reserved)
    shape = np.shape(manifest["statistics"]["frequency"])
    if wanted is not None:
        chosen: Any = allocate.published(manifest, wanted)
    elif allocation is not None:
        chosen = np.asarray(allocation)
        if chosen.shape not in (shape, (*shape, 2)) or not np.isin(chosen, stored).all():
            raise ValueError(
                f"allocation must be [layers, experts] = {shape}, or {(*shape, 2)} for gate and "
                f"up, and down, of widths {stored}, got shape {chosen.shape} with values "
                f"{np.unique(chosen).tolist()[:10]}"
            )
    else:
        width = manifest["max_bits"] if bits is None else bits
        if width not in stored:
            raise ValueError(f"bits {width} is not one of this artifact's widths {stored}")
        chosen = np.full(shape, width)
    return allocate.of_experts(decoder, manifest, chosen, others)


def _parsed(budget: float | str | None) -> Any:
    return None if budget is None else programme.parse(budget)
