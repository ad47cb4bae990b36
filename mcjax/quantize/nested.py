"""Quantising all precisions at once: one nested code whose every prefix is a good code.

For a weight w [d_in, d_out] and the Gram matrix H of its inputs, all widths k together minimise

    sum_k lambda_k (w - W_k)' H (w - W_k)          per output channel, W_k as in `BitPlanes`

over one code per weight and one table per width, group and channel. Three steps (ours):

1. `initial_tables`: nearest codes and least squares, in turn, under the diagonal of H.
2. `feedback_pass`: GPTQ (arXiv 2210.17323) with one error-feedback copy of the weights per width;
   each feature takes the code that serves all widths best.
3. `descend`: block-coordinate descent on the joint objective. Group by group, every code is set
   to its optimum, then every table is refitted, rounded to its 8 bits, and kept only where that
   lowers the objective: a sweep never makes it worse.

Arrays have features first, then widths, then output features, so that all widths meet the Gram
matrix in one product. In this file tables are uint8 [groups, rows, widths, d_out], one group's
[rows, widths, d_out]: the step sizes, as many as the width with most has, and last the offset;
what a width does not have is ignored. A width's alphas and offset are its *coefficients*, float32
[bits + 1, widths, d_out]: those of the signs of the bits, and of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mcjax import tables as tables_lib
from mcjax.ops import device

BLOCK = 8
"""Features between which errors are fed one by one; those before them come in one product.
It divides every group size."""

ROUNDS = 8
"""Alternations of nearest code and refit that give the first tables."""

FACTOR_BLOCK = 64
"""Features of the Gram matrix that are factorised at once."""


def quantize_matrix(w, gram, *, widths, weights, group_size, sweeps, columns):
    """One matrix to a nested code and its tables.

    Args:
      w: float32 [d_in, d_out], d_in a multiple of `group_size`.
      gram: float32 [d_in, d_in], positive definite; None stands for the identity.
      widths: ascending widths that get tables; the last is the code's.
      weights: lambda_k, one for each width.
      group_size: input features that share a table entry.
      sweeps: rounds of descent.
      columns: output features at once; each is quantised by itself.

    Returns:
      uint8 codes [d_in, d_out] and, for each width, a uint8 table [rows_k, groups, d_out].
    """
    lambdas = jnp.asarray(weights, jnp.float32)
    diagonal = jnp.ones(w.shape[0], jnp.float32) if gram is None else jnp.diagonal(gram)
    factor = None if gram is None else inverse_factor(gram)

    def some(w):
        codes, tables = initial_tables(w, diagonal, widths, lambdas, group_size)
        if gram is not None:
            codes = feedback_pass(w, factor, tables, widths, lambdas, group_size)
            codes, tables = descend(w, gram, codes, tables, widths, lambdas, group_size, sweeps)
        return codes.astype(jnp.uint8), stored_tables(tables, widths)

    d_out = w.shape[1]
    if columns >= d_out:
        return some(w)
    blocks = -(-d_out // columns)
    w = jnp.pad(w, ((0, 0), (0, blocks * columns - d_out)))
    each = jnp.moveaxis(w.reshape(-1, blocks, columns), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)[..., :d_out]

    return jax.tree.map(join, lax.map(some, each))


def initial_tables(w, diagonal, widths, lambdas, group_size):
    """Nested tables and codes for uncorrelated inputs, every group on its own.

    Args:
      w: float32 [d_in, d_out].
      diagonal: float32 [d_in], the weight of each feature's squared error.
      widths: as in `quantize_matrix`.
      lambdas: float32 [len(widths)].
      group_size: as in `quantize_matrix`.

    Returns:
      int32 codes [d_in, d_out] and tables.
    """
    d_out = w.shape[1]

    def one_group(group):
        w, diagonal = group  # [group_size, d_out], [group_size]

        def code_of(row, levels):
            return _nearest(jnp.broadcast_to(row, (len(widths), d_out)), levels, lambdas)

        def refine(_, table):
            levels = _levels(table, widths)

            def term(row):
                value, importance = row
                x = jnp.stack(_design(code_of(value, levels), widths[-1]))
                return importance * x[:, None] * x, importance * value * x

            square, pulled = _sum_rows(term, (w, diagonal))  # X' H X and X' H w
            held = jnp.einsum("pqo,qwo->pwo", square, _coefficients(table, widths))
            return _refit(table, square, pulled[:, None] - held, widths)

        table = lax.fori_loop(0, ROUNDS, refine, _first_table(w, diagonal, widths))
        levels = _levels(table, widths)
        return lax.map(lambda row: code_of(row, levels), w), table

    groups = (w.reshape(-1, group_size, d_out), diagonal.reshape(-1, group_size))
    codes, tables = lax.map(one_group, groups)
    return codes.reshape(-1, d_out), tables


def feedback_pass(w, factor, tables, widths, lambdas, group_size):
    """GPTQ's pass over the input features, each width feeding its own error forward.

    Args:
      w: float32 [d_in, d_out].
      factor: float32 [d_in, d_in], `inverse_factor` of the Gram matrix.
      tables: from `initial_tables`; they stay as they are.
      widths: as in `quantize_matrix`.
      lambdas: float32 [len(widths)].
      group_size: as in `quantize_matrix`.

    Returns:
      int32 codes [d_in, d_out].
    """
    shape = (w.shape[0], len(widths), w.shape[1])

    def one_group(errors, g):  # errors [d_in, widths, d_out], 0 where they are not known yet
        start = g * group_size
        columns = lax.dynamic_slice_in_dim(factor, start, group_size, axis=1)
        corner = lax.dynamic_slice_in_dim(columns, start, group_size)
        coefficients, levels = _coefficients(tables[g], widths), _levels(tables[g], widths)

        def choose(i, target):
            code = _nearest(target, levels, lambdas)
            return code, (target - _values(code, coefficients)) / corner[i, i]

        block = lax.dynamic_slice_in_dim(w, start, group_size)[:, None]
        block = block - _product(columns.T, errors)
        codes, own = _one_by_one(block, corner, choose)
        return lax.dynamic_update_slice_in_dim(errors, own, start, axis=0), codes

    _, codes = lax.scan(one_group, jnp.zeros(shape, w.dtype), jnp.arange(len(w) // group_size))
    return codes.reshape(w.shape)


def descend(w, gram, codes, tables, widths, lambdas, group_size, sweeps):
    """Coordinate descent on the joint objective over codes and tables.

    Args:
      w: float32 [d_in, d_out].
      gram: float32 [d_in, d_in], positive definite.
      codes: int32 [d_in, d_out] to start from.
      tables: to start from.
      widths: as in `quantize_matrix`.
      lambdas: float32 [len(widths)].
      group_size: as in `quantize_matrix`.
      sweeps: passes over all groups.

    Returns:
      Codes and tables like those given, with an objective that is no larger.
    """
    groups = jnp.arange(len(w) // group_size)

    def one_group(state, g):
        codes, tables, gap = state  # gap = w - W_k: [d_in, widths, d_out]
        start = g * group_size
        rows = lax.dynamic_slice_in_dim(gram, start, group_size)
        corner = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        coefficients, levels = _coefficients(tables[g], widths), _levels(tables[g], widths)
        old = _values(lax.dynamic_slice_in_dim(codes, start, group_size), coefficients)

        def choose(i, pull):
            code = _nearest(old[i] + pull / corner[i, i], levels, lambdas)
            return code, _values(code, coefficients) - old[i]

        pull = _product(rows, gap)  # H (w - W_k) before anything changes
        after, changes = _one_by_one(pull, corner, choose)
        design = jnp.stack(_design(after, widths[-1]), axis=1)  # X: [group_size, bits + 1, d_out]

        def term(row):
            x, weighted, pull, change = row
            return x[:, None] * weighted, x[:, None] * pull - weighted[:, None] * change

        # X' H X and X' H (w - W_k), which is X' pull less what the changes took off it.
        square, pulled = _sum_rows(term, (design, _product(corner, design), pull, changes))
        table = _refit(tables[g], square, pulled, widths)
        own = lax.dynamic_slice_in_dim(w, start, group_size)[:, None]
        own = own - _values(after, _coefficients(table, widths))
        codes = lax.dynamic_update_slice_in_dim(codes, after, start, axis=0)
        gap = lax.dynamic_update_slice_in_dim(gap, own, start, axis=0)
        return (codes, tables.at[g].set(table), gap), None

    def one_sweep(_, state):
        return lax.scan(one_group, state, groups)[0]

    gap = w[:, None] - matrix_values(codes, tables, widths)
    codes, tables, _ = lax.fori_loop(0, sweeps, one_sweep, (codes, tables, gap))
    return codes, tables


def inverse_factor(gram: jax.Array) -> jax.Array:
    """The upper Cholesky factor U of H^-1 = U' U, which GPTQ reads its feedback from.

    With J reversing the order of features, U = J L^-1 J for J H J = L L', so that H itself is never
    inverted. In products of blocks, as fast as LAPACK: JAX 0.10's LAPACK calls wait inside of the
    thread pool of a CPU for work that they put there, and as many of them at once as it has threads
    wait for ever.
    """
    size = len(gram)
    step = math.gcd(size, FACTOR_BLOCK)
    flipped = gram[::-1, ::-1]

    def one_block(k, state):
        lower, inverse = state
        start = k * step
        row = lax.dynamic_slice_in_dim(lower, start, step)
        rest = lax.dynamic_slice_in_dim(flipped, start, step, axis=1) - lower @ row.T
        corner = _inverse_of_factor(lax.dynamic_slice_in_dim(rest, start, step))
        below = jnp.where((jnp.arange(size) >= start)[:, None], rest @ corner.T, 0)
        unit = jnp.arange(size)[None] == start + jnp.arange(step)[:, None]
        own = corner @ (unit.astype(gram.dtype) - row @ inverse)
        lower = lax.dynamic_update_slice_in_dim(lower, below, start, axis=1)
        return lower, lax.dynamic_update_slice_in_dim(inverse, own, start, axis=0)

    zeros = jnp.zeros_like(gram)
    _, inverse = lax.fori_loop(0, size // step, one_block, (zeros, zeros))
    return inverse[::-1, ::-1]


def _inverse_of_factor(a):
    """L^-1 of a small a = L L', by eliminating in ``[a, 1]``, which ends as ``[L', L^-1]``."""
    size = len(a)

    def eliminate(j, both):
        row = both[j] * lax.rsqrt(both[j, j])
        share = jnp.where(jnp.arange(size) > j, row[:size], 0)
        return (both - share[:, None] * row).at[j].set(row)

    both = jnp.concatenate([a, jnp.eye(size, dtype=a.dtype)], axis=1)
    return lax.fori_loop(0, size, eliminate, both)[:, size:]


def stored_tables(tables, widths):
    """Tables as `BitPlanes` keeps them: for each width uint8 [rows_k, groups, d_out]."""
    stored = []
    for i, k in enumerate(widths):
        rows = [*range(tables_lib.num_steps(k)), -1]
        stored.append(jnp.swapaxes(tables[:, np.array(rows), i], 0, 1))
    return tuple(stored)


def matrix_values(codes, tables, widths):
    """What codes [d_in, d_out] and tables stand for at every width: [d_in, widths, d_out]."""
    grouped = codes.reshape(len(tables), -1, codes.shape[-1])
    values = jax.vmap(lambda c, t: _values(c, _coefficients(t, widths)))(grouped, tables)
    return values.reshape(-1, *values.shape[2:])


def _product(matrix, values):
    """[N, G] times values [G, widths, d_out]: [N, widths, d_out]."""
    flat = jnp.dot(matrix, values.reshape(len(values), -1))
    return flat.reshape(-1, *values.shape[1:])


def _one_by_one(
    state: jax.Array, influence: jax.Array, choose: Callable
) -> tuple[jax.Array, jax.Array]:
    """Chooses codes feature by feature; each choice takes its influence off later ones' state.

    Args:
      state: float32 [G, widths, d_out].
      influence: [G, G]; row i times feature i's change is taken off the features after it.
      choose: (i, state of feature i [widths, d_out]) -> code [d_out], change [widths, d_out].

    Returns:
      Codes [G, d_out] and changes [G, widths, d_out].
    """

    def one_block(changes, start):
        columns = lax.dynamic_slice_in_dim(influence, start, BLOCK, axis=1)
        corner = lax.dynamic_slice_in_dim(columns, start, BLOCK)

        def one_feature(own, i):
            code, change = choose(start + i, own[i])
            return own - corner[i][:, None, None] * change, (code, change)

        own = lax.dynamic_slice_in_dim(state, start, BLOCK) - _product(columns.T, changes)
        _, (codes, own) = lax.scan(one_feature, own, jnp.arange(BLOCK))
        return lax.dynamic_update_slice_in_dim(changes, own, start, axis=0), codes

    changes, codes = lax.scan(one_block, jnp.zeros_like(state), jnp.arange(0, len(state), BLOCK))
    return codes.reshape(len(state), -1), changes


def _mixing(widths):
    """How the numbers of a table make up coefficients: float32 [rows, widths, bits + 1]."""
    bits, steps = widths[-1], max(map(tables_lib.num_steps, widths))
    mixing = np.zeros((steps + 1, len(widths), bits + 1), np.float32)
    for i, k in enumerate(widths):
        mixing[: tables_lib.num_steps(k), i, :k] = tables_lib.basis(k)
        mixing[-1, i, -1] = 1
    return mixing


def _half_span(steps, widths):
    """``sum_p alpha_p`` [widths, d_out] of steps [rows - 1, widths, d_out]."""
    return jnp.einsum("rw,rwo->wo", _mixing(widths)[:-1].sum(-1), steps)


def _numbers(table, widths):
    """The step sizes and the offset that a table holds: float32 [rows, widths, d_out]."""
    steps = tables_lib.step_value(table[:-1])
    offset = tables_lib.offset_ratio(table[-1]) * _half_span(steps, widths)
    return jnp.concatenate([steps, offset[None]])


def _coefficients(table, widths):
    """One group's coefficients."""
    # A product: XLA on CPU (0.10.2) makes a wrong sum over the middle one of five axes, two of them
    # broadcast, which it comes to under vmap.
    return jnp.einsum("rwp,rwo->pwo", _mixing(widths), _numbers(table, widths))


