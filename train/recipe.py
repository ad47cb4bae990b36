"""What a config may set: one frozen dataclass for each kind of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mcjax.models import MixtralConfig


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """Training of a Mixtral on next-token prediction.

    Attributes:
      model: its sizes; `vocab_size` is also that of the tokenizer, which is trained on the text
        unless one is given.
      text: files relative to the config's own folder, or one `tfds:NAME`.
      held_out: share of the text, at its end, kept for validation.
      seq_len: tokens in a sequence.
      batch_size: sequences in a step, over all devices.
      steps: optimiser steps.
      learning_rate: at the end of the warm-up.
      warmup: steps.
      weight_decay: of matrices.
      clip: largest global norm of the gradient.
      balance: weight of the load-balancing loss (Switch Transformer, arXiv 2101.03961, eq. 4,
        for the k experts of each token).
      router_z: weight of the router's z-loss (ST-MoE, arXiv 2202.08906, eq. 5).
      dtype: of activations and products; parameters stay float32.
      seed: of parameters and batches.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.
      evaluate_every: steps between validations.
    """

    model: MixtralConfig
    text: tuple[str, ...] = ()
    held_out: float = 0.02
    seq_len: int = 256
    batch_size: int = 16
    steps: int = 1000
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    router_z: float = 0.001
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    evaluate_every: int = 500

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"recipe: held_out must be between 0 and 1, got {self.held_out}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"recipe: dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"recipe: seq_len {self.seq_len} exceeds the model's "
                f"{self.model.max_position_embeddings} positions"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)
