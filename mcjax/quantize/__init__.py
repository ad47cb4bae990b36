"""Float weights to `BitPlanes`.

api     `quantize`, the checked entry point, vmapped over leading axes
nested  the joint-target quantiser of all widths at once
gptq    dedicated GPTQ at one width, the baseline
gram    damping of Gram matrices
"""

from mcjax.quantize.api import quantize
from mcjax.quantize.gptq import gptq

__all__ = ["gptq", "quantize"]