def _design(codes, bits):
    """The signs of the bits of codes [..., d_out], and 1: a list of bits + 1 such arrays."""
    places = range(bits - 1, -1, -1)
    signs = [((codes >> p) & 1).astype(jnp.float32) * 2 - 1 for p in places]
    return [*signs, jnp.ones(codes.shape, jnp.float32)]


def _values(codes, coefficients):
    """What one group's codes [..., d_out] stand for at every width: [..., widths, d_out]."""
    design = _design(codes, len(coefficients) - 1)
    return sum(c * x[..., None, :] for c, x in zip(coefficients, design, strict=True))


def _levels(table, widths):
    """Every value that a group can take, one [2**k, d_out] for each width."""
    bits = widths[-1]
    every = _values(jnp.arange(2**bits)[:, None], _coefficients(table, widths))
    return [every[:: 2 ** (bits - k), i] for i, k in enumerate(widths)]


def _nearest(target, levels, lambdas):
    """The code [d_out] whose prefixes come closest to the widths' targets [widths, d_out]."""
    cost = jnp.zeros((1, target.shape[-1]), jnp.float32)
    for i, level in enumerate(levels):
        cost = jnp.repeat(cost, level.shape[0] // cost.shape[0], axis=0)
        cost = cost + lambdas[i] * (target[i] - level) ** 2
    # Positive floats ascend as their bits do. With the code in the last of these, a plain minimum
    # finds it, four times as fast as an argmin; costs that differ by less are as good as equal.
    last = len(cost) - 1
    codes = jnp.arange(len(cost), dtype=jnp.int32)[:, None]
    key = lax.bitcast_convert_type(cost, jnp.int32) & ~last | codes
    return jnp.min(key, axis=0) & last


def _first_table(w, diagonal, widths):
    """A group's starting table: Gaussian steps, or the best clipping where planes halve.

    Args:
      w: float32 [group_size, d_out].
      diagonal: float32 [group_size].
      widths: as in `quantize_matrix`.
    """
    mean = jnp.mean(w, axis=0)
    spread = jnp.sqrt(jnp.mean((w - mean) ** 2, axis=0))
    # An offset reaches two half spans; a group far from zero needs a span that carries it there.
    floor = jnp.abs(mean) / 1.9
    rows = len(_mixing(widths))
    each = []
    for k in widths:
        if tables_lib.num_steps(k) == k:
            half_span = jnp.maximum(tables_lib.GAUSSIAN_STEP[k] * spread * (2**k - 1) / 2, floor)
            ratio = 2.0 ** np.arange(k - 1, -1, -1) / (2**k - 1)
            steps, _ = tables_lib.round_step(ratio[:, None] * half_span)
        else:
            first = _clipping(w, diagonal, k, mean, floor)
            places = np.cumsum((0, *tables_lib.segments(k)))[:-1]
            steps = tables_lib.step_value(first) / 2.0 ** places[:, None]
            steps, _ = tables_lib.round_step(steps)
        each.append(jnp.pad(steps, ((0, rows - len(steps)), (0, 0))))
    table = jnp.stack(each, axis=1)
    half_span = _half_span(tables_lib.step_value(table[:-1]), widths)
    return table.at[-1].set(tables_lib.round_offset(mean, half_span)[0])


def _clipping(w, diagonal, width, mean, floor):
    """The best of ten clippings of a uniform width: its step's code uint8 [d_out]."""
    peak = jnp.max(jnp.abs(w - mean), axis=0)
    span = 2**width - 1

    def clipped(fraction):
        half_span = jnp.maximum(fraction * peak, floor)
        code, first = tables_lib.round_step(half_span * 2 ** (width - 1) / span)
        step = first * 0.5 ** (width - 2)
        half_span = step * span / 2
        offset = tables_lib.round_offset(mean, half_span)[1]
        level = jnp.round((w - offset + half_span) / jnp.where(step > 0, step, 1))
        value = offset - half_span + step * jnp.clip(level, 0, span)
        return code, jnp.sum(diagonal[:, None] * (w - value) ** 2, axis=0)

    codes, errors = jax.vmap(clipped)(jnp.linspace(0.4, 1.0, 10))
    best = jnp.argmin(errors, axis=0)
    return jnp.take_along_axis(codes, best[None], axis=0)[0]


def _sum_rows(term, rows):
    """The sum of ``term(row)`` over the first axis of the arrays of `rows`."""
    if device.platform() != "cpu":
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), jax.vmap(term)(rows))
    # One by one: XLA on CPU vectorises each addition, but no sum over the first axis.
    like = jax.eval_shape(term, jax.tree.map(lambda a: a[0], rows))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def add(total, row):
        return jax.tree.map(jnp.add, total, term(row)), None

    return lax.scan(add, zeros, rows)[0]


