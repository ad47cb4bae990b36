"""A served model under JAX's transformations and modes, and outside of its process."""

import pickle
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import export

import mcjax
from mcjax.serving import Model

TOKENS = np.random.default_rng(0).integers(0, 300, (4, 10)).astype(np.int32)


@pytest.fixture(scope="module", params=[None, 8])
def model(request, artifact):
    return mcjax.load(artifact, budget=2.25, act_bits=request.param)


@pytest.fixture(scope="module")
def expected(model):
    return np.asarray(model(TOKENS))


def close(model, got, expected):
    """Rounded rows are products of their number, and a token may then meet another expert."""
    off, every = np.asarray(got) - expected, np.asarray(expected)
    if model.module.act_bits is None:
        assert np.abs(off).max() <= 2e-5 * np.abs(every).max()
    else:
        assert np.linalg.norm(off) <= 0.15 * np.linalg.norm(every)


def forward(model, params, tokens=TOKENS):
    return model.module.apply({"params": params}, tokens)


def moved(model):
    """Floating-point parameters alone, and a function that puts them among the others."""
    leaves, structure = jax.tree.flatten(model.params)
    own = {i: a.astype(jnp.float32) for i, a in enumerate(leaves) if a.dtype.kind in "fV"}

    def joined(values):
        return jax.tree.unflatten(structure, [values.get(i, a) for i, a in enumerate(leaves)])

    return own, joined


def test_jit_eager_vmap_scan_and_remat(model, expected):
    close(model, forward(model, model.params), expected)
    each = jax.vmap(lambda t: forward(model, model.params, t[None])[0])(TOKENS)
    close(model, each, expected)
    _, scanned = jax.lax.scan(lambda _, t: (None, model(t[None])[0]), None, TOKENS)
    close(model, scanned, expected)
    close(model, jax.jit(jax.checkpoint(lambda t: model(t)))(TOKENS), expected)


def test_derivatives_of_every_mode(model):
    values, joined = moved(model)
    change = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape), values)

    def loss(values):
        return jnp.mean(forward(model, joined(values)) ** 2)

    _, forward_mode = jax.jit(lambda v: jax.jvp(loss, (v,), (change,)))(values)
    gradient = jax.jit(jax.grad(loss))(values)
    reverse_mode = sum(jnp.vdot(gradient[i], change[i]) for i in values)
    np.testing.assert_allclose(forward_mode, reverse_mode, rtol=2e-3)
    assert all(np.isfinite(g).all() for g in gradient.values())
    if model.module.act_bits is None:

        def loss_of_dense(values):
            params = jax.tree.map(
                lambda w: w.dequantize() if hasattr(w, "dequantize") else w,
                joined(values),
                is_leaf=lambda w: hasattr(w, "dequantize"),
            )
            return jnp.mean(forward(model, params) ** 2)

        def slope_and_hessian(loss):
            """Along the line from the values in the direction of the change."""

            def along(t):
                return loss({i: values[i] + t * change[i] for i in values})

            return jax.jit(lambda t: (jax.jacfwd(along)(t), jax.hessian(along)(t)))(0.0)

        (slope, hessian), expected = map(slope_and_hessian, (loss, loss_of_dense))
        np.testing.assert_allclose(forward_mode, slope, rtol=1e-5)
        np.testing.assert_allclose((slope, hessian), expected, rtol=1e-3)


def test_dense_models_differentiate_both_ways(model_folder):
    model = mcjax.load(model_folder)
    values = jax.tree.map(lambda a: a.astype(jnp.float32), model.params)
    change = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape), values)

    def loss(values):
        return jnp.mean(forward(model, values) ** 2)

    _, forward_mode = jax.jit(lambda v: jax.jvp(loss, (v,), (change,)))(values)
    gradient = jax.jit(jax.grad(loss))(values)
    dots = jax.tree.map(jnp.vdot, gradient, change)
    np.testing.assert_allclose(forward_mode, sum(jax.tree.leaves(dots)), rtol=1e-3)


