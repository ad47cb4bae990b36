"""What compiled programs need: memory as XLA says, and time as it is measured."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.process_memory import forget, give_back, process_bytes


class Need(NamedTuple):
    """Bytes and seconds of a program, and bytes that the program itself takes."""

    bytes: int
    seconds: float
    program: int = 0


class Meter:
    """What programs need, each measured once: bytes and seconds.

    Bytes are those of results and temporaries, or of compiling it if that is more and JAX keeps no
    compiled programs.
    """

    def __init__(self, timed: bool):
        self.timed = timed
        self.known: dict[Any, Need] = {}
        self.used: set[Any] = set()

    def __call__(self, function: Any, *arguments: Any, **options: Any) -> Need:
        """Of a jitted function, of arrays, their shapes and static arguments."""
        key = (
            function,
            jax.tree.structure((arguments, options)),
            *map(_key, jax.tree.leaves((arguments, options))),
        )
        if key not in self.known:
            before = process_bytes()
            compiled = function.lower(*arguments, **options).compile()
            # Where compiled programs are kept, the run finds them.
            kept = getattr(jax.config, "jax_compilation_cache_dir", None) is not None
            compiling = 0 if kept else process_bytes() - before
            give_back()
            program = max(0, process_bytes() - before)
            needs = compiled.memory_analysis()
            size = needs.temp_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
            seconds = self._seconds(compiled, arguments, options)
            self.known[key] = Need(max(size, compiling), seconds, program)
            del compiled
            forget()
        self.used.add(key)
        return self.known[key]

    def _seconds(self, compiled, arguments, options) -> float:
        if not self.timed:
            return math.nan
        some = [_drawn(a) for a in arguments if _dynamic(a)]
        named = {name: _drawn(a) for name, a in options.items() if _dynamic(a)}
        taken = math.inf
        for _ in range(2):  # the first waits for pages of memory, unless it takes long
            copied = jax.tree.map(jnp.array, (some, named))  # some programs take theirs over
            start = time.perf_counter()
            jax.block_until_ready(compiled(*copied[0], **copied[1]))
            taken = min(taken, time.perf_counter() - start)
            if taken > 1:
                break
        return taken


def _key(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


def _dynamic(argument: Any) -> bool:
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(argument))


def _drawn(argument: Any) -> Any:
    """Random numbers of those shapes; an array is itself."""
    rng = np.random.default_rng(0)

    def of_leaf(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)
        return jnp.asarray(rng.integers(0, 127, leaf.shape), leaf.dtype)

    return jax.tree.map(of_leaf, argument)
