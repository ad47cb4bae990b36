"""Flax modules.

config   sizes, from Hugging Face's config.json
rope     rotary positions and their stretchings
mixtral  the language model, dense or on planes
"""

from mcjax.models.config import MixtralConfig, RopeConfig
from mcjax.models.mixtral import Mixtral, PlaneSpec

__all__ = ["Mixtral", "MixtralConfig", "PlaneSpec", "RopeConfig"]
