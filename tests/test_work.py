"""What an interrupted run leaves: planes that are made once, and whose work it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax.quantize import quantize
from mcjax.work import Work, keeping

W = np.random.default_rng(0).normal(size=(3, 64, 8)).astype(np.float32)


def test_planes_are_made_once(tmp_path):
    def make():
        calls.append(1)
        return {
            "gate": quantize(jnp.asarray(W), 4, widths=(2, 4), rotated=True),
            "down": quantize(jnp.asarray(W[0]), 1, group_size=32),
        }

    calls = []
    made, again = (keeping(tmp_path / "made")("some", make) for _ in range(2))
    assert len(calls) == 1
    assert jax.tree.structure(made) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, made, again)
    keeping(tmp_path / "made")("others", make)
    assert len(calls) == 2


def test_folders(tmp_path):
    work, identity = Work.of(tmp_path / "out"), {"bits": (1, 2)}
    work.prepare(identity, resume=True)
    work.record(0).touch()
    assert work.is_of(identity) and not work.is_of({"bits": (1,)})
    work.prepare(identity, resume=True)
    assert work.record(0).exists()
    with pytest.raises(ValueError, match="another model, text or options"):
        work.prepare({"bits": (1,)}, resume=True)
    work.prepare({"bits": (1,)}, resume=False)
    assert not work.record(0).exists()
    work.record(0).touch()
    work.identity.unlink()  # a run was killed as it cleared up
    work.prepare(identity, resume=True)
    assert not work.record(0).exists()
    work.clear()
    assert not list(tmp_path.iterdir())
