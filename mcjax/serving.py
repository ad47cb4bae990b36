"""Serving an artifact at a budget: `load`, and `refine` to more bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax import checkpoint, odp, parameters, pmq
from mcjax.bitplane import MixedPlanes
from mcjax.hub import Folder, local
from mcjax.models import weights
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.language_model import LanguageModel
from mcjax.notes import note

ATTENTION_BITS = 4

ALLOCATION: dict[str, Any] = {
    "scope": "layer",
    "alpha": 0.0,
    "beta": 0.0,
    "gamma": 2.0,
    "published_rows": False,
}
"""How `load` shares a budget out: by error alone. The measured error already weighs every token by
its routing weight, so PMQ's frequency and weight would count twice; and squares of errors add up
where errors do not. Both measured better or equal, see benchmarks/README.md (ours)."""


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
        return weights.expert_weights(self.module.decoder, self.params)

    @property
    def allocation(self) -> np.ndarray:
        """Each expert's width, int [L, E]; L counts the layers that a budget is about.

        Raises:
          ValueError: if the model has no planes.
        """
        decoder = self.module.decoder
        rows: dict[int, np.ndarray] = {}
        for member in weights.members(decoder):
            for role in weights.budgeted(decoder, member.layer)[:1]:
                held = weights.get(self.params, member.path + role.path)
                if not isinstance(held, MixedPlanes):
                    raise ValueError(
                        f"the model of {self.path} has dense weights, not planes; make an artifact "
                        "of it with `mcjax compress`"
                    )
                widths = held.allocation.reshape(len(member.numbers), -1)
                rows |= dict(zip(member.numbers, widths, strict=True))
        return np.stack([rows[i] for i in sorted(rows)])

    @property
    def average_bits(self) -> float:
        """Average width over experts, tables not counted; of dense weights their own."""
        held = self._shared_out
        if isinstance(held[0], MixedPlanes):
            return float(self.allocation.mean())
        return self.effective_bits

    @property
    def effective_bits(self) -> float:
        """Bits per expert weight as held, tables included."""
        held = self._shared_out
        return 8 * sum(p.nbytes for p in held) / sum(math.prod(p.shape) for p in held)

    def refine(
        self,
        budget: float | None = None,
        *,
        bits: int | None = None,
        allocation: Sequence[Sequence[int]] | None = None,
    ) -> Model:
        """The same artifact at other widths, reading only the planes that are not here yet.

        Args:
          budget: as in `load`.
          bits: as in `load`.
          allocation: as in `load`.

        Returns:
          A new `Model`; this one stays as it is.
        """
        held = self.allocation.tolist()
        reader = checkpoint.ArtifactReader(self.path)
        wanted = resolve_allocation(reader.manifest, budget, bits, allocation)
        params = self.params
        if wanted != held:
            params = parameters.refine_layers(reader, params, wanted)
        return replace(
            self,
            params=params,
            bytes_read=self.bytes_read + reader.bytes_read,
            expert_bytes_read=self.expert_bytes_read + reader.expert_bytes_read,
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
    budget: float | None = None,
    *,
    bits: int | None = None,
    allocation: Sequence[Sequence[int]] | None = None,
    attention_bits: int | None = None,
    dtype: Any = jnp.float32,
    act_bits: int | None = None,
    cache_dtype: Any = None,
    prune: str | None = None,
    quantile: float = odp.QUANTILE,
) -> Model:
    """Loads an artifact at a precision chosen now, reading only the bytes that it needs.

    A Hugging Face folder of a known family is served dense, its weights as they are stored.

    Args:
      path: written by `mcjax compress`; or a folder with config.json and *.safetensors, or a name
        on the hub, see `mcjax.hub.local`.
      budget: average bits per expert weight; PMQ shares them out by the artifact's statistics.
      bits: one width for every expert instead.
      allocation: each expert's width [L, E] instead. Without any of the three, all planes.
      attention_bits: width of all that the budget is not about: attention, shared experts, dense
        layers beside routed ones; None for 4.
      dtype: of activations.
      act_bits: None, or 8 or 16 bits to round activations to, see `mcjax.dot`.
      cache_dtype: of the caches of past tokens, None for `dtype`.
      prune: None, or the policy by which `mcjax.odp` skips experts, "affine" or "paper".
      quantile: share of the lower-ranked experts that is skipped on calibration text.

    Returns:
      A `Model`.

    Raises:
      ValueError: if the artifact is damaged or of another version, or the precision is not
        feasible.
    """
    reader = open_source(path)
    if isinstance(reader, Folder):
        of_artifacts = budget, bits, allocation, attention_bits, act_bits, prune
        return _load_folder(reader, of_artifacts, dtype, cache_dtype)
    manifest = reader.manifest
    widths = resolve_allocation(manifest, budget, bits, allocation)
    attention_bits = ATTENTION_BITS if attention_bits is None else attention_bits
    if attention_bits not in manifest["attention_widths"]:
        raise ValueError(
            f"attention_bits {attention_bits} is not one of {manifest['attention_widths']}"
        )
    params = parameters.read_rest(reader)
    params |= parameters.read_layers(reader, widths, attention_bits)
    if prune is not None:
        pruning = parameters.read_pruning(reader)
        params = with_pruning(reader.decoder, params, pruning, prune, quantile)
    return Model(
        params=params,
        module=LanguageModel(reader.decoder, dtype, act_bits, cache_dtype),
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


def _load_folder(folder: Folder, of_artifacts: tuple, dtype: Any, cache_dtype: Any) -> Model:
    if any(value is not None for value in of_artifacts):
        raise ValueError(
            f"{folder.path} is not an artifact, so budgets, bits, allocations, activation bits and "
            "pruning do not apply; make one with `mcjax compress`"
        )
    params = folder.read()
    return Model(
        params=params,
        module=LanguageModel(folder.decoder, dtype, cache_dtype=cache_dtype),
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
        more = {"threshold": jnp.asarray(odp.thresholds(ratio, quantile))}
        if policy == "affine":
            more["slope"] = jnp.asarray(np.stack([each.slope for each in own]), jnp.float32)
            more["intercept"] = jnp.asarray(np.stack([each.intercept for each in own]))
        weights.get(params, member.path + weights.BLOCK).update(more)
    return params


def statistics(manifest: dict[str, Any]) -> pmq.ExpertStatistics:
    """The PMQ statistics that travel in an artifact."""
    kept = manifest["statistics"]
    return pmq.ExpertStatistics(
        frequency=np.array(kept["frequency"]),
        routing_weight=np.array(kept["routing_weight"]),
        error=np.array(kept["error"]),
        bits=tuple(kept["bits"]),
    )


def resolve_allocation(
    manifest: dict[str, Any],
    budget: float | None,
    bits: int | None,
    allocation: Sequence[Sequence[int]] | None,
) -> list[list[int]]:
    """Each expert's width from whichever one of the three is given.

    Raises:
      ValueError: if more than one is given, or the given one is not feasible.
    """
    if sum(value is not None for value in (budget, bits, allocation)) > 1:
        raise ValueError("give one of budget, bits and allocation, not several")
    stats = statistics(manifest)
    shape, top = stats.frequency.shape, manifest["max_bits"]
    if budget is not None:
        alone = {"scope": "model"} if shape[1] == 1 else {}
        chosen = pmq.allocate(stats, budget, **(ALLOCATION | alone))
    elif allocation is not None:
        chosen = np.asarray(allocation)
        if chosen.shape != shape or not np.isin(chosen, stats.bits).all():
            raise ValueError(
                f"allocation must be [layers, experts] = {shape} of widths {stats.bits}, "
                f"got shape {chosen.shape} with values {np.unique(chosen).tolist()[:10]}"
            )
    else:
        width = top if bits is None else bits
        if width not in stats.bits:
            raise ValueError(f"bits {width} is not one of this artifact's widths {stats.bits}")
        chosen = np.full(shape, width)
    return chosen.tolist()
