"""Pallas kernels in interpret mode against dequantise-then-multiply; lowering for real targets."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mcjax import tables
from mcjax.bitplane import BitPlanes, empty, mixed, padded
from mcjax.models.decoder import Routed, Routing
from mcjax.models.experts import apply_experts
from mcjax.ops import dp4a, pallas
from mcjax.ops.grouped import expert_map
from mcjax.ops.pallas import TARGETS, grouped_dot, supported

RNG = np.random.default_rng(0)


def random_planes(experts, d_in, d_out, width, group_size):
    """Any bits and bytes are a weight; steps of 1/200 to 1/20 keep sums in range."""
    groups = padded(d_in) // group_size
    words = (experts, width, group_size // 32, groups, d_out)
    table = (experts, tables.num_rows(width), groups, d_out)
    return BitPlanes(
        planes=jnp.asarray(RNG.integers(0, 2**32, words, dtype=np.uint32)),
        tables=(jnp.asarray(RNG.integers(88, 139, table), jnp.uint8),),
        widths=(width,),
        d_in=d_in,
        group_size=group_size,
    )


def rows_of(planes, rows, experts=None, dtype=jnp.float32):
    """Rows, and for each one of `experts` (by default all but expert 1, which gets none)."""
    experts = [e for e in range(planes.shape[0]) if e != 1] if experts is None else experts
    x = jnp.asarray(RNG.normal(size=(rows, planes.shape[1])), dtype)
    return x, jnp.asarray(RNG.choice(experts, rows), jnp.int32)


def dense_dot(x, planes, index, keep=None):
    weight = np.asarray(planes.dequantize(x.dtype), np.float64)[np.asarray(index)]
    y = np.einsum("ti,tio->to", np.asarray(x, np.float64), weight)
    return y if keep is None else np.where(np.asarray(keep)[:, None], y, 0)


def assert_close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("width", "group_size", "d_in"),
    [(1, 32, 64), (2, 64, 120), (3, 128, 250), (4, 32, 140), (8, 128, 256)],
)
def test_kernel(target, width, group_size, d_in):
    planes = random_planes(4, d_in, 24, width, group_size)
    x, index = rows_of(planes, 40)
    got = grouped_dot(x, planes, index, target=target, block_rows=16, interpret=True)
    assert got.shape == (40, 24) and got.dtype == x.dtype
    assert_close(got, dense_dot(x, planes, index))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_more_groups_and_outputs_than_a_tile(target):
    planes = random_planes(2, 36 * 32, 200, 2, 32)
    x, index = rows_of(planes, 20)
    got = grouped_dot(x, planes, index, target=target, block_out=128, interpret=True)
    assert_close(got, dense_dot(x, planes, index))


@pytest.mark.parametrize(
    ("block_rows", "rows"),
    [
        (4, 13),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(32, 50, marks=pytest.mark.slow),
    ],
)
def test_block_sizes(block_rows, rows):
    planes = random_planes(3, 128, 40, 3, 64)
    x, index = rows_of(planes, rows)
    got = grouped_dot(x, planes, index, block_rows=block_rows, block_out=16, interpret=True)
    assert_close(got, dense_dot(x, planes, index))


@pytest.mark.parametrize("target", TARGETS)
def test_pruned_rows_reach_nothing(target):
    planes = random_planes(4, 64, 8, 2, 32)
    x, index = rows_of(planes, 12)
    keep = jnp.asarray(RNG.random(12) < 0.5).at[0].set(True)
    poisoned = jnp.where(keep[:, None], x, jnp.nan)
    for kept in (keep, jnp.zeros_like(keep)):
        got = grouped_dot(poisoned, planes, index, kept, target=target, interpret=True)
        expected = dense_dot(x, planes, index, kept)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert (np.asarray(got)[~np.asarray(kept)] == 0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_mixed_planes(target):
    stacks = tuple(
        random_planes(n, 96, 40, width, 32) for n, width in ((2, 1), (1, 2), (2, 3), (1, 8))
    )
    planes = mixed(stacks, (3, 1, 8, 1, 2, 3))
    run = jax.jit(lambda *args: grouped_dot(*args, target=target, interpret=True))
    keep = jnp.asarray(RNG.random(30) < 0.8)
    for experts in ([0, 1, 2, 3, 4, 5], [2], [1, 3]):  # with stacks that have no rows
        x, index = rows_of(planes, 30, experts)
        poisoned = jnp.where(keep[:, None], x, jnp.nan)
        assert_close(run(poisoned, planes, index, keep), dense_dot(x, planes, index, keep))


@pytest.mark.parametrize("target", TARGETS)
def test_drafting_reads_the_first_planes_of_whole_stacks(target):
    wide, narrow = random_planes(2, 64, 40, 3, 32), random_planes(2, 64, 40, 1, 32)
    both = (narrow.tables[0], *wide.tables)
    nested = dataclasses.replace(wide, tables=both, widths=(1, 3))
    drafting = mixed((nested,), (3, 3), most=1)
    x, index = rows_of(wide, 20)

    def run(x):
        return grouped_dot(x, drafting, index, target=target, interpret=True)

    assert_close(run(x), dense_dot(x, nested.slice(1), index))
    assert "u32[2,1,1,2,40]" not in str(jax.make_jaxpr(run)(x))  # a slice, which would be a copy


@pytest.mark.parametrize("rows", [3, 40])
def test_tables_out_of_reach_of_bytes(rows, monkeypatch):
    """Four entries in a word, where signed 32-bit offsets would not tell all bytes apart."""
    assert pallas.is_within_reach(2**31) and pallas.is_within_reach(2**32 + 1)
    assert not pallas.is_within_reach(2**31 + 1) and not pallas.is_within_reach(2**32)
    planes = random_planes(3, 192, 140, 3, 64)
    size = planes.tables[0].size
    monkeypatch.setattr(pallas, "REACH", size - 1)
    assert pallas.addressed(planes.tables[0]).shape == (*planes.tables[0].shape[:-1], 35)
    assert supported(planes.shape, 64, 3, jnp.float32)
    assert not supported((3, 192, 141), 64, 3, jnp.float32)
    x, index = rows_of(planes, rows)
    if rows > 3:
        got = grouped_dot(x, planes, index, target="gpu", interpret=True)
    else:
        (got,) = dp4a.expert_dots(x, (planes,), index, interpret=True)
    assert_close(got, dense_dot(x, planes, index), 1e-3)


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("target", TARGETS)
def test_bfloat16(target, rows):
    planes = random_planes(2, 128, 24, 3, 64)
    x, index = rows_of(planes, rows, dtype=jnp.bfloat16)
    got = grouped_dot(x, planes, index, target=target, interpret=True)
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), dense_dot(x, planes, index), 1e-2)


def test_any_bytes_beyond_the_last_group_vanish():
    """A TPU leaves what it likes in the part of a block that lies outside an array."""
    planes = random_planes(2, 40 * 32, 160, 2, 32)
    x, index = rows_of(planes, 20, [0])
    mode = pltpu.InterpretParams(uninitialized_memory="nan")
    got = grouped_dot(x, planes, index, block_out=128, target="tpu", interpret=mode)
    assert_close(got, dense_dot(x, planes, index))
    codes = jnp.arange(256, dtype=jnp.int32)
    assert (
        np.isfinite(tables.step_value(codes)).all()
        and np.isfinite(tables.offset_ratio(codes)).all()
    )


def test_derivatives_with_respect_to_x():
    planes = random_planes(3, 64, 8, 2, 32)
    x, index = rows_of(planes, 12)
    keep = jnp.asarray(RNG.random(12) < 0.7)
    dense = planes.dequantize()

    def kernel(x):
        return jnp.sum(jnp.sin(grouped_dot(x, planes, index, keep, interpret=True)))

    def expected(x):
        y = jnp.einsum("ti,tio->to", x, dense[index]) * keep[:, None]
        return jnp.sum(jnp.sin(y))

    np.testing.assert_allclose(jax.grad(kernel)(x), jax.grad(expected)(x), rtol=1e-4, atol=1e-5)
    change = jnp.ones_like(x)
    for of in (lambda f: jax.jvp(f, (x,), (change,))[1], lambda f: jax.hessian(f)(x)[0, :, 0]):
        np.testing.assert_allclose(of(kernel), of(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_jit_and_vmap_agree_with_eager(target):
    planes = random_planes(3, 64, 8, 2, 32)
    x, index = rows_of(planes, 12)

    def run(x, index):
        return grouped_dot(x, planes, index, target=target, interpret=True)

    eager = run(x, index)
    np.testing.assert_array_equal(jax.jit(run)(x, index), eager)
    mapped = jax.vmap(run)(jnp.stack([x, x]), jnp.stack([index[::-1], index]))
    np.testing.assert_allclose(mapped[1], eager, rtol=1e-5, atol=1e-6)


def test_other_platforms_take_plain_jax():
    planes = random_planes(3, 64, 8, 2, 32)
    x, index = rows_of(planes, 12)
    expected = expert_map(lambda w, rows: rows @ w[0].dequantize(rows.dtype), (planes,), x, index)
    np.testing.assert_allclose(grouped_dot(x, planes, index), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(grouped_dot(x, planes, index)))(x)
    assert gradient.shape == x.shape and np.isfinite(gradient).all()
    half = x.astype(jnp.float16)
    assert not supported(planes.shape, 32, 2, half.dtype)
    assert_close(grouped_dot(half, planes, index), expected, 1e-2)
    assert grouped_dot(x[:0], planes, index[:0]).shape == (0, 8)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("width", "group_size", "d_in", "d_out", "rows", "dtype"),
    [
        (1, 32, 320, 200, 600, jnp.float32),
        (2, 128, 4096, 14336, 2, jnp.bfloat16),
        (4, 128, 14336, 4096, 1024, jnp.bfloat16),
        (8, 64, 120, 24, 9, jnp.bfloat16),
        ((1, 3, 2, 3), 128, 4096, 1024, 64, jnp.float32),
    ],
)
def test_lowering(platform, width, group_size, d_in, d_out, rows, dtype):
    def planes():
        widths = width if isinstance(width, tuple) else (width,) * 4
        stacks = tuple(
            empty((widths.count(k), d_in, d_out), k, group_size) for k in sorted(set(widths))
        )
        return mixed(stacks, widths) if len(stacks) > 1 else stacks[0]

    arguments = (
        jax.ShapeDtypeStruct((rows, d_in), dtype),
        jax.eval_shape(planes),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
    )
    try:
        lowered = jax.jit(grouped_dot).trace(*arguments).lower(lowering_platforms=(platform,))
    except RuntimeError as error:
        if "GPU devices" not in str(error):
            raise
        pytest.skip(f"JAX {jax.__version__} lowers Triton kernels only where it sees a GPU")
    kernels = {"tpu": "tpu_custom_call", "cuda": "triton"}
    assert kernels[platform] in lowered.as_text()


def test_bad_arguments():
    planes = random_planes(2, 64, 8, 2, 32)
    x, index = rows_of(planes, 4)
    with pytest.raises(ValueError, match="does not multiply"):
        grouped_dot(x[:, :32], planes, index)
    with pytest.raises(ValueError, match=r"must be \[4\]"):
        grouped_dot(x, planes, index[:3])
    with pytest.raises(ValueError, match="block_rows must be a power of two, got 24"):
        grouped_dot(x, planes, index, block_rows=24)
    with pytest.raises(ValueError, match="target"):
        grouped_dot(x, planes, index, target="cpu")
    with pytest.raises(ValueError, match="no kernel for float16"):
        grouped_dot(x.astype(jnp.float16), planes, index, target="gpu")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_models_experts_lower_to_kernels(platform):
    """`apply_experts` as GPU and TPU run it; here the same call gives the loops' result."""
    gate, up = (random_planes(4, 64, 96, 2, 32) for _ in range(2))
    down = random_planes(4, 96, 64, 2, 32)
    x, index = rows_of(gate, 6)
    keep = jnp.arange(6) != 2
    run = partial(apply_experts, Routed(experts=4, width=96, routing=Routing(top_k=1)), act_bits=8)
    experts = jax.jit(partial(run, product="pallas"))
    arguments = {"gate": gate, "up": up, "down": down}, x, index, keep
    np.testing.assert_allclose(experts(*arguments), run(*arguments), rtol=1e-2, atol=1e-3)
    try:
        text = experts.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    except RuntimeError as error:
        if "GPU devices" not in str(error):
            raise
        pytest.skip(f"JAX {jax.__version__} lowers Triton kernels only where it sees a GPU")
    assert text.count("custom_call") >= 3
