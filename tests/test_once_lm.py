"""Once-QAT of experts: starts where the artifact is, ends as an artifact like any other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import loop
import numpy as np
import once_lm
import pytest
from small_models import small_model, with_tokenizer

import mcjax
from mcjax import checkpoint
from mcjax.compress import compress
from mcjax.evaluate import evaluate
from mcjax.hub import Folder
from mcjax.models.language_model import LanguageModel


def test_starts_as_the_artifact(model_folder, artifact):
    """At the widest width the model is nearly the artifact's; narrower ones are close to it.

    A code that serves the narrower widths better may stand for a value beside (1 % in norm), and
    with that much a token of this random model may meet another expert.
    """
    folder = Folder(model_folder)
    trained, kept, specs = once_lm.start(artifact, folder.read(np.float32))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 16))
    module = LanguageModel(folder.decoder)
    for bits, most in ((3, 0.05), (2, 0.3), (1, 0.5)):
        params = once_lm.served_at(trained, kept, specs, bits)
        got = module.apply({"params": params}, tokens)
        expected = mcjax.load(artifact, bits=bits)(tokens)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < most


@pytest.fixture(scope="module")
def improved(model_folder, artifact, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("once") / "out"
    common = ["--text", str(text_file), "--calibration", str(text_file), "--seq-len", "32"]
    arguments = [str(model_folder), str(artifact), str(out), *common]
    sys.argv = ["once_lm", *arguments, "--steps", "12", "--learning-rate", "1e-3"]
    once_lm.main()
    return out, arguments


def test_ends_as_an_artifact(improved, artifact, text_file):
    out, _ = improved
    common = dict(seq_len=32, max_tokens=1280)
    for precision in ({"bits": 1}, {"budget": 2.5}, {"budget": 2.5, "prune": "affine"}):
        before = evaluate(artifact, text_file, **precision, **common)
        after = evaluate(out, text_file, **precision, **common)
        assert after["bytes_read"] == before["bytes_read"]
        assert after["effective_bits"] == before["effective_bits"]
        assert after["perplexity"] < before["perplexity"]
    layers = [checkpoint.read_manifest(path)["statistics"] for path in (out, artifact)]
    assert layers[0]["frequency"] == layers[1]["frequency"]  # the same model, calibrated alike
    assert layers[0]["error"] != layers[1]["error"]


LOSSES = """
import sys
from pathlib import Path
import jax, numpy as np, loop, once_lm
from mcjax.hub import Folder
mesh = loop.device_mesh(loop.mesh_sizes(sys.argv[3]))
optimiser = loop.adamw(learning_rate=1e-2, warmup=1, steps=9, weight_decay=0.0, clip=3.0)
run = once_lm.begun(Folder(sys.argv[1]), Path(sys.argv[2]), mesh, optimiser, 10, 0.7)
state, tokens = run.state, np.random.default_rng(0).integers(0, 300, (10, 17)).astype(np.int32)
tokens = loop.global_batch(mesh, tokens.shape, lambda i: tokens[i], run.rows)
with jax.set_mesh(mesh):
    for _ in range(3):
        state, metrics = run.step(state, tokens)
        print(*map(float, jax.tree.leaves(metrics)))
if mesh.size > 1:
    for leaf, own in zip(jax.tree.leaves(state), jax.tree.leaves(run.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(own, leaf.ndim), (leaf.shape, leaf.sharding, own)
    total, mine = (
        sum(size(leaf["w"]) for leaf in state.params.values())
        for size in (lambda a: a.nbytes, lambda a: a.addressable_shards[0].data.nbytes)
    )
    assert mine < total / (0.6 * mesh.size), (mine, total)  # tables are not
"""


def losses_on_meshes(model_folder, artifact, mesh, count):
    """Those of three steps, on one device and on a mesh of so many."""
    found = []
    for axes, devices in (("data=1", 1), (mesh, count)):
        paths = str(Path(once_lm.__file__).parent)
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        run = subprocess.run(
            [sys.executable, "-c", LOSSES, str(model_folder), str(artifact), axes],
            capture_output=True,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found.append([[float(x) for x in line.split()] for line in run.stdout.splitlines()])
    assert found[0][2] != found[0][0]
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3)


def test_many_devices_equal_one(model_folder, artifact):
    """Weights that train, their moments and the teacher are cut along data and expert."""
    losses_on_meshes(model_folder, artifact, "data=2,expert=5", 10)


@pytest.mark.slow
def test_a_dense_model_on_a_mesh(tmp_path, text_file):
    """Its networks are cut along an axis for experts too, of which it has none."""
    folder = with_tokenizer(small_model(tmp_path / "model", "llama", vocab_size=300), text_file)
    compress(folder, tmp_path / "out", text_file, max_bits=2, samples=8, seq_len=16, effort="fast")
    losses_on_meshes(folder, tmp_path / "out", "data=1,expert=2", 2)


@pytest.mark.slow
def test_two_processes(improved, tmp_path):
    """The first writes the artifact, once both have trained."""
    _, arguments = improved
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["--steps", 2, "--mesh", "data=2", "--coordinator", f"localhost:{port}"]
    command = [sys.executable, once_lm.__file__, *arguments[:2], tmp_path / "out", *arguments[3:]]
    pair = [
        subprocess.Popen(
            list(map(str, [*command, *common, "--processes", 2, "--process", n])),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=500)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    checkpoint.verify(checkpoint.ArtifactReader(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run"}


def test_bad_input(improved, capsys, tmp_path):
    _, arguments = improved

    def run(*arguments):
        sys.argv = ["once_lm", *map(str, arguments)]
        with pytest.raises(SystemExit):
            loop.program(once_lm.main, "once_lm")
        error = capsys.readouterr().err
        assert error.startswith("once_lm: error: ") and error.count("\n") == 1
        return error

    assert "exists" in run(*arguments)
    short = tmp_path / "short.txt"
    short.write_text("bame kort")
    fresh = [arguments[0], arguments[1], tmp_path / "new", *arguments[3:]]
    fresh[fresh.index("--text") + 1] = short
    assert "fewer than one window" in run(*fresh)
    assert not list(tmp_path.glob("new*"))
