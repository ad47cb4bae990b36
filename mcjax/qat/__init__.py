"""Training once for every precision: vertical layering (arXiv 2212.05326) on bit planes.

quantizer   codes by exact prefix, learned tables, straight-through weights, `freeze`
objective   the losses of all widths as one: fixed, uncertainty or minimum-norm weights
distill     losses at many widths, each learning from the next higher one
"""

from mcjax.qat.distill import cascade_losses, sample_widths
from mcjax.qat.objective import Objective, combine, fixed, mgda, min_norm, uncertainty
from mcjax.qat.quantizer import (
    QuantSpec,
    cascade,
    codes,
    fake_quant,
    fake_quant_activations,
    freeze,
    from_planes,
    init_quantizer,
)

__all__ = [
    "Objective",
    "QuantSpec",
    "cascade",
    "cascade_losses",
    "codes",
    "combine",
    "fake_quant",
    "fake_quant_activations",
    "fixed",
    "freeze",
    "from_planes",
    "init_quantizer",
    "mgda",
    "min_norm",
    "sample_widths",
    "uncertainty",
]
