"""Tables tuned for one budget: on a mesh as on one device, and written as an artifact."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import loop
import numpy as np
import pytest
import tune_lm

import mcjax
from mcjax import checkpoint
from mcjax.models import weights

LOSSES = """
import json, sys
from pathlib import Path
import jax, numpy as np, loop, tune_lm
from mcjax import tune
from mcjax.hub import Folder
mesh = loop.device_mesh(loop.mesh_sizes(sys.argv[3]))
run = tune_lm.begun(Folder(sys.argv[1]), Path(sys.argv[2]), {"budget": 2.25}, mesh, 10, 4, 3.0)
state, tokens = run.state, np.random.default_rng(0).integers(0, 300, (10, 16)).astype(np.int32)
tokens = loop.global_batch(mesh, tokens.shape, lambda i: tokens[i], run.rows)
with jax.set_mesh(mesh):
    for _ in range(4):
        state, metrics = run.step(state, tokens)
        print("divergence", float(metrics["divergence"]))
tune.save(run.model, {"tables": state.params, "others": {}}, sys.argv[4], {"steps": 4})
if mesh.size > 1:
    for leaf, own in zip(jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(own, leaf.ndim), (leaf.shape, leaf.sharding, own)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    experts = [leaf for path, leaf in leaves if "experts" in jax.tree_util.keystr(path)]
    total, mine = (
        sum(size(a) for a in experts)
        for size in (lambda a: a.nbytes, lambda a: a.addressable_shards[0].data.nbytes)
    )
    assert len(experts) > 9 and mine < total / 4, (mine, total)
    text = jax.jit(run.step).lower(state, tokens).compile().as_text()
    assert "all-to-all" in text
    for line in text.splitlines():
        assert "all-gather" not in line or " u32[" not in line.split("metadata")[0], line
"""


@pytest.mark.slow
def test_many_devices_equal_one(model_folder, artifact, tmp_path):
    """Tables and moments of experts lie with their planes; what is written is the same."""
    found, made = [], []
    for mesh in ("data=1", "expert=5,model=2"):
        count = 10 if "expert" in mesh else 1
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        paths, out = str(Path(tune_lm.__file__).parent), tmp_path / mesh
        run = subprocess.run(
            [sys.executable, "-c", LOSSES, *map(str, (model_folder, artifact, mesh, out))],
            capture_output=True,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        lines = [line.split() for line in run.stdout.splitlines()]
        found.append([float(line[1]) for line in lines if line[0] == "divergence"])
        made.append(mcjax.load(out, budget=2.25))
    assert found[0][-1] < 0.97 * found[0][0]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3)
    before = mcjax.load(artifact, budget=2.25)
    tokens = np.random.default_rng(1).integers(0, 300, (4, 16))
    one, many, untuned = (np.asarray(model(tokens)) for model in (*made, before))
    assert np.abs(one - untuned).max() > 10 * np.quantile(np.abs(one - many), 0.9)
    (member,), moved = weights.members(before.module.decoder), 0
    for path in (member.path + role.path for role in weights.roles(member.layer, 96) if role.tap):
        planes = [weights.get(model.params, path) for model in (*made, before)]
        stacks = [getattr(p, "stacks", (p,)) for p in planes]
        for of_one, of_many, of_before in zip(*stacks, strict=True):
            np.testing.assert_array_equal(of_one.planes, of_before.planes)
            moved += (of_one.tables[-1] != of_before.tables[-1]).sum()
            apart = np.abs(of_one.tables[-1].astype(int) - of_many.tables[-1])
            assert apart.mean() < 0.05
    assert moved > 1000


@pytest.fixture(scope="module")
def tuned(model_folder, artifact, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    arguments = [str(model_folder), str(artifact), str(out), "--text", str(text_file)]
    arguments += ["--seq-len", "32", "--batch-size", "4", "--steps", "6"]
    row = tune_lm.FileCorpus.row

    def stopped(self, seed, step, i):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return row(self, seed, step, i)

    command = ["tune_lm", *arguments, "--budget", "1.5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(tune_lm.FileCorpus, "row", stopped)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 4"):
            tune_lm.main()
        assert not out.exists()
        patch.setattr(tune_lm.FileCorpus, "row", row)
        patch.setattr(sys, "argv", [*command, "--resume"])
        tune_lm.main()
    return out, arguments


def test_ends_as_an_artifact(tuned, artifact, model_folder):
    """What is read at other widths is what it was."""
    out, _ = tuned
    reader = checkpoint.ArtifactReader(out)
    checkpoint.verify(reader)
    (told,) = reader.manifest["tuned"]
    assert told["budget"] == "1.5"
    tokens = np.random.default_rng(1).integers(0, 300, (4, 16))
    for precision, same in (({"bits": 3}, True), ({"budget": 1.5}, False)):
        pair = [mcjax.load(path, **precision, attention_bits=8) for path in (out, artifact)]
        assert pair[0].bytes_read == pair[1].bytes_read
        assert np.array_equal(*(model(tokens) for model in pair)) == same
    rows = (out.with_name("out.run") / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,divergence") and rows[-1].startswith("6,")


def test_tables_lie_as_experts_do():
    """A run goes on where as many devices share experts, who stand in another order else."""
    device = jax.devices()[0]

    def sharing(**axes):
        devices = np.full(tuple(axes.values()), device, object)
        return tune_lm._sharing(jax.sharding.Mesh(devices, tuple(axes)))

    assert sharing(data=1, expert=1) is None and sharing(data=4) is None
    assert sharing(data=2, expert=2) == 2 and sharing(expert=4, model=2) == 4


def test_bad_input(tuned, model_folder, capsys, tmp_path, monkeypatch):
    out, arguments = tuned

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["tune_lm", *map(str, arguments)])
        with pytest.raises(SystemExit):
            loop.program(tune_lm.main, "tune_lm")
        error = capsys.readouterr().err
        assert error.startswith("tune_lm: error: ") and error.count("\n") == 1
        return error

    fresh = [*arguments[:2], tmp_path / "new", *arguments[3:]]
    assert "out exists" in run(*arguments, "--budget", "1.5")
    moved = out.rename(out.with_name("moved"))
    assert "go on with --resume" in run(*arguments, "--budget", "1.5")
    assert "with steps 6, not 7" in run(*arguments, "--budget", "1.5", "--resume", "--steps", "7")
    moved.rename(out)
    assert "--steps must be at least 2" in run(*fresh, "--budget", "1.5", "--steps", "1")
    assert "64 positions" in run(*fresh, "--budget", "1.5", "--seq-len", "65")
    assert "--budget or --bits" in run(*fresh)
    assert "--budget or --bits" in run(*fresh, "--budget", "1.5", "--bits", "1")
    assert "budget" in run(*fresh, "--budget", "0.2")
    assert "manifest.json" in run(fresh[0], model_folder, *fresh[2:], "--budget", "1.5")
    assert "at least 1, got 0" in run(*fresh, "--budget", "1.5", "--batch-size", "0")
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    file = other / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1  # the first weight's first byte
    file.write_bytes(content)
    assert "was made of another model than" in run(other, *fresh[1:], "--budget", "1.5")
    assert not list(tmp_path.glob("new*"))
