"""What the compilers of chips that are not here make of kernels and of whole models.

Skipped where they are not installed: `uv run --with "jax[tpu]" pytest tests/test_ahead.py` has
those of TPUs, `--with "jax[cuda12]"` that of GPUs.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mcjax import bitplane
from mcjax.models.families import describe
from mcjax.models.language_model import LanguageModel
from mcjax.ops import device
from mcjax.ops.dot import expert_dot

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import mesh
import whole

HAVE_TPU = bool(importlib.util.find_spec("libtpu"))
HAVE_GPU = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
TARGETS = [
    pytest.param(target, marks=pytest.mark.skipif(not have, reason=f"no compiler for {target}"))
    for have, targets in ((HAVE_TPU, whole.TOPOLOGIES), (HAVE_GPU, whole.GPUS))
    for target in targets
]

SHAPES = {
    "Mixtral's gate": (8, 4096, 14336, 2, 16, jnp.bfloat16),
    "Qwen3's down, 6 groups": (128, 768, 2048, 3, 64, jnp.bfloat16),
    "odd sizes": (8, 1000, 1100, 1, 20, jnp.bfloat16),
    "float32": (8, 1024, 1792, 4, 256, jnp.float32),
    "eight planes": (8, 1024, 1792, 8, 64, jnp.bfloat16),
    "tables of 2.6 GiB": (2000, 4096, 14336, 2, 16, jnp.bfloat16),
    "tables of 5.1 GiB": (4000, 4096, 14336, 2, 16, jnp.bfloat16),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_compile(target, shape):
    if shape.endswith("GiB") and target in whole.TOPOLOGIES:
        pytest.skip("more than such a chip holds, and no concern of its kernel")
    chip = whole.described(target)
    experts, d_in, d_out, bits, rows, dtype = SHAPES[shape]
    planes = jax.eval_shape(partial(bitplane.empty, (experts, d_in, d_out), bits, rotated=True))
    x = jax.ShapeDtypeStruct((rows, d_in), dtype)
    index = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    with jax.default_device(chip):
        assert device.platform() in ("tpu", "gpu")
        for product in (None, "pallas"):
            dot = jax.jit(partial(expert_dot, product=product))
            traced = dot.trace(*whole.on(chip, (x, planes, index)))
            assert "pallas_call" in str(traced.jaxpr)
            made = traced.lower().compile()
            if shape.endswith("GiB"):  # no copy of its table
                assert made.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize("target", TARGETS)
def test_no_program_copies_planes(target):
    """768 features are 6 groups, which fill no tile of a TPU: see `mcjax.ops.layout`."""
    small = {"vocab_size": 2048, "num_hidden_layers": 3, "num_experts": 32}
    decoder = describe(whole.QWEN | small)[1]
    model = whole.Shape("small", LanguageModel(decoder, jnp.bfloat16, 8), (3, 2))
    for program in whole.programs(model.module, 64):
        found = whole.compiled(model, program, whole.described(target))
        assert found["temporary_bytes"] < found["params_bytes"] / 8, (program.name, found)


@pytest.mark.skipif(not HAVE_TPU, reason="no compiler for TPUs")
@pytest.mark.parametrize(
    ("chips", "shape", "ragged"), [("v5e:4x4", (1, 4, 4), 2), ("v5e:8x8", (2, 8, 4), 0)]
)
def test_meshes_compile(chips, shape, ragged):
    """Kernels in a `jax.shard_map`; and v5e's compiler refuses ragged exchanges on large slices."""
    decoder = describe(whole.QWEN | {"num_hidden_layers": 2, "vocab_size": 2048})[1]
    found = mesh.compiled(decoder, chips, shape, 32, 128)
    assert found["kernels"] and found["ragged_exchanges"] == ragged
    assert found["temporary_bytes"] < found["argument_bytes"] / 8


def test_a_device_that_is_told_is_the_one_whose_products_are_used():
    assert device.first() == jax.local_devices()[0]
    with jax.default_device("cpu"):
        assert device.first() == jax.devices("cpu")[0]
    with jax.default_device(jax.devices("cpu")[-1]):
        assert device.first() == jax.devices("cpu")[-1]
