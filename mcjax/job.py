"""What is to be compressed and how, checked before the work begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mcjax import checkpoint, importance, sensitivity, text
from mcjax.bitplane import resolve_group_size
from mcjax.hub import Folder, local
from mcjax.models import weights
from mcjax.notes import note
from mcjax.quantize_layer import ATTENTION_WIDTHS, Options
from mcjax.schedule import Setting, settings, windows_wanted
from mcjax.serving import ATTENTION_BITS

BATCH_TOKENS = 4096
"""About how many tokens are computed at once."""

EFFORTS = {"fast": 1, "normal": 6, "thorough": 15, "best": 6}
"""Rounds of descent after the GPTQ pass, see `mcjax.quantize`. The best effort then trains tables,
see `mcjax.tune_artifact`."""

TUNED = "best"


MOST_KEPT = 4 << 30
"""Bytes that what layers need on the way back may take while tables train, all layers together."""


class Job(NamedTuple):
    """A model, text, and how the one is compressed by the other.

    Attributes:
      folder: the model.
      windows: tokens to calibrate on, int [N, T].
      lessons: tokens to tune on, int [M, T]; none without tuning.
      plan: what tuning trains; nothing without.
      how: weights are quantised.
      identity: what the artifact's manifest says of all this: two jobs of the same identity
        make the same artifact, but for sums and samples that depend on what is computed at once.
      batch_tokens: about how many tokens are computed at once.
      most_kept: see `MOST_KEPT`.
    """

    folder: Folder
    windows: np.ndarray
    lessons: np.ndarray
    plan: Sequence[Setting]
    how: Options
    identity: dict[str, Any]
    batch_tokens: int
    most_kept: int = MOST_KEPT

    @property
    def batch(self) -> int:
        """Windows computed at once."""
        return max(1, min(len(self.windows), self.batch_tokens // self.windows.shape[1]))


def prepare(
    model: str | Path,
    calibration: str | Path,
    *,
    max_bits: int = 4,
    group_size: int | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    effort: str = "normal",
    bos: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
) -> Job:
    """Reads what a job needs but weights.

    Args:
      model: a Hugging Face folder, or a name on the hub, see `mcjax.hub.local`.
      calibration: a text, see `mcjax.documents.read_documents`.
      max_bits: planes of each expert weight.
      group_size: input features that share a table entry, None for each weight's default.
      samples: calibration windows, spread evenly over the text.
      seq_len: tokens in a window; more than the model's positions become those, with a note.
      effort: one of `EFFORTS`, time for quality.
      bos: whether windows begin with the beginning-of-sequence token, see `mcjax.text.BOS`.
      batch_tokens: about how many tokens are computed at once.

    Raises:
      ValueError: for what cannot be compressed so.
    """
    if not 1 <= max_bits <= 8:
        raise ValueError(f"--max-bits must be 1 to 8, got {max_bits}")
    if effort not in EFFORTS:
        raise ValueError(f"--effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    folder = Folder(local(model))
    decoder = folder.decoder
    for layer in set(decoder.layers):
        for role in weights.roles(layer, decoder.width):
            if role.tap is not None:
                resolve_group_size(role.shape[-2], group_size)
    if seq_len > decoder.max_position_embeddings:
        note(
            f"calibrating on windows of {decoder.max_position_embeddings} tokens, all the "
            f"positions that the model has, not of {seq_len}"
        )
        seq_len = decoder.max_position_embeddings
    ends = decoder.eos_token_ids
    tokens = text.encode_file(folder.tokenizer_path, calibration, decoder.vocab_size, ends)
    begin = text.beginning(folder.tokenizer_path, decoder.vocab_size, bos)
    every = text.windows(tokens, seq_len, "calibration text", begin)
    windows, lessons = text.spread(every, samples), every[:0]
    how = Options(max_bits, group_size, True, EFFORTS[effort])
    identity = {
        "format_version": checkpoint.FORMAT_VERSION,
        "source_sha256": folder.source_hash(),
        "config": folder.values,
        "max_bits": max_bits,
        "group_size": group_size,
        "rotated": how.rotated,
        "effort": effort,
        "importance": importance.MEASURE,
        "costs": sensitivity.MEASURE,
        "attention_widths": list(ATTENTION_WIDTHS),
        "calibration": {
            "file": Path(calibration).name,
            "windows": len(windows),
            "window_tokens": seq_len,
            "crc32": checkpoint.crc32(windows),
        },
    }
    plan: Sequence[Setting] = ()
    if effort == TUNED:
        plan = settings(decoder, range(1, max_bits + 1), ATTENTION_WIDTHS, ATTENTION_BITS)
        lessons = text.spread(every, windows_wanted(plan, seq_len))
        identity["tuning"] = {
            "windows": len(lessons),
            "crc32": checkpoint.crc32(lessons),
            "settings": [list(setting) for setting in plan],
        }
    return Job(folder, windows, lessons, plan, how, identity, batch_tokens)
