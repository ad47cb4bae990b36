"""Which product to use, from measured crossovers; benchmarks/README.md has the figures."""

from __future__ import annotations

PRODUCTS = ("popcount", "tiled", "pallas")
"""Counting bits, dequantising (tile by tile on a CPU), and kernels that do both in one."""

POPCOUNT_WORK = 72
"""Rows times planes after the first up to which counting bits beats multiplying in int8 on a CPU:
72 rows at 2 bits, 24 at 4, any number at 1. What it costs grows with rows and planes, what
multiplying costs with rows, beyond unpacking the weight for all of them."""

POPCOUNT_WORK_16 = 36
"""Rows times planes up to which counting bits of 16-bit rows beats multiplying in float32."""

POPCOUNT_ROWS = 16
"""Most rows of one expert for which a CPU makes a block as small as they are, to count bits."""

DP4A_ROWS = 4
"""Most rows of one expert that are multiplied by counting bits on a GPU."""

KERNEL_ROWS = 768
"""Most rows of one expert for which the kernel beats dequantising a weight on a GPU."""

EXPERT_ROWS = {"cpu": 192}
"""Most rows of one expert that are multiplied at once, no limit where memory is not short."""


def counts(platform: str, act_bits: int | None) -> bool:
    """Whether bits can be counted: of rows that may be rounded, and on a GPU of any."""
    return platform == "gpu" or (platform == "cpu" and act_bits is not None)


def product(platform: str, rows: int, bits: float, act_bits: int | None) -> str:
    """The quicker product of rows with planes.

    Args:
      platform: as `mcjax.ops.device.platform` has it.
      rows: of activations that meet one weight, an expert's share of them on average; a symbol of
        `jax.export` stands for many.
      bits: planes of the weight.
      act_bits: 8 or 16 if activations may be rounded to so many.

    Returns:
      One of `PRODUCTS`.
    """
    if platform == "tpu":
        return "pallas"
    if not isinstance(rows, int):
        return "tiled"
    if platform == "plain":
        return "tiled"
    if platform == "gpu":
        if rows <= DP4A_ROWS:
            return "popcount"
        return "pallas" if rows <= KERNEL_ROWS else "tiled"
    most = {None: 0.0, 8: POPCOUNT_WORK / max(bits - 1, 1e-9), 16: POPCOUNT_WORK_16 / bits}
    return "popcount" if rows <= most[act_bits] else "tiled"


def expert_rows(platform: str, rows: int, experts: int, act_bits: int | None) -> int:
    """How many rows of one expert to multiply at once.

    Counting bits wants no more than there are likely to be, since rows that fill a block up cost as
    much as others; dequantising wants one block an expert, and a little room in it, since an expert
    with one row more than a block dequantises twice.

    Args:
      platform: as in `product`.
      rows: routed rows in all.
      experts: that share them.
      act_bits: as in `product`.
    """
    if not isinstance(rows, int):
        return EXPERT_ROWS["cpu"]
    share = -(-rows // experts)
    if platform == "cpu" and act_bits is not None and share <= POPCOUNT_ROWS:
        return 1 << (share - 1).bit_length()
    blocks = -(-share // EXPERT_ROWS.get(platform, share))
    return min(rows, -(-9 * share // (8 * 32 * blocks)) * 32)


def draft_act_bits(platform: str, act_bits: int | None) -> int | None:
    """`act_bits` of tokens that are drafted for verification: int8 where that is much the quicker.

    Args:
      platform: as in `product`.
      act_bits: of the model that verifies.
    """
    return 8 if platform == "cpu" else act_bits
