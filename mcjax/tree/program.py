"""Runs a JAX program with some weights watched, or replaced, where it multiplies them.

Whatever a network is written in, in the end it multiplies by `dot_general` and convolves by
`conv_general_dilated`. `run` evaluates the program of a function equation by equation; its weights
go through as `View`s, and where one of them meets one of these two, a `Visitor` is asked. All else
that uses a weight gets it as an array. Loops stay loops: under `scan` a weight of all layers is
visited as that of one, and what the visitor found comes out stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, Literal, jaxpr_as_fun

from mcjax.tree.view import View

INLINE = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)
"""Primitives that only call a program."""

REMAT = ("remat2", "checkpoint", "remat")


class Visitor:
    """What becomes of products with weights.

    Attributes:
      found: by the names of weights trees of arrays, which leave loops stacked if the loop runs
        over the weight, else summed.
    """

    def __init__(self):
        self.found: dict[str, Any] = {}

    def product(self, view: View, eqn: Any, other: jax.Array, first: bool) -> Any:
        """A product's result, or None to have it computed with the weight as an array.

        Args:
          view: the weight.
          eqn: of `dot_general` or `conv_general_dilated`.
          other: what it meets.
          first: whether the weight is the first operand.
        """
        return None

    def otherwise(self, view: View, use: str) -> None:
        """Told of a weight that is used in another way, by the name of a primitive."""

    def inside(self) -> Visitor:
        """For the body of a loop or a branch, which finds things of its own."""
        return self

    def lost(self) -> Visitor:
        """For the body of a loop that nothing comes out of."""
        return self.inside()

    def add(self, found: dict[str, Any]) -> None:
        """Takes in what a body found."""
        for name, value in found.items():
            mine = self.found.get(name)
            self.found[name] = value if mine is None else jax.tree.map(jnp.add, mine, value)

    def unfold(self, view: View) -> tuple[Any, Callable[[Any], View]] | None:
        """What a loop over the view's first axis runs over, and the view of one step of it.

        None to have it run over the array.
        """
        return None


def run(program: ClosedJaxpr, arguments: Sequence[Any], visitor: Visitor) -> list[jax.Array]:
    """Evaluates a program whose arguments are arrays and views."""
    outs = _run(program.jaxpr, program.consts, arguments, visitor)
    return _arrays(outs, "output", visitor)


def array(value: Any) -> Any:
    """A view as an array."""
    if isinstance(value, Joined):
        return jnp.concatenate([view.dense() for view in value.views], axis=value.axis)
    return value.dense() if isinstance(value, View) else value


def _arrays(values: Sequence[Any], use: str, visitor: Visitor) -> list[Any]:
    """Views as arrays, of which the visitor is told."""
    for value in values:
        for view in value.views if isinstance(value, Joined) else (value,):
            if isinstance(view, View):
                visitor.otherwise(view, use)
    return list(map(array, values))


def _run(jaxpr: Jaxpr, consts, arguments, visitor: Visitor) -> list[Any]:
    held: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    held |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else held[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        views = [value for value in values if isinstance(value, View | Joined)]
        joined = any(isinstance(value, Joined) for value in values)
        rules = _OF_JOINED if joined else _RULES
        rule = rules.get(eqn.primitive.name) if views else None
        outs = None if rule is None else rule(eqn, values, visitor)
        if outs is None:
            outs = _as_it_is(eqn, _arrays(values, eqn.primitive.name, visitor))
        held.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _as_it_is(eqn, values) -> list[Any]:
    given = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, Literal)
    }
    name = eqn.primitive.name
    about = DebugInfo(name, name, ("",) * len(given), ("",) * len(eqn.outvars))
    program = Jaxpr((), list(given), eqn.outvars, [eqn], eqn.effects, about)
    return jaxpr_as_fun(ClosedJaxpr(program, ()))(*given.values())


def _cast(eqn, values, visitor):
    (view,) = values
    dtype = eqn.params["new_dtype"]
    if isinstance(view, Joined):
        each = [_cast(eqn, [one], visitor) for one in view.views]
        return None if None in each else [view._replace(views=tuple(one for (one,) in each))]
    if not all(jnp.issubdtype(kind, jnp.floating) for kind in (view.dtype, dtype)):
        return None
    return [view.then(view.axes, lambda w: w.astype(dtype), dtype=dtype)]


def _copied(eqn, values, visitor):
    return list(values)


def _transposed(eqn, values, visitor):
    (view,) = values
    order = eqn.params["permutation"]
    return [view.then([view.axes[n] for n in order], lambda w: jnp.transpose(w, order))]


def _reshaped(eqn, values, visitor):
    view = values[0]
    if not isinstance(view, View) or eqn.params.get("dimensions") is not None:
        return None
    made = view.reshaped(eqn.params["new_sizes"])
    return None if made is None else [made]


def _squeezed(eqn, values, visitor):
    (view,) = values
    made = view.reshaped(eqn.outvars[0].aval.shape)
    return None if made is None else [made]


def _broadcast(eqn, values, visitor):
    view, shape = values[0], eqn.params["shape"]
    if not isinstance(view, View) or len(values) > 1:
        return None
    made = view.reshaped(shape) if math.prod(shape) == math.prod(view.shape) else None
    return None if made is None else [made]


def _reversed(eqn, values, visitor):
    (view,) = values
    dimensions = eqn.params["dimensions"]
    atoms = frozenset(a for n in dimensions for a in view.axes[n])
    flipped = view.flipped ^ atoms
    return [view.then(view.axes, lambda w: jnp.flip(w, dimensions), flipped=flipped)]


class Joined(NamedTuple):
    """Views joined along an axis."""

    views: tuple[View, ...]
    axis: int


def _joined(eqn, values, visitor):
    if not all(isinstance(value, View) for value in values):
        return None
    return [Joined(tuple(values), eqn.params["dimension"])]


def _multiplied(eqn, values, visitor):
    held = [isinstance(value, View | Joined) for value in values]
    if all(held):
        return None
    first = held[0]
    weight, other = values if first else values[::-1]
    if isinstance(weight, View):
        made = visitor.product(weight, eqn, other, first)
        return [_as_it_is(eqn, list(map(array, values)))[0] if made is None else made]
    # A product with joined weights is the products with each of them, joined.
    contracted, batched = (pair[0 if first else 1] for pair in eqn.params["dimension_numbers"])
    free = [n for n in range(len(weight.views[0].axes)) if n not in (*contracted, *batched)]
    if weight.axis not in free:
        return None
    before = len(batched) + free.index(weight.axis)
    if not first:
        before += other.ndim - len(contracted) - len(batched)
    each = [
        _multiplied(eqn, [view, other] if first else [other, view], visitor)[0]
        for view in weight.views
    ]
    return [jnp.concatenate(each, axis=before)]


def _convolved(eqn, values, visitor):
    if not isinstance(values[1], View) or isinstance(values[0], View):
        return None
    made = visitor.product(values[1], eqn, values[0], False)
    return [_as_it_is(eqn, list(map(array, values)))[0] if made is None else made]


def _called(eqn, values, visitor):
    (program,) = (v for v in eqn.params.values() if isinstance(v, Jaxpr | ClosedJaxpr))
    consts = program.consts if isinstance(program, ClosedJaxpr) else ()
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return _run(jaxpr, consts, values, visitor)


def _kept_little(eqn, values, visitor):
    """As `_called`; derivatives compute it again, as the program would have it."""
    mine = [n for n, value in enumerate(values) if not isinstance(value, View)]

    def body(*arrays):
        given = list(values)
        for n, value in zip(mine, arrays, strict=True):
            given[n] = value
        inner = visitor.inside()
        outs = _run(eqn.params["jaxpr"], (), given, inner)
        return list(map(array, outs)), inner.found

    again = jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])
    outs, found = again(*(values[n] for n in mine))
    visitor.add(found)
    return outs


def _scanned(eqn, values, visitor):
    given, program = eqn.params, eqn.params["jaxpr"]
    shared, carried = given["num_consts"], given["num_consts"] + given["num_carry"]
    consts, carry, runs = values[:shared], values[shared:carried], values[carried:]
    rebuild: list[Callable[[Any], Any]] = []
    over = []
    for value in runs:
        unfolded = None
        if (
            isinstance(value, View)
            and len(value.axes[0]) == 1
            and not (value.flipped & set(value.axes[0]))
        ):
            unfolded = visitor.unfold(value)
        if unfolded is None:
            unfolded = _arrays([value], "scan", visitor)[0], lambda one: one
        over.append(unfolded[0])
        rebuild.append(unfolded[1])

    def body(carry, over):
        inner = visitor.inside()
        own = [make(one) for make, one in zip(rebuild, over, strict=True)]
        outs = _run(program.jaxpr, program.consts, [*consts, *carry, *own], inner)
        outs = _arrays(outs, "scan", inner)
        return outs[: len(carry)], (outs[len(carry) :], inner.found)

    options = {key: given[key] for key in ("length", "reverse", "unroll")}
    start = _arrays(carry, "scan", visitor)
    carry, (outs, found) = lax.scan(body, start, over, **options)
    looped = {v.name for v in runs if isinstance(v, View)}
    visitor.add({name: v if name in looped else _summed(v) for name, v in found.items()})
    return [*carry, *outs]


def _summed(tree):
    return jax.tree.map(lambda a: jnp.sum(a, axis=0), tree)


def _branched(eqn, values, visitor):
    index, *values = values
    mine = [n for n, value in enumerate(values) if not isinstance(value, View)]
    arrays = [values[n] for n in mine]

    def branch(program, like, *arrays):
        given = list(values)
        for n, value in zip(mine, arrays, strict=True):
            given[n] = value
        inner = visitor.inside()
        outs = _arrays(_run(program.jaxpr, program.consts, given, inner), "cond", inner)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        return outs, zeros | inner.found

    shapes = [
        jax.eval_shape(partial(branch, program, {}), *arrays)[1]
        for program in eqn.params["branches"]
    ]
    like = {name: value for shape in shapes for name, value in shape.items()}
    branches = [partial(branch, program, like) for program in eqn.params["branches"]]
    (index,) = _arrays([index], "cond", visitor)
    outs, found = lax.switch(index, branches, *arrays)
    visitor.add(found)
    return outs


def _repeated(eqn, values, visitor):
    given = eqn.params
    of_test, of_body = given["cond_nconsts"], given["body_nconsts"]
    test_consts, body_consts = values[:of_test], values[of_test : of_test + of_body]
    carry = _arrays(values[of_test + of_body :], "while", visitor)

    def test(carry):
        program = given["cond_jaxpr"]
        (go,) = _run(program.jaxpr, program.consts, [*test_consts, *carry], visitor.lost())
        return _arrays([go], "while", visitor)[0]

    def body(carry):
        program = given["body_jaxpr"]
        outs = _run(program.jaxpr, program.consts, [*body_consts, *carry], visitor.lost())
        return _arrays(outs, "while", visitor)

    return lax.while_loop(test, body, carry)


_RULES: dict[str, Callable] = {
    "convert_element_type": _cast,
    "copy": _copied,
    "name": _copied,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "rev": _reversed,
    "concatenate": _joined,
    "dot_general": _multiplied,
    "conv_general_dilated": _convolved,
    "scan": _scanned,
    "cond": _branched,
    "while": _repeated,
    **dict.fromkeys(INLINE, _called),
    **dict.fromkeys(REMAT, _kept_little),
}

_OF_JOINED = {name: _RULES[name] for name in ("dot_general", "convert_element_type", *INLINE)}
"""What joined weights go through; scans and the like get them as arrays."""
