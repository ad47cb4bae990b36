"""Any network's weights as bit planes, whatever it is written in.

A function of a tree of weights and of data, for instance Flax's `module.apply`, is run once to see
what its weights multiply; the tree is quantised by that, and the same function goes on with it:

    watched = tree.watch(function, params, batches)
    planes, report = tree.shrink(params, watched)
    served = tree.serving(function)  # served(tree.slice_tree(planes, 2), batch)

view      where a weight's axes are, on its way through a program
program   programs run with weights watched or replaced where something multiplies them
watch     what that is: layouts, and Gram matrices of inputs
shrink    rules, planes in place of weights, and what became of each
kernel    a weight as planes
serve     functions of trees with planes
artifact  such trees on disk
frozen    what once-QAT trained
"""

from mcjax.tree.artifact import KIND, load, save
from mcjax.tree.frozen import freeze_tree
from mcjax.tree.kernel import Kernel
from mcjax.tree.serve import serving
from mcjax.tree.shrink import ALL, Leaf, Report, Rule, dequantize_tree, shrink, slice_tree
from mcjax.tree.view import Layout
from mcjax.tree.watch import Watched, watch

__all__ = [
    "ALL",
    "KIND",
    "Kernel",
    "Layout",
    "Leaf",
    "Report",
    "Rule",
    "Watched",
    "dequantize_tree",
    "freeze_tree",
    "load",
    "save",
    "serving",
    "shrink",
    "slice_tree",
    "watch",
]
