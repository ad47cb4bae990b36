"""What was done other than asked, as warnings that the command line prints as lines on stderr."""

from __future__ import annotations

import warnings


class Note(UserWarning):
    """Something was done other than asked, to no harm."""


def note(message: str) -> None:
    """Says in one line what was done other than asked."""
    warnings.warn(message, Note, stacklevel=3)
