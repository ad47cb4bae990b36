"""mcjax: Mixture-of-Experts models as bit planes, in JAX."""

from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.quantize import quantize

__all__ = ["BitPlanes", "MixedPlanes", "quantize"]
