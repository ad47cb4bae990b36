"""Which product to use, from measured crossovers; benchmarks/README.md has the figures."""

from __future__ import annotations

PRODUCTS = ("popcount", "tiled", "pallas")

KERNEL_PLATFORMS = ("gpu", "tpu")
"""Where Pallas kernels multiply, all experts of all widths at once. That is by design, not by
measurement: none was at hand."""

POPCOUNT_WORK = 96
"""Rows times planes up to which counting bits beats dequantising on a CPU: 96 rows at 1 bit, 24 at
4. It costs a pass over the planes a row, dequantising one for all rows."""

POPCOUNT_ROWS = 16
"""Most rows of one expert for which a block is made as small as they are."""

EXPERT_ROWS = 192
"""Most rows of one expert that are multiplied at once."""


def product(platform: str, rows: int, bits: int, act_bits: int | None) -> str:
    """The quicker product of rows with planes.

    Args:
      platform: "cpu", "gpu" or "tpu".
      rows: of activations.
      bits: planes of the weight.
      act_bits: 8 if activations are rounded to int8, which counting bits needs.

    Returns:
      One of `PRODUCTS`.
    """
    if platform in KERNEL_PLATFORMS:
        return "pallas"
    if platform == "cpu" and act_bits == 8 and rows * bits <= POPCOUNT_WORK:
        return "popcount"
    return "tiled"


def expert_product(platform: str, product: str | None) -> str | None:
    """The product asked for; else the kernels where they run, None for each expert's own choice."""
    return product or ("pallas" if platform in KERNEL_PLATFORMS else None)


def expert_rows(rows: int, experts: int, act_bits: int | None) -> int:
    """How many rows of one expert to multiply at once.

    Counting bits wants no more than there are likely to be, since rows that fill a block up cost as
    much as others; dequantising wants one block an expert, and a little room in it, since an expert
    with one row more than a block dequantises twice.

    Args:
      rows: routed rows in all.
      experts: that share them.
      act_bits: as in `product`.
    """
    share = -(-rows // experts)
    if act_bits == 8 and share <= POPCOUNT_ROWS:
        return 1 << (share - 1).bit_length()
    blocks = -(-share // EXPERT_ROWS)
    return min(rows, -(-9 * share // (8 * 32 * blocks)) * 32)


def draft_act_bits(platform: str, act_bits: int | None) -> int | None:
    """`act_bits` of tokens that are drafted for verification: int8 where that is much the quicker.

    Args:
      platform: as in `product`.
      act_bits: of the model that verifies.
    """
    return 8 if platform == "cpu" else act_bits
