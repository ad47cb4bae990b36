"""What an interrupted run leaves: planes that are made once, and whose work it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mcjax import compress
from mcjax.job import prepare
from mcjax.quantize import quantize
from mcjax.work import Work, keeping, write_json

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


def test_planes_that_do_not_fit_are_refused_at_once(model_folder, text_file, tmp_path):
    rng, shapes = np.random.default_rng(0), {"gate": (96, 256), "up": (96, 256), "down": (256, 96)}
    made = {
        name: quantize(jnp.asarray(rng.normal(size=(5, *shape)), jnp.float32), 1, 32, rotated=True)
        for name, shape in shapes.items()
    }
    given = dict(experts=[made, made], max_bits=1, samples=2, seq_len=64)
    with pytest.raises(ValueError, match=r"gate has shape .* groups of 32 .* want .*, 96 and True"):
        compress.compress(model_folder, tmp_path / "out", text_file, **given)
    assert not list(tmp_path.iterdir())


def test_another_memory_is_another_amount_at_once(model_folder, text_file, tmp_path, monkeypatch):
    """A run goes on with as much at once as it began with, unless it is to keep to less."""
    asked = []

    def within(job, memory):
        asked.append(memory)
        return job._replace(batch_tokens=memory)

    monkeypatch.setattr(compress, "within", within)
    job, work = prepare(model_folder, text_file, seq_len=64), Work.of(tmp_path / "out")
    work.beside.mkdir()
    write_json(work.at_once, {"batch_tokens": 4})  # of an earlier version
    found = [compress._at_once(job, work, m).batch_tokens for m in (512, 512, 256)]
    assert found == [512, 512, 256] and asked == [512, 256]
