"""Products of activations with weights.

dot       `dot` and `expert_dot`, over dense or plane weights
choice    which product they use
grouped   rows sorted by expert, so that each is computed once
popcount  int8 activations against planes, by counting bits
tiled     dequantised a tile at a time
narrow    bfloat16 embeddings and heads, widened a tile at a time
pallas    the same for GPU and TPU, in registers
"""

from mcjax.ops.dot import dense, dot, expert_dot, expert_rows_dot
from mcjax.ops.grouped import expert_map
from mcjax.ops.narrow import narrow_dot

__all__ = ["dense", "dot", "expert_dot", "expert_map", "expert_rows_dot", "narrow_dot"]