def _refit(table, square, pulled, widths):
    """Least squares of one group's table for fixed codes, rounded, kept where it helps.

    With the design X of `_design`, mixed for each width into S, a change d of a table's numbers
    (steps, offset) changes the objective by d'Ad - 2 d'g with A = S' H S and g = S' H (w - W).
    Numbers are rounded one after another, each moving those after it to their new optimum, the way
    GPTQ rounds weights.

    Args:
      table: uint8 [rows, widths, d_out].
      square: X' H X, the same for all widths: float32 [bits + 1, bits + 1, d_out].
      pulled: X' H (w - W_k), float32 [bits + 1, widths, d_out].
      widths: as in `quantize_matrix`.
    """
    mixing = _mixing(widths)
    used = mixing.any(-1)[..., None]  # [rows, widths, 1]
    rows = len(table)
    a = jnp.einsum("rwp,pqo,swq->rswo", mixing, square, mixing)
    g = jnp.einsum("rwp,pwo->rwo", mixing, pulled)
    ridge = 1e-6 * jnp.einsum("rrwo->wo", a) + 1e-30
    eye = np.eye(rows, dtype=np.float32)[:, :, None, None]
    old = _numbers(table, widths)
    ridged = a + eye * jnp.where(used, ridge, 1)  # so that what is undetermined stays as it was
    lower, right = _eliminate(ridged, g + _times(ridged, old))

    def best(numbers, p):  # given those before it
        return (right[p] - jnp.sum(lower[p] * numbers, axis=0)) / lower[p, p]

    def round_one(numbers, p):
        code, value = tables_lib.round_step(best(numbers, p))
        return numbers.at[p].set(value), code

    steps, codes = lax.scan(round_one, jnp.zeros_like(old), jnp.arange(rows - 1))
    code, offset = tables_lib.round_offset(best(steps, -1), _half_span(steps[:-1], widths))
    codes = jnp.concatenate([codes, code[None]])
    step = steps.at[-1].set(offset) - old
    change = jnp.sum(step * (_times(a, step) - 2 * g), axis=0)
    return jnp.where(change < 0, codes, table)


def _times(matrices, vectors):
    """Matrices [rows, rows, ...] times vectors [rows, ...]."""
    return jnp.einsum("rs...,s...->r...", matrices, vectors)


def _eliminate(a, g):
    """Small systems a z = g, positive definite, as lower triangular ones with the same solution.

    Args:
      a: [rows, rows, ...].
      g: [rows, ...].
    """

    def upwards(i, state):
        a, g = state
        p = len(a) - 1 - i
        above = jnp.arange(len(a)) < p
        share = jnp.where(above.reshape(-1, *[1] * (g.ndim - 1)), a[:, p] / a[p, p], 0)
        return a - share[:, None] * a[p], g - share * g[p]

    return lax.fori_loop(0, len(a) - 1, upwards, (a, g))
