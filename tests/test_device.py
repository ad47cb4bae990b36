"""Products by what a device can do: which ones a program holds, and what happens if one fails."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

import mcjax
from mcjax import generate
from mcjax.notes import Note
from mcjax.ops import device

T4 = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
MI300 = SimpleNamespace(platform="gpu", device_kind="AMD MI300X", compute_capability="gfx942")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
OTHER = SimpleNamespace(platform="metal", device_kind="M3")


@pytest.fixture
def on(monkeypatch):
    def assume(what):
        jax.clear_caches()
        monkeypatch.setattr(device, "first", lambda: what)
        monkeypatch.setattr(device, "is_here", lambda _: True)

    yield assume
    device.works.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize(
    "what, expected", [(T4, "plain"), (H100, "gpu"), (MI300, "plain"), (OTHER, "plain")]
)
def test_kinds(on, what, expected):
    on(what)
    assert device.platform() == expected


def steps(artifact):
    """A prefill and a step of decoding, traced."""
    model = mcjax.load(artifact, budget=2.25)
    module, greedy = model.module, generate.Sampling()
    cache = jax.eval_shape(lambda: module.empty_cache(1, 64))
    at = np.zeros(1, np.int32)
    prompt = np.zeros((1, 40), np.int32)
    return [
        generate.prefill.trace(module, model.params, prompt, at + 40, cache, None, greedy),
        generate.decode.trace(module, model.params, at, at + 40, cache, None, greedy),
    ]


@pytest.mark.parametrize("what", [T4, MI300], ids=["capability 7.5", "ROCm"])
def test_no_kernel_of_ours_where_none_can_run(on, artifact, what):
    on(what)
    for traced in steps(artifact):
        assert "pallas_call" not in str(traced.jaxpr)
        target = "cuda" if what is T4 else "rocm"
        text = traced.lower(lowering_platforms=(target,)).as_text()
        for name in ("planes_", "round_rows", "triton"):
            assert name not in text


def test_kernels_where_they_can(on, artifact):
    on(H100)
    for traced in steps(artifact):
        assert "pallas_call" in str(traced.jaxpr)


def test_a_kernel_that_fails_is_replaced(on, artifact):
    """A TPU's kernel does not compile here; one line says so, and results are the plain ones."""
    tokens = np.arange(20).reshape(2, 10)
    expected = np.asarray(mcjax.load(artifact, budget=2.25)(tokens))
    on(TPU)
    with pytest.warns(Note, match="the tpu kernel fails: .* plain XLA products serve instead"):
        assert device.platform() == "plain"
    got = mcjax.load(artifact, budget=2.25)(tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_kernel_that_differs_is_replaced(on, monkeypatch):
    from mcjax.ops import pallas

    on(TPU)
    monkeypatch.setattr(pallas, "grouped_dot", lambda x, *_, **__: x @ np.ones((64, 128)))
    with pytest.warns(Note, match="the tpu kernel is off by"):
        assert not device.works("tpu", "TPU v9")
    monkeypatch.setattr(
        pallas, "grouped_dot", lambda *a, target: pallas.reference(*a, np.ones(4, bool))
    )
    assert device.works("tpu", "TPU v10")


def test_large_slices_of_v5e_have_no_ragged_exchange(on, monkeypatch):
    on(TPU)
    monkeypatch.setattr(device, "is_here", lambda _: False)
    assert device.exchanges_raggedly(16) and not device.exchanges_raggedly(32)
    on(H100)
    assert device.exchanges_raggedly(1024)
