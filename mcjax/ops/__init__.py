"""Products of activations with weights.

dot       `dot` and `expert_dot`, over dense or plane weights
adapted   a weight and a low-rank change of it
choice    which product they use
columns   a weight whose output features are shared out along an axis of a mesh
device    what the device can do
exchange  rows sent to the devices that have their experts, and back
fragments weights that are arrays only while a layer is at work
grouped   rows sorted by expert, so that each is computed once
popcount  int8 activations against planes, by counting bits
tiled     dequantised a tile at a time
layout    how planes are laid out in a TPU's memory
linear    linear maps with transposes of their own, under every transformation
narrow    bfloat16 embeddings and heads, widened a tile at a time
route     each token's most probable experts
pallas    rows grouped by expert: the plan of blocks, and the kernel for TPU
triton    its GPU kernel, on matrix units
dp4a      few rows on a GPU, by counting bits
unpack    planes written out on a GPU, for many rows
"""

from mcjax.ops.adapted import Adapted
from mcjax.ops.columns import Columns
from mcjax.ops.dot import Shifted, aligned, dense, dot, expert_dot, expert_rows_dot
from mcjax.ops.exchange import Places
from mcjax.ops.fragments import Fragment
from mcjax.ops.grouped import expert_map
from mcjax.ops.narrow import narrow_dot

__all__ = [
    "Adapted",
    "Columns",
    "Fragment",
    "Places",
    "Shifted",
    "aligned",
    "dense",
    "dot",
    "expert_dot",
    "expert_map",
    "expert_rows_dot",
    "narrow_dot",
]
