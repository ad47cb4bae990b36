"""Pre-loading mixed-precision quantisation: which expert gets how many bits.

MC-MoE (arXiv 2410.06270, section 3.2) chooses widths by an integer programme over what each expert
is used for and what each width costs it:

    minimise   sum_ij phi_i^alpha w_i^beta eps_ij^gamma x_ij
    subject to sum_j x_ij = 1 for every expert i,  sum_ij j x_ij <= n * budget,  x binary

with frequency phi and routing weight w normalised to sum to 1 within a layer, and eps_ij the change
of the MoE block's output when expert i alone has j bits. The exponents' defaults are the released
ones. The released code also asks for at least one expert at 3 bits and one at 2; those rows hold
for widths (1, 2, 3), per layer, with two experts or more. `scope="model"` spends one budget over
all layers (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SCOPES = ("layer", "model")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStatistics:
    """What calibration says about every expert.

    Attributes:
      frequency: [L, E], tokens (or the share of tokens) routed to each expert.
      routing_weight: [L, E], sum (or mean) of its routing weights.
      error: [L, E, len(bits)], Frobenius norm of the change of the block's output.
      bits: the widths that `error` was measured at, ascending.
    """

    frequency: np.ndarray
    routing_weight: np.ndarray
    error: np.ndarray
    bits: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self):
        for name in ("frequency", "routing_weight", "error"):
            value = np.asarray(getattr(self, name), np.float64)
            if not np.isfinite(value).all() or (value < 0).any():
                raise ValueError(f"{name} must be finite and not negative")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "bits", tuple(int(b) for b in self.bits))
        shape = self.frequency.shape
        if len(shape) != 2 or self.routing_weight.shape != shape:
            raise ValueError(
                f"frequency {shape} and routing_weight {self.routing_weight.shape} must both be "
                "[layers, experts]"
            )
        if self.error.shape != (*shape, len(self.bits)):
            raise ValueError(f"error {self.error.shape} must be {(*shape, len(self.bits))}")
        if list(self.bits) != sorted(set(self.bits)) or self.bits[0] < 1:
            raise ValueError(f"bits must ascend from at least 1, got {self.bits}")


def allocate(
    stats: ExpertStatistics,
    budget: float = 2.0,
    scope: str = "layer",
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    *,
    published_rows: bool = True,
) -> np.ndarray:
    """Chooses each expert's width by mixed-integer programming (cvxpy with HiGHS).

    Ties go to fewer bits, then bits go to the expert of lower index.

    Args:
      stats: for L layers of E experts.
      budget: average bits per expert weight, tables not counted.
      scope: "layer" spends the budget in every layer; "model" over all layers together.
      alpha: exponent of the frequency.
      beta: exponent of the routing weight.
      gamma: exponent of the error; the released code's 1, the paper's text has 2.
      published_rows: ask for an expert at 3 bits and one at 2 where the released code does.

    Returns:
      int array [L, E].

    Raises:
      ValueError: for an unknown scope, or a budget outside the feasible range, which it names.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    layers, experts = stats.frequency.shape
    rows = published_rows and _has_rows(stats.bits, experts, scope)
    low, high = feasible_budgets(stats.bits, experts, rows)
    if not low - 1e-9 <= budget <= high + 1e-9:
        raise ValueError(
            f"budget {budget} is not feasible: {experts} experts a layer of widths {stats.bits} "
            f"allow {low:g} to {high:g} bits on average"
        )
    # Rounding of products like 2.1 * 8 must not cost a bit.
    per_layer, total = (math.floor(budget * n + 1e-9) for n in (experts, layers * experts))
    cost = costs(stats, alpha, beta, gamma)
    if scope == "model":
        return _solve(cost.reshape(1, -1, len(stats.bits)), stats.bits, total, rows=False).reshape(
            layers, experts
        )
    return _solve(cost, stats.bits, per_layer, rows=rows)


def costs(
    stats: ExpertStatistics, alpha: float = 1.0, beta: float = 1.5, gamma: float = 1.0
) -> np.ndarray:
    """The objective's coefficients ``phi^alpha w^beta eps^gamma``, [L, E, len(bits)]."""

    def normalised(x):
        total = x.sum(axis=1, keepdims=True)
        return x / np.where(total > 0, total, 1)

    use = normalised(stats.frequency) ** alpha * normalised(stats.routing_weight) ** beta
    return use[..., None] * stats.error**gamma


def feasible_budgets(bits: tuple[int, ...], experts: int, rows: bool) -> tuple[float, float]:
    """The least and greatest average that can be met, with the published rows or without."""
    if rows:
        return (experts - 2 + 2 + 3) / experts, (3 * (experts - 1) + 2) / experts
    return float(bits[0]), float(bits[-1])


def _has_rows(bits: tuple[int, ...], experts: int, scope: str) -> bool:
    return tuple(bits) == (1, 2, 3) and scope == "layer" and experts >= 2


def _solve(cost: np.ndarray, bits: tuple[int, ...], total: int, rows: bool) -> np.ndarray:
    """Solves independent programmes cost [N, n, len(bits)] with one budget of `total` bits each."""
    import cvxpy as cp

    programmes, n, _ = cost.shape
    x = cp.Variable((n, len(bits)), boolean=True)
    coefficients = cp.Parameter((n, len(bits)))
    constraints = [cp.sum(x, axis=1) == 1, cp.sum(x @ np.array(bits)) <= total]
    if rows:
        constraints += [cp.sum(x[:, bits.index(k)]) >= 1 for k in (2, 3)]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(coefficients, x))), constraints)
    order = np.arange(n)[:, None] / n
    # Far below any difference that matters (costs span 1e7), far above the solver's tolerance.
    tie = 1e-4 * np.array(bits) * (1 + 0.1 * order)
    allocation = np.zeros((programmes, n), int)
    for i in range(programmes):
        spread = np.abs(cost[i] - cost[i].min(axis=1, keepdims=True)).max()
        coefficients.value = (cost[i] - cost[i].min(axis=1, keepdims=True)) / (
            spread if spread > 0 else 1
        ) * 1e7 + tie
        problem.solve(
            solver=cp.HIGHS,
            highs_options={"output_flag": False, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0},
        )
        if problem.status != cp.OPTIMAL or x.value is None:
            raise ValueError(f"no allocation of {total} bits to {n} experts: {problem.status}")
        allocation[i] = np.array(bits)[np.argmax(x.value, axis=1)]
    return allocation
