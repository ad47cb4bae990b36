"""Where planes and tables are put: as on a TPU, in a CPU's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, PartitionSpec, SingleDeviceSharding

from mcjax import sharding
from mcjax.ops import layout


@pytest.fixture
def as_on_tpu(monkeypatch):
    monkeypatch.setattr(layout, "_platform", lambda _: "tpu")


def order(array):
    return array.format.layout.major_to_minor


@pytest.mark.parametrize("kind", [np.uint32, np.uint8])
def test_planes_are_put_row_by_row(as_on_tpu, kind):
    here = SingleDeviceSharding(jax.devices()[0])
    planes = np.arange(2 * 3 * 4 * 6 * 8).reshape(2, 3, 4, 6, 8).astype(kind)
    other = jax.device_put(planes, Format(Layout((0, 1, 3, 2, 4)), here))
    assert order(other) == (0, 1, 3, 2, 4)
    for given in (planes, other):
        got = layout.put({"a": given})["a"]
        assert order(got) == (0, 1, 2, 3, 4)
        np.testing.assert_array_equal(got, planes)
        assert layout.put(got) is got


def test_all_else_stays_as_it_is(as_on_tpu):
    here = SingleDeviceSharding(jax.devices()[0])
    floats = jax.device_put(np.ones((2, 3, 4)), Format(Layout((0, 2, 1)), here))
    places = jnp.zeros((2, 3), jnp.int32)
    assert layout.put(floats) is floats and layout.put(places) is places


def test_on_a_mesh(as_on_tpu):
    devices = jax.make_mesh((1,), ("expert",), (AxisType.Auto,), devices=jax.devices()[:1])
    shared = sharding.resolve(devices)
    planes = np.arange(2 * 3 * 6 * 8, dtype=np.uint32).reshape(2, 3, 6, 8)
    got = shared.place(planes, PartitionSpec("expert"))
    assert order(got) == (0, 1, 2, 3)
    np.testing.assert_array_equal(got, planes)


def test_on_a_cpu_nothing_is_asked_for():
    where = SingleDeviceSharding(jax.devices("cpu")[0])
    assert layout.row_by_row(np.zeros((2, 3), np.uint32), where) is where