@pytest.mark.parametrize(
    "modes",
    [
        [partial(jax.enable_x64, True)],
        [
            partial(jax.numpy_rank_promotion, "raise"),
            partial(jax.numpy_dtype_promotion, "strict"),
            partial(jax.check_tracer_leaks, True),
            partial(jax.debug_nans, True),
        ],
    ],
    ids=["x64", "strict"],
)
def test_modes(model, expected, modes):
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode())
        got = jax.jit(lambda m, t: m(t))(model, TOKENS)
        cache = model.module.empty_cache(4, 12)
        first, cache = model.module.apply({"params": model.params}, TOKENS[:, :9], None, cache)
        at = np.full((4, 1), 9, np.int32)
        last, _ = model.module.apply({"params": model.params}, TOKENS[:, 9:], at, cache)
    assert got.dtype == jnp.float32
    close(model, got, expected)
    close(model, first, expected[:, :9])
    close(model, last, expected[:, 9:])


def test_donated_caches_are_used_again(model):
    step = jax.jit(model.module.apply, donate_argnums=3)
    cache = model.module.empty_cache(4, 12)
    first = jax.tree.leaves(cache)[0].unsafe_buffer_pointer()
    _, cache = step({"params": model.params}, TOKENS[:, :9], None, cache)
    assert jax.tree.leaves(cache)[0].unsafe_buffer_pointer() == first


def test_exported_with_a_batch_of_any_size(model, expected):
    (batch,) = export.symbolic_shape("batch")
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model)
    tokens = jax.ShapeDtypeStruct((batch, 10), jnp.int32)
    made = export.export(jax.jit(lambda m, t: m(t)))(like, tokens)
    again = export.deserialize(made.serialize())
    for count in (1, 4):
        close(model, again.call(model, TOKENS[:count]), expected[:count])


def test_parameters_travel(model, tmp_path):
    def same(a, b):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    params = model.params
    same(flax.serialization.from_bytes(params, flax.serialization.to_bytes(params)), params)
    pickled = pickle.loads(pickle.dumps(model))
    assert isinstance(pickled, Model) and pickled.module == model.module
    same(pickled.params, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "params", params), params)


def test_meshes(artifact):
    """The batch shared by two devices: `shard_map` with its checks, automatic and explicit axes."""
    program = f"""
        import os
        devices = "--xla_force_host_platform_device_count=2"
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), devices])
        import jax, numpy as np, mcjax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        tokens = np.random.default_rng(0).integers(0, 300, (4, 10)).astype(np.int32)
        for act_bits, bound in ((None, 2e-5), (8, 0.15)):
            model = mcjax.load({str(artifact)!r}, budget=2.25, act_bits=act_bits)
            expected = np.asarray(model(tokens))
            def check(got):
                assert np.linalg.norm(got - expected) <= bound * np.linalg.norm(expected)
            for kind in (AxisType.Auto, AxisType.Explicit):
                mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
                with jax.set_mesh(mesh):
                    rows = jax.device_put(tokens, NamedSharding(mesh, P("d")))
                    got = jax.jit(lambda m, t: m(t))(model, rows)
                    check(got)
                    if kind == AxisType.Auto:
                        continue
                    assert got.sharding.spec[0] == "d", got.sharding
                    x = jax.device_put(np.ones((4, 96), np.float32), NamedSharding(mesh, P("d")))
                    planes = model.params["segment_0"]["layer_0"]["block"]["experts"]["gate"].at(0)
                    index = jax.device_put(np.zeros((4, 1), np.int32), NamedSharding(mesh, P("d")))
                    y = jax.jit(lambda x, w, i: mcjax.expert_dot(x, w, i, act_bits=act_bits))
                    assert y(x, planes, index).sharding.spec[0] == "d"
            mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
            every = jax.tree.map(lambda _: P(), model)
            shared = jax.shard_map(
                lambda m, t: m(t), mesh=mesh, in_specs=(every, P("d")), out_specs=P("d")
            )
            check(jax.jit(shared)(model, tokens))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
