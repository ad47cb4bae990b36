"""Llama (arXiv 2407.21783) and Mistral (arXiv 2310.06825), dense."""

from __future__ import annotations

from mcjax.models.decoder import Decoder, Dense, Layer
from mcjax.models.families import shared
from mcjax.models.families.fields import Fields
from mcjax.models.families.tensors import gated, gated_biases

MODEL_TYPES = ("llama", "mistral")
NAME = "Llama, Mistral (dense)"
CHECKED = "llama3's rotation, all biases, windows, tied head"


def decoder(fields: Fields) -> Decoder:
    """Describes a Llama or a Mistral from its config."""
    fields.only("hidden_act", "silu")
    layer = Layer(
        mixer=shared.heads(fields, window=fields.window(), **shared.both_biases(fields)),
        block=Dense(width=fields.size("intermediate_size"), bias=fields.flag("mlp_bias")),
    )
    return shared.model(fields, [layer] * fields.size("num_hidden_layers"))


outside = shared.outside


def tensors(layer: Layer) -> list:
    """The tensors of a layer."""
    rules = [*shared.norms(), *shared.attention(layer.mixer), *gated("block", "mlp")]
    return rules + (gated_biases("block", "mlp") if layer.block.bias else [])
