"""The memory of this process, and having it give back what it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX tells of when a program is compiled."""


def sparing(progress: Callable[..., Any]) -> Callable[..., Any]:
    """A progress bar between whose steps this process gives back memory that it has freed.

    Its C library would keep some for later, about as much again as is in use, to save time: 15 % of
    a small model's. Where that is glibc, it is also told to keep no large block. Programs are
    forgotten at either end, and have to be made or read again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((-3, 1 << 20), (-1, 1 << 20), (-8, 2)):  # see malloc.h
            mallopt(parameter, value)

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            give_back()

    def told(items, **options):
        forget()
        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            for item in progress(items, **options):
                yield item
                give_back()
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)
        forget()

    return told


def forget() -> None:
    """Forgets programs, and gives back their memory."""
    jax.clear_caches()
    gc.collect()
    give_back()


def give_back() -> None:
    """Has the C library give back memory that is freed, where that is glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def process_bytes() -> int:
    """Memory of this process that no file backs, its programs and libraries included."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)
