"""What a config may set: one frozen dataclass for each kind of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mcjax.lumix import MODES
from mcjax.models.decoder import Decoder, Routed
from mcjax.models.families import describe
from mcjax.models.resnet import ResNet, resnet8, resnet18, resnet20, resnet50
from mcjax.models.vit import ViT, vit_digits, vit_small, vit_tiny
from mcjax.qat import QuantSpec

VISION_MODELS = {
    "resnet": ResNet,
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "vit": ViT,
    "vit_digits": vit_digits,
    "vit_small": vit_small,
    "vit_tiny": vit_tiny,
}


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """Training of a model with routed experts on next-token prediction.

    Attributes:
      model: its config.json, of any family in `mcjax.families()`; `vocab_size` is also that of the
        tokenizer, which is trained on the text unless one is given.
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
      accumulation: parts of a batch whose gradients are computed one after the other.
      remat: compute each layer again on the way back, for memory.
      seed: of parameters and batches.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.
      evaluate_every: steps between validations.
    """

    model: Mapping[str, Any]
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
    accumulation: int = 1
    remat: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    evaluate_every: int = 500

    def __post_init__(self):
        every = ("save_every", "log_every", "evaluate_every")
        for name in ("seq_len", "batch_size", "steps", "accumulation", *every):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe: a batch_size of {self.batch_size} cannot be cut into "
                f"{self.accumulation} parts"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"recipe: held_out must be between 0 and 1, got {self.held_out}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"recipe: dtype must be float32 or bfloat16, got {self.dtype!r}")
        decoder = self.decoder
        if self.seq_len > decoder.max_position_embeddings:
            raise ValueError(
                f"recipe: seq_len {self.seq_len} exceeds the model's "
                f"{decoder.max_position_embeddings} positions"
            )
        if not any(isinstance(layer.block, Routed) for layer in decoder.layers):
            raise ValueError("recipe: the model has no routed experts, and losses are about those")

    @property
    def decoder(self) -> Decoder:
        """What `model` describes."""
        return describe(self.model)[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class VisionRecipe:
    """Training of one image classifier for all of its widths at once.

    Attributes:
      model: a name of `VISION_MODELS`.
      model_fields: of its constructor, beyond number of classes, spec, bits and dtype.
      dataset: see `data_sources`.
      image_size: random parts of images are resized to this side to train, and central ones to
        test, as for ImageNet; None leaves images, which must then be of one size.
      pad: pixels of zeros around an image before a part of its former size is cut out.
      flip: mirror images at random, where the dataset allows it (digits do not).
      widths: to train, descending; none trains a plain float network.
      group_size: input features that share a table, None for one table an output channel.
      act_bits: of activations, see `mcjax.qat.QuantSpec`.
      distill: what each width but the first takes from the next higher one's output rather than
        from the labels, 0 to 1 (Any-Precision DNN, arXiv 1911.07346, has 1; on digits 0 is best).
      objective: how the losses of the widths combine: "fixed", "uncertainty" or "mgda", see
        `mcjax.qat`.
      weights: of the widths' losses under "fixed"; none for 1 each.
      sampled: how many of the widths a step trains, see `mcjax.qat.sample_widths`, so that its cost
        need not grow with their number; None for all. Needs the objective "fixed". A `loss_k` in
        metrics.csv is then of the last step that trained k, and `loss` the mean over the step's.
        For GPU and TPU: on CPU XLA's convolutions take eight times as long inside a branch.
      mixing: "none", "mixup" or "cutmix", see `mcjax.lumix`.
      alpha: of the Beta distribution that mixes.
      r_s: LUMix's share of the network's own opinion of a mixed label; 0, as `r_r`, for plain
        mixing.
      r_r: LUMix's share of chance.
      optimiser: "sgd" with Nesterov momentum 0.9, or "adamw".
      learning_rate: at the end of the warm-up; falls by a cosine to a hundredth.
      warmup: steps.
      weight_decay: of kernels.
      clip: largest global norm of the gradient, for each width that a step trains.
      batch_size: images in a step, over all devices.
      accumulation: parts of a batch whose gradients are computed one after the other; each
        normalises by its own statistics.
      epochs: passes over the images; this or `steps`.
      steps: optimiser steps; this or `epochs`.
      dtype: of activations and products; parameters stay float32.
      seed: of parameters, batches and mixing.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.
      evaluate_every: steps between tests.
      shifted: datasets of the same classes to test accuracy with at the end, among the classes
        that they show; ImageNet-A for instance. Those that are not there are left out.
      outliers: datasets of no known class, to test at the end how well the largest probability
        tells them apart; ImageNet-O for instance. Those that are not there are left out.
    """

    model: str
    model_fields: Mapping[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    image_size: int | None = None
    pad: int = 0
    flip: bool = False
    widths: tuple[int, ...] = (8, 4, 3, 2, 1)
    group_size: int | None = None
    act_bits: int | None = 8
    distill: float = 0.0
    objective: str = "fixed"
    weights: tuple[float, ...] = ()
    sampled: int | None = None
    mixing: str = "none"
    alpha: float = 1.0
    r_s: float = 0.0
    r_r: float = 0.0
    optimiser: str = "sgd"
    learning_rate: float = 0.1
    warmup: int = 0
    weight_decay: float = 1e-4
    clip: float = 1.0
    batch_size: int = 128
    accumulation: int = 1
    epochs: float | None = None
    steps: int | None = None
    dtype: str = "float32"
    seed: int = 0
    save_every: int = 500
    log_every: int = 50
    evaluate_every: int = 500
    shifted: tuple[str, ...] = ()
    outliers: tuple[str, ...] = ()

    def __post_init__(self):
        choices = {
            "model": tuple(VISION_MODELS),
            "objective": ("fixed", "uncertainty", "mgda"),
            "mixing": ("none", *MODES),
            "optimiser": ("sgd", "adamw"),
            "dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"recipe: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        least = {
            1: ("batch_size", "accumulation", "save_every", "log_every", "evaluate_every"),
            0: ("pad", "warmup", "weight_decay"),
        }
        for bound, names in least.items():
            for name in names:
                if not getattr(self, name) >= bound:
                    value = getattr(self, name)
                    raise ValueError(f"recipe: {name} must be at least {bound}, got {value}")
        for name in ("alpha", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} must be positive, got {getattr(self, name)}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"recipe: give either epochs or steps, got {self.epochs} and {self.steps}"
            )
        for name in ("epochs", "steps", "image_size"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} must be positive, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe: a batch_size of {self.batch_size} cannot be cut into "
                f"{self.accumulation} parts"
            )
        for name in ("distill", "r_s", "r_r"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"recipe: {name} must be 0 to 1, got {getattr(self, name)}")
        if self.r_s + self.r_r > 1:
            raise ValueError(f"recipe: r_s + r_r must be at most 1, got {self.r_s} + {self.r_r}")
        if self.mixing == "none" and self.r_s + self.r_r:
            raise ValueError(f"recipe: r_s {self.r_s} and r_r {self.r_r} need mixing, got none")
        if self.weights and (self.objective != "fixed" or len(self.weights) != len(self.widths)):
            raise ValueError(
                f"recipe: weights {self.weights} need the objective fixed and one for each of the "
                f"widths {self.widths}, got {self.objective}"
            )
        if self.sampled is not None:
            if self.sampled not in range(1, len(self.widths) + 1):
                raise ValueError(
                    f"recipe: sampled must be 1 to the number of widths, got {self.sampled} of "
                    f"{self.widths}"
                )
            if self.objective != "fixed":
                raise ValueError(
                    f"recipe: sampled {self.sampled} needs the objective fixed, whose weights do "
                    f"not depend on losses left out; got {self.objective}"
                )
        try:
            self.module(2)
        except (TypeError, ValueError) as error:
            raise ValueError(f"recipe: {error}") from None

    @property
    def spec(self) -> QuantSpec | None:
        """How the layers are quantised."""
        if not self.widths:
            return None
        return QuantSpec(widths=self.widths, group_size=self.group_size, act_bits=self.act_bits)

    def module(self, num_classes: int) -> ResNet | ViT:
        """The network, at float weights."""
        make = VISION_MODELS[self.model]
        return make(num_classes, spec=self.spec, dtype=self.dtype, **self.model_fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)
