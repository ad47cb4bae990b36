"""What the device can do that products are chosen for: the one place that asks JAX for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mcjax.notes import note

TRITON = (8, 0)
"""The least compute capability that JAX's Pallas has a Triton backend for."""

SEEN = ("cuda 9.0",)
"""Kinds of device that the kernels were seen to give right results on."""


MOST_RAGGED = {"TPU v5 lite": 16}
"""Chips of a slice up to which its compiler has a ragged exchange, for kinds that not always do."""


def first() -> Any:
    """The device that arrays live on unless told otherwise, see `jax.default_device`.

    Products are chosen for it, wherever a program's arguments lie. To compile for a device that is
    not here, make one of a topology the default while tracing, see `jax.experimental.topologies`.
    """
    told: Any = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices(backend=told)[0] if told is None or isinstance(told, str) else told


def is_here(device: Any) -> bool:
    """Whether a program can be run on a device, or only be compiled for it."""
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:  # there is none of that platform
        return False


def platform() -> str:
    """Whose products to use: "cpu", "gpu" or "tpu", or "plain" where XLA's own must serve.

    Plain are GPUs below `TRITON` and those that are not NVIDIA's, devices of other kinds, and those
    on which a kernel was tried and failed, see `works`. Where nothing can be tried, since the
    device is not here, kernels are taken to work.
    """
    device = first()
    if device.platform == "cpu":
        return "cpu"
    if device.platform == "tpu":
        return "tpu" if not is_here(device) or works("tpu", device.device_kind) else "plain"
    capability = str(getattr(device, "compute_capability", ""))
    parts = capability.split(".")
    if device.platform not in ("gpu", "cuda") or not all(part.isdigit() for part in parts):
        return "plain"  # AMD's capabilities are names
    if tuple(map(int, parts)) < TRITON:
        return "plain"
    return "gpu" if not is_here(device) or works("gpu", f"cuda {capability}") else "plain"


def exchanges_raggedly(devices: int) -> bool:
    """Whether so many devices of a mesh can send each other rows in numbers that differ."""
    chip = first()
    if chip.device_kind not in MOST_RAGGED:
        return True
    here = len(jax.devices(chip.platform)) if is_here(chip) else 0
    return max(devices, here) <= MOST_RAGGED[chip.device_kind]


@cache
def works(target: str, kind: str) -> bool:
    """Whether a kernel gives what plain JAX gives, tried once on a kind of device not `SEEN`.

    Args:
      target: "gpu" or "tpu".
      kind: of the device.
    """
    if kind in SEEN:
        return True
    from mcjax import bitplane  # imports what is above
    from mcjax.ops.pallas import grouped_dot, reference

    rng = np.random.default_rng(0)
    with jax.ensure_compile_time_eval():
        planes = bitplane.empty((2, 64, 128), 2, 32)
        planes = jax.tree.map(
            lambda a: jnp.asarray(rng.integers(0, np.iinfo(a.dtype).max, a.shape, a.dtype)), planes
        )
        x = jnp.asarray(rng.standard_normal((4, 64), np.float32))
        index = jnp.asarray([0, 1, 1, 0])
        try:
            got = np.asarray(grouped_dot(x, planes, index, target=target))
        except Exception as error:  # compilers raise many kinds
            why = f"fails: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
        else:
            wanted = np.asarray(reference(x, planes, index, jnp.ones(4, bool)))
            off = np.abs(got - wanted).max() / np.abs(wanted).max()
            if off < 0.02:  # products of float32 may be rounded to bfloat16
                return True
            why = f"is off by {off:.2g}"
    note(f"the {target} kernel {why} on {kind}; plain XLA products serve instead")
    return False
