"""Any network's weights as bit planes, whatever it is written in.

A function of a tree of weights and of data, for instance Flax's `module.apply`, is run once to see
what its weights multiply; the tree is quantised by that, and the same function goes on with it:

    watched = tree.watch(function, params, batches)
    planes, report = tree.shrink(params, watched)
    served = tree.serving(function)  # served(tree.slice_tree(planes, 2), batch)

Widths may differ from weight to weight: `costs` measures what each does to the function's result,
`allocate` shares a budget out by that.

view      where a weight's axes are, on its way through a program
program   programs run with weights watched or replaced where something multiplies them
products  what these multiply, as rows and matrices
watched   what that is over batches: layouts, and Gram matrices of inputs
rules     planes in place of weights: of which, and what became of each
kernel    a weight as planes
budgets   widths by what each weight costs at each
serve     functions of trees with planes
artifact  such trees on disk
qwix      trees that qwix quantised
once      weights that train as they will be served, at every width
frozen    what once-QAT trained in layers of mcjax's own
"""

from mcjax.divergence import divergence
from mcjax.tree import once
from mcjax.tree.artifact import KIND, load, save
from mcjax.tree.budgets import allocate, costs, squared_change
from mcjax.tree.frozen import freeze_tree
from mcjax.tree.kernel import Kernel, dequantize_tree, slice_tree
from mcjax.tree.qwix import from_qwix
from mcjax.tree.rules import ALL, Leaf, Report, Rule, shrink
from mcjax.tree.serve import serving
from mcjax.tree.view import Layout
from mcjax.tree.watched import Watched, watch

__all__ = [
    "ALL",
    "KIND",
    "Kernel",
    "Layout",
    "Leaf",
    "Report",
    "Rule",
    "Watched",
    "allocate",
    "costs",
    "dequantize_tree",
    "divergence",
    "freeze_tree",
    "from_qwix",
    "load",
    "once",
    "save",
    "serving",
    "shrink",
    "slice_tree",
    "squared_change",
    "watch",
]
