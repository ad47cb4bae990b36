"""Linear maps whose transposes are written by hand, under every transformation.

A product with planes is linear in its rows, but the loops that compute it are not ones that JAX
transposes well: it would keep the dequantised weight, or refuse a trip count that it does not know.
`linear` says what a map and its transpose are; derivatives of any order and either mode, batches
and shards follow from that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec


def linear(forward: Callable, backward: Callable, constants: Any, operand: Any) -> Any:
    """Applies ``forward(constants, operand)``, which is linear in `operand`.

    Args:
      forward: of two trees of arrays to a tree of arrays, all given to it, none captured.
      backward: its transpose, ``backward(constants, cotangent)`` of a tree like the result to a
        tree like `operand`.
      constants: a tree of arrays. Derivatives by those that are not integers are those of
        `forward`, and can be taken forward only.
      operand: a tree of floating-point arrays.
    """
    constants, operand = alike((constants, operand))
    held, structure = jax.tree.flatten(constants)
    leaves, shape_in = jax.tree.flatten(operand)
    count = len(held)
    shape_out = jax.tree.structure(jax.eval_shape(forward, constants, operand))

    def flat(function, structure_of_argument):
        def apply(*args):
            given = jax.tree.unflatten(structure_of_argument, args[count:])
            result = function(jax.tree.unflatten(structure, args[:count]), given)
            return jax.tree.leaves(alike((result, args))[0])

        return apply

    result = _bind(flat(forward, shape_in), flat(backward, shape_out), held, leaves)
    return jax.tree.unflatten(shape_out, result)


def alike(tree: Any) -> Any:
    """The tree with every array varying over the axes of a `jax.shard_map` that any varies over.

    What a loop carries must vary from the beginning as it will in the end.
    """
    axes: frozenset = frozenset().union(*(axes_of(a) for a in jax.tree.leaves(tree)))

    def vary(a):
        missing = tuple(axis for axis in axes if axis not in axes_of(a))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(vary, tree) if axes else tree


def automatic(function: Callable, *arguments: Any, result: Callable) -> Any:
    """Calls a function, under automatic sharding where the mesh has explicit axes.

    Loops over tiles and experts say nothing of shardings, so the compiler decides inside.

    Args:
      function: of trees of arrays.
      *arguments: for it.
      result: gives the `PartitionSpec`s of what comes back, when they are needed.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function(*arguments)
    return jax.sharding.auto_axes(function, out_sharding=result())(*arguments)


def rows_as(x: jax.Array, last: int = 1) -> Callable[[], PartitionSpec]:
    """For `automatic`: shared out as x is, but for the last axes of the result."""
    spec = jax.typeof(x).sharding.spec
    return lambda: PartitionSpec(*spec[: x.ndim - 1], *[None] * last)


def axes_of(a: Any) -> frozenset:
    """The axes of a `jax.shard_map` that an array varies over."""
    kind = jax.typeof(a)  # its field is named `vma` by some versions of JAX
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def varying_as(shape: jax.ShapeDtypeStruct, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of an array that varies over the axes of a `jax.shard_map` that `like` does."""
    kind = jax.typeof(like)
    field = "vma" if hasattr(kind, "vma") else "manual_axis_type"
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, **{field: getattr(kind, field)})


def _bind(forward, backward, constants, operands):
    program = jax.make_jaxpr(forward)(*constants, *operands)
    return _linear.bind(
        *constants, *operands, program=program, backward=backward, count=len(constants)
    )


def _apply(*args, program, **_):
    return jaxpr_as_fun(program)(*args)


def _jvp(primals, tangents, *, program, backward, count):
    params = {"program": program, "backward": backward, "count": count}
    constants, operands = list(primals[:count]), list(primals[count:])
    result = _linear.bind(*primals, **params)
    changes = []
    if not all(isinstance(t, ad.Zero) for t in tangents[count:]):
        operand = [ad.instantiate_zeros(t) for t in tangents[count:]]
        changes.append(_linear.bind(*constants, *operand, **params))
    moving = [i for i, t in enumerate(tangents[:count]) if not isinstance(t, ad.Zero)]
    if moving:

        def of_moving(*values):
            args = list(constants)
            for i, value in zip(moving, values, strict=True):
                args[i] = value
            return jaxpr_as_fun(program)(*args, *operands)

        moved = [constants[i] for i in moving]
        changes.append(jax.jvp(of_moving, moved, [tangents[i] for i in moving])[1])
    return result, [sum(each[1:], start=each[0]) for each in zip(*changes, strict=True)]


def _transpose(cotangents, *args, program, backward, count):
    constants = list(args[:count])
    cotangents = [ad.instantiate_zeros(c) for c in cotangents]
    cotangents = alike((constants, cotangents))[1]
    return [None] * count + list(_bind(backward, jaxpr_as_fun(program), constants, cotangents))


def _batch(args, dims, *, program, backward, count):
    constants, operands = args[:count], args[count:]
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    operands = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(operands, dims[count:], strict=True)
    ]
    of_constants = tuple(dims[:count])

    def mapped(function):
        def apply(*args):
            axes = of_constants + (0,) * (len(args) - count)
            return jax.vmap(function, axes)(*args)

        return apply

    forward = mapped(jaxpr_as_fun(program))
    result = _bind(forward, mapped(backward), constants, operands)
    return result, [0] * len(result)


_linear = Primitive("mcjax_linear")
_linear.multiple_results = True
_linear.def_impl(_apply)
_linear.def_abstract_eval(lambda *args, program, **_: program.out_avals)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_apply, multiple_results=True))
