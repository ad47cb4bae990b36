"""mcjax: Mixture-of-Experts models as bit planes, in JAX.

Quantise once with `quantize` (one weight) or `mcjax compress` (a model); then `BitPlanes.slice`,
`load(path, budget=...)` and `Model.refine` serve any precision of the same bits, `load(folder)`
the model as it is, of any of the `families`. `dot` and `expert_dot` multiply with planes, `pmq` is
the published rule of which expert gets how many bits, `odp` skips experts while serving, `tune`
trains the tables of a loaded model, and `lora` adapters beside weights that stay as they are.
`tree` quantises any other network, `qat` trains one once for every width, and `lumix` mixes labels.
"""

from mcjax import lora, lumix, odp, pmq, portable, qat, tree, tune
from mcjax.bitplane import BitPlanes, MixedPlanes
from mcjax.models.families import families
from mcjax.ops import dot, expert_dot
from mcjax.quantize import quantize
from mcjax.serving import Model, load

__all__ = [
    "BitPlanes",
    "MixedPlanes",
    "Model",
    "dot",
    "expert_dot",
    "families",
    "load",
    "lora",
    "lumix",
    "odp",
    "pmq",
    "portable",
    "qat",
    "quantize",
    "tree",
    "tune",
]
