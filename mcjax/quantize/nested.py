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

In this file a table is uint8 [groups, rows, d_out], and one group's is [rows, d_out].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mcjax import tables as tables_lib


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
    diagonal = jnp.ones(w.shape[0]) if gram is None else jnp.diagonal(gram)
    factor = None if gram is None else inverse_factor(gram)

    def some(w):
        codes, tables = initial_tables(w, diagonal, widths, lambdas, group_size)
        if gram is not None:
            codes = feedback_pass(w, factor, tables, widths, lambdas, group_size)
            codes, tables = descend(w, gram, codes, tables, widths, lambdas, group_size, sweeps)
        return codes.astype(jnp.uint8), tuple(jnp.swapaxes(t, 0, 1) for t in tables)

    d_out = w.shape[1]
    if columns >= d_out:
        return some(w)
    blocks = -(-d_out // columns)
    w = jnp.pad(w, ((0, 0), (0, blocks * columns - d_out)))
    each = jnp.moveaxis(w.reshape(-1, blocks, columns), 1, 0)

    def join(a):
        return jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)[..., :d_out]

    return jax.tree.map(join, lax.map(some, each))


def initial_tables(w, diagonal, widths, lambdas, group_size, rounds=8):
    """Nested tables and codes for uncorrelated inputs, every group on its own.

    Args:
      w: float32 [d_in, d_out].
      diagonal: float32 [d_in], the weight of each feature's squared error.
      widths: as in `quantize_matrix`.
      lambdas: float32 [len(widths)].
      group_size: as in `quantize_matrix`.
      rounds: alternations of nearest code and refit.

    Returns:
      int32 codes [d_in, d_out] and one table [groups, rows_k, d_out] for each width.
    """
    d_out = w.shape[1]

    def one_group(group):
        w, diagonal = group  # [group_size, d_out], [group_size]
        target = jnp.broadcast_to(w[:, None], (group_size, len(widths), d_out))

        def codes_for(tables):
            levels = _levels(tables, widths)
            return jax.vmap(lambda t: _nearest(t, levels, lambdas))(target)

        def refine(_, tables):
            codes = codes_for(tables)
            residual = diagonal[:, None] * (w - _values(codes, tables, widths))
            return tuple(
                _refit(table, k, _signs(codes, k, widths[-1]), residual[i], diagonal)
                for i, (k, table) in enumerate(zip(widths, tables, strict=True))
            )

        first = tuple(_first_table(k, w, diagonal) for k in widths)
        tables = lax.fori_loop(0, rounds, refine, first)
        return codes_for(tables), tables

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
      group_size: as in `quantize_matrix`; also the block of the lazy update.

    Returns:
      int32 codes [d_in, d_out].
    """
    d_in, d_out = w.shape

    def one_group(state, g):
        copies = state  # [widths, d_in, d_out]
        start = g * group_size
        block = lax.dynamic_slice_in_dim(copies, start, group_size, axis=1)
        rows = lax.dynamic_slice_in_dim(factor, start, group_size, axis=0)
        corner = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        mine = tuple(t[g] for t in tables)
        levels = _levels(mine, widths)

        def one_feature(block, i):
            target = block[:, i]
            code = _nearest(target, levels, lambdas)
            error = (target - _values(code, mine, widths)) / corner[i, i]
            return block - corner[i][:, None] * error[:, None], (code, error)

        _, (codes, errors) = lax.scan(one_feature, block, jnp.arange(group_size))
        # Features before this group are done, so updating them too costs time but changes nothing.
        return copies - jnp.einsum("gi,gko->kio", rows, errors), codes

    copies = jnp.broadcast_to(w, (len(widths), d_in, d_out))
    _, codes = lax.scan(one_group, copies, jnp.arange(d_in // group_size))
    return codes.reshape(d_in, d_out)


def descend(w, gram, codes, tables, widths, lambdas, group_size, sweeps):
    """Coordinate descent on the joint objective over codes and tables.

    Args:
      w: float32 [d_in, d_out].
      gram: float32 [d_in, d_in], positive definite.
      codes: int32 [d_in, d_out] to start from.
      tables: [groups, rows_k, d_out] for each width, to start from.
      widths: as in `quantize_matrix`.
      lambdas: float32 [len(widths)].
      group_size: as in `quantize_matrix`.
      sweeps: passes over all groups.

    Returns:
      Codes and tables like those given, with an objective that is no larger.
    """
    d_in = w.shape[0]
    bits = widths[-1]

    def one_group(state, g):
        codes, tables, pull = state  # pull = H (w - W_k): [widths, d_in, d_out]
        start = g * group_size
        rows = lax.dynamic_slice_in_dim(gram, start, group_size, axis=0)
        corner = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        mine = tuple(t[g] for t in tables)
        levels = _levels(mine, widths)
        before = lax.dynamic_slice_in_dim(codes, start, group_size)
        old = _values(before, mine, widths)
        local = lax.dynamic_slice_in_dim(pull, start, group_size, axis=1)

        def one_feature(local, i):
            target = old[:, i] + local[:, i] / corner[i, i]
            code = _nearest(target, levels, lambdas)
            step = _values(code, mine, widths) - old[:, i]
            return local - corner[:, i][:, None] * step[:, None], code

        local, after = lax.scan(one_feature, local, jnp.arange(group_size))
        mine = tuple(
            _refit(table, k, _signs(after, k, bits), local[i], corner)
            for i, (k, table) in enumerate(zip(widths, mine, strict=True))
        )
        change = _values(after, mine, widths) - old
        pull = pull - jnp.einsum("gi,kgo->kio", rows, change)
        codes = lax.dynamic_update_slice_in_dim(codes, after, start, axis=0)
        tables = tuple(t.at[g].set(m) for t, m in zip(tables, mine, strict=True))
        return (codes, tables, pull), None

    def one_sweep(_, state):
        codes, tables = state
        residual = w - _all_values(codes, tables, widths, group_size)
        pull = jnp.einsum("ij,kjo->kio", gram, residual)  # anew: no rounding error piles up
        (codes, tables, _), _ = lax.scan(
            one_group, (codes, tables, pull), jnp.arange(d_in // group_size)
        )
        return codes, tables

    return lax.fori_loop(0, sweeps, one_sweep, (codes, tables))


def inverse_factor(gram: jax.Array) -> jax.Array:
    """The upper Cholesky factor U of H^-1 = U' U, which GPTQ reads its feedback from."""
    lower = jnp.linalg.cholesky(gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    inverse = jax.scipy.linalg.cho_solve((lower, True), identity)
    return jnp.linalg.cholesky(inverse).T


def _decode(table, width):
    """One group's table [rows, d_out] to alpha [width, d_out] and offset [d_out]."""
    alpha, offset = tables_lib.decode(table[:, None], width)
    return alpha[:, 0], offset[0]


def _signs(codes, width, bits):
    """The first `width` bits of `bits`-bit codes as +-1: float32 [width, *codes.shape]."""
    return jnp.stack(
        [((codes >> (bits - 1 - p)) & 1).astype(jnp.float32) * 2 - 1 for p in range(width)]
    )


def _levels(tables, widths):
    """Every value a group can take, one [2**k, d_out] for each width."""
    levels = []
    for table, k in zip(tables, widths, strict=True):
        alpha, offset = _decode(table, k)
        levels.append(offset + jnp.einsum("pc,po->co", _signs(jnp.arange(2**k), k, k), alpha))
    return levels


def _nearest(target, levels, lambdas):
    """The code [d_out] whose prefixes come closest to the widths' targets [widths, d_out]."""
    cost = jnp.zeros((1, target.shape[-1]))
    for i, level in enumerate(levels):
        cost = jnp.repeat(cost, level.shape[0] // cost.shape[0], axis=0)
        cost = cost + lambdas[i] * (target[i] - level) ** 2
    return jnp.argmin(cost, axis=0)


def _values(codes, tables, widths):
    """What one group's codes [..., d_out] stand for at every width: [widths, ..., d_out]."""
    values = []
    for table, k in zip(tables, widths, strict=True):
        alpha, offset = _decode(table, k)
        value = offset
        for p, sign in enumerate(_signs(codes, k, widths[-1])):
            value = value + alpha[p] * sign
        values.append(value)
    return jnp.stack(values)


def _all_values(codes, tables, widths, group_size):
    """`_values` of a whole matrix: [widths, d_in, d_out]."""
    grouped = codes.reshape(-1, group_size, codes.shape[-1])
    values = jax.vmap(lambda c, t: _values(c, t, widths))(grouped, tables)
    return jnp.moveaxis(values, 0, 1).reshape(len(widths), *codes.shape)


def _first_table(width, w, diagonal):
    """A group's starting table: Gaussian steps, or for uniform widths the best clipping."""
    mean = jnp.mean(w, axis=0)
    spread = jnp.sqrt(jnp.mean((w - mean) ** 2, axis=0))
    # An offset reaches two half spans; a group far from zero needs a span that carries it there.
    floor = jnp.abs(mean) / 1.9
    if tables_lib.num_steps(width) == width:
        half_span = jnp.maximum(
            tables_lib.GAUSSIAN_STEP[width] * spread * (2**width - 1) / 2, floor
        )
        ratio = 2.0 ** jnp.arange(width - 1, -1, -1) / (2**width - 1)
        return _stored(ratio[:, None] * half_span, mean)

    peak = jnp.max(jnp.abs(w - mean), axis=0)

    def clipped(fraction):
        table = _stored(
            (2 * jnp.maximum(fraction * peak, floor) / (2**width - 1))[None], mean, width
        )
        alpha, offset = _decode(table, width)
        half_span, delta = jnp.sum(alpha, axis=0), 2 * alpha[-1]
        level = jnp.round((w - offset + half_span) / jnp.where(delta > 0, delta, 1))
        value = offset - half_span + delta * jnp.clip(level, 0, 2**width - 1)
        return table, jnp.sum(diagonal[:, None] * (w - value) ** 2, axis=0)

    tables, errors = jax.vmap(clipped)(jnp.linspace(0.4, 1.0, 10))
    best = jnp.argmin(errors, axis=0)
    return jnp.take_along_axis(tables, best[None, None], axis=0)[0]


def _stored(steps, offset, width=None):
    """Rounds steps [rows - 1, d_out] and offset [d_out] to a table [rows, d_out]."""
    width = steps.shape[0] if width is None else width
    codes, values = tables_lib.round_step(steps)
    half_span = jnp.sum(tables_lib.basis(width).T @ values, axis=0)
    if not tables_lib.has_offset(width):
        return codes
    return jnp.concatenate([codes, tables_lib.round_offset(offset, half_span)[0][None]])


def _refit(table, width, signs, pull, gram):
    """Least squares of one group's table for fixed codes, rounded, kept where it helps.

    A step d of the parameters (steps, offset) changes the objective by d'Ad - 2 d'g with
    A = S' H S and g = S' H (w - W). Parameters are rounded one after another, each moving those
    after it to their new optimum, the way GPTQ rounds weights.

    Args:
      table: uint8 [rows, d_out].
      width: its width.
      signs: float32 [width, group_size, d_out].
      pull: H (w - W) on the group, float32 [group_size, d_out].
      gram: the group's corner of H, [group_size, group_size], or its diagonal [group_size].
    """
    alpha, offset = _decode(table, width)
    basis = tables_lib.basis(width)
    rows = table.shape[0]
    design = jnp.einsum("rp,pio->rio", basis, signs)
    old = alpha[-basis.shape[0] :] / basis[:, -1:] if basis.shape[0] == 1 else alpha
    if tables_lib.has_offset(width):
        design = jnp.concatenate([design, jnp.ones_like(signs[:1])])
        old = jnp.concatenate([old, offset[None]])
    full = jnp.diag(gram) if gram.ndim == 1 else gram
    weighted = jnp.einsum("ij,rjo->rio", full, design)
    a = jnp.einsum("rio,sio->rso", design, weighted)
    ridge = 1e-6 * jnp.einsum("rro->o", a) + 1e-30
    a = a + ridge * jnp.eye(rows)[:, :, None]
    g = jnp.einsum("rio,io->ro", design, pull)
    inverse = _inverse(a)
    best = old + jnp.einsum("rso,so->ro", inverse, g)

    codes: list[jax.Array] = []
    new: list[jax.Array] = []
    for p in range(rows):
        if p < basis.shape[0]:
            code, value = tables_lib.round_step(best[p])
        else:
            half_span = jnp.sum(basis.T @ jnp.stack(new), axis=0)
            code, value = tables_lib.round_offset(best[p], half_span)
        pivot = inverse[p, p]
        best = best + inverse[:, p] / pivot * (value - best[p])
        inverse = inverse - inverse[:, p][:, None] * inverse[p][None] / pivot
        codes.append(code)
        new.append(value)
    step = jnp.stack(new) - old
    change = jnp.einsum("ro,rso,so->o", step, a, step) - 2 * jnp.sum(step * g, axis=0)
    return jnp.where(change < 0, jnp.stack(codes), table)


def _inverse(a):
    """Inverse of small positive definite matrices [rows, rows, d_out] by the sweep operator."""
    for p in range(a.shape[0]):
        pivot, column = a[p, p], a[:, p]
        scaled = column / pivot
        a = a - column[:, None] * scaled[None]
        a = a.at[:, p].set(scaled).at[p].set(scaled).at[p, p].set(-1 / pivot)
    return -a
