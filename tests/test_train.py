"""The language-model recipe: resuming equals not stopping, devices share a batch."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import loop
import moe_lm
import numpy as np
import pytest
from recipe import LanguageRecipe
from small_models import small_config

from mcjax.evaluate import evaluate
from mcjax.hub import Folder
from mcjax.models.language_model import LanguageModel

TRAIN = Path(__file__).parent.parent / "train"
RECIPE = LanguageRecipe(
    model={
        "model_type": "mixtral",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    },
    held_out=0.1,
    seq_len=16,
    batch_size=4,
    steps=6,
    warmup=2,
    save_every=2,
    log_every=2,
    evaluate_every=4,
)


def weights(out):
    return Folder(out / "model").read()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("trained") / "run"
    moe_lm.train(RECIPE, out, text=[str(text_file)])
    return out


def test_exports_what_it_trained(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"model", "held_out.txt", "metrics.csv", "loss.png", "checkpoints"} <= names
    head, *rows = [row.split(",") for row in (trained / "metrics.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["2", "4", "6"]
    first, last = (dict(zip(head, row, strict=True)) for row in (rows[0], rows[-1]))
    facts = evaluate(trained / "model", trained / "held_out.txt", seq_len=16)
    assert facts["perplexity"] < 0.9 * np.exp(float(first["loss"]))
    np.testing.assert_allclose(facts["perplexity"], float(last["perplexity"]), rtol=0.01)


@pytest.mark.parametrize("how", ["crash", "signal"])
def test_resuming_equals_not_stopping(trained, tmp_path, text_file, monkeypatch, how):
    out = tmp_path / "run"
    row = moe_lm.FileCorpus.row

    def interrupted(self, seed, step, i):
        if step == 3:
            if how == "crash":
                raise RuntimeError("power cut")
            os.kill(os.getpid(), signal.SIGTERM)
        return row(self, seed, step, i)

    monkeypatch.setattr(moe_lm.FileCorpus, "row", interrupted)
    with pytest.raises((RuntimeError, KeyboardInterrupt), match=r"power cut|stopped at step 4"):
        moe_lm.train(RECIPE, out, text=[str(text_file)])
    assert not (out / "model").exists()
    monkeypatch.undo()
    moe_lm.train(RECIPE, out, text=[str(text_file)], resume=True)
    same(weights(out), weights(trained))
    columns = [
        [line.split(",")[:3] for line in (run / "metrics.csv").read_text().splitlines()]
        for run in (out, trained)
    ]
    assert columns[0][-1] == columns[1][-1]


STEPS = """
import sys, jax, optax, numpy as np, test_train as t, moe_lm, loop
from jax.sharding import AxisType
from mcjax import sharding
def steps(sizes, accumulation=1, count=3):
    recipe = t.dataclasses.replace(t.RECIPE, batch_size=8, accumulation=accumulation)
    some, types = jax.devices()[:np.prod(list(sizes.values()))], (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=some)
    shared = sharding.resolve(mesh, fully=True) if mesh.size > 1 else None
    module = moe_lm.LanguageModel(recipe.decoder, shared=shared)
    optimiser = loop.adamw(learning_rate=1e-2, warmup=0, steps=9, weight_decay=0.1, clip=1.0)
    state, where = moe_lm.begun(recipe, module, optimiser)
    def loss(params):  # of as many sequences as no axis shares out
        tokens = np.arange(3 * 17, dtype=np.int32).reshape(3, 17)
        entropy, balance, z, _ = moe_lm.losses(module, params, tokens)
        return entropy, (balance, z)
    few, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    print(few[1][0], optax.global_norm(gradient), 0, few[0], few[1][1])
    step = moe_lm.make_step(module, recipe, optimiser)
    axes = ("data",) if shared is None else shared.batch
    for n in range(count):
        tokens = np.random.default_rng(n).integers(0, 300, (8, 17)).astype(np.int32)
        batch = loop.global_batch(mesh, tokens.shape, lambda i: tokens[i], axes)
        assert len({repr(s.index) for s in batch.addressable_shards}) == mesh.size or shared.out
        state, metrics = step(state, batch)
        print(*(float(metrics[k]) for k in sorted(metrics)))
    return state, where
"""


def test_many_devices_equal_one():
    """The same steps to float tolerance, of parameters and moments that are cut into parts."""
    check = """
state, where = steps({"data": 2, "expert": 2, "model": 2}, accumulation=2)
for leaf, own in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
    assert leaf.sharding.is_equivalent_to(own, leaf.ndim), (leaf.shape, leaf.sharding, own)
total = sum(a.nbytes for a in jax.tree.leaves(state))
mine = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
assert mine < total / 5, (mine, total)
"""
    program = f"{STEPS}steps({{'data': 1}}){check}steps({{'data': 4}})"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = os.pathsep.join([str(TRAIN), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [[float(x) for x in line.split()] for line in run.stdout.splitlines()]
    found = lines[:4], lines[4:8], lines[8:]
    np.testing.assert_allclose(found[0], found[2], rtol=1e-3)
    # Balance is a product of means, and parts of a batch have their own; the loss has not.
    names = sorted(("loss", "balance", "z", "least_used", "gradient_norm"))
    loss, z = names.index("loss"), names.index("z")
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    for at in (loss, z):
        np.testing.assert_allclose(np.array(found[0])[:, at], np.array(found[1])[:, at], rtol=2e-3)


RESUMED = """
import sys, test_train as t, loop, moe_lm
out, text, mesh, stop = sys.argv[1:]
row = moe_lm.FileCorpus.row
def crash(self, seed, step, i):
    if step == int(stop):
        raise RuntimeError("power cut")
    return row(self, seed, step, i)
moe_lm.FileCorpus.row = crash
recipe = t.dataclasses.replace(t.RECIPE, steps=22, log_every=1, evaluate_every=22)
sizes = loop.mesh_sizes(mesh)
moe_lm.train(recipe, t.Path(out), text=[text], resume=True, mesh=sizes)
"""


@pytest.mark.slow
def test_a_state_goes_on_under_any_mesh(tmp_path, text_file):
    """Twenty steps from one checkpoint, on three meshes."""

    def run(out, mesh, stop=-1):
        devices = np.prod(list(loop.mesh_sizes(mesh).values()))
        flags = f"--xla_force_host_platform_device_count={devices}"
        paths = os.pathsep.join([str(TRAIN), str(Path(__file__).parent)])
        return subprocess.run(
            [sys.executable, "-c", RESUMED, str(out), str(text_file), mesh, str(stop)],
            capture_output=True,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
        )

    first, losses = tmp_path / "first", {}
    assert "power cut" in run(first, "data=2,expert=2", stop=2).stderr
    assert os.listdir(first / "checkpoints") == ["2"]
    for mesh in ("data=2,expert=2", "data=4", "data=1,expert=2,model=2"):
        shutil.copytree(first, tmp_path / mesh)
        done = run(tmp_path / mesh, mesh)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / mesh / "metrics.csv").read_text().splitlines()
        at = lines[0].split(",").index("loss")
        losses[mesh] = [float(line.split(",")[at]) for line in lines[1:]]
        assert len(losses[mesh]) == 22
    same, *others = losses.values()
    for other in others:
        np.testing.assert_allclose(other, same, rtol=2e-3)


def test_losses_by_hand():
    """Balance is 1 when the router is even, E / k when every token takes the same k experts."""
    module = LanguageModel(RECIPE.decoder)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 17))
    params = module.init(jax.random.key(0), tokens)["params"]
    even = jax.tree.map(jnp.zeros_like, params)
    _, balance, z, _ = moe_lm.losses(module, even, tokens)
    np.testing.assert_allclose([balance, z], [1.0, np.log(4) ** 2], rtol=1e-5)
    entropy, *_ = moe_lm.losses(module, even, tokens)
    np.testing.assert_allclose(entropy, np.log(300), rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v32",
        "lfm2_moe",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3_moe", "deepseek_v3", "llama4")),
    ],
)
def test_trains_other_families(name, tmp_path, text_file):
    config = small_config(name) | {"vocab_size": 300}
    recipe = dataclasses.replace(RECIPE, model=config, steps=3)
    last = moe_lm.train(recipe, tmp_path / "run", text=[str(text_file)])
    assert weights(tmp_path / "run")["embedding"].shape == (300, 28)
    facts = evaluate(tmp_path / "run" / "model", tmp_path / "run" / "held_out.txt", seq_len=16)
    np.testing.assert_allclose(facts["perplexity"], last["perplexity"], rtol=0.01)


def test_trains_on_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=60):
        recipe = dataclasses.replace(RECIPE, steps=2)
        moe_lm.train(recipe, tmp_path / "run", text=["tfds:lm1b"])
    assert weights(tmp_path / "run")["embedding"].shape == (300, 32)


def test_configs_are_sound():
    for path in sorted((TRAIN / "configs").glob("moe_*.py")):
        recipe = loop.load_recipe(path, LanguageRecipe)
        assert json_round_trip(recipe)
        for text in recipe.text:
            assert text.startswith("tfds:") or (path.parent / text).is_file()


def json_round_trip(recipe):
    import json

    return json.loads(json.dumps(recipe.to_dict()))["steps"] == recipe.steps


def test_bad_input(tmp_path, text_file, trained, capsys, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_text("one line")
    few = tmp_path / "few.txt"
    few.write_text("word " * 100)
    config = tmp_path / "config.py"
    config.write_text("recipe = 3")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_like_it")
    minutes = TRAIN / "configs" / "moe_minutes.py"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moe_lm", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            loop.program(moe_lm.main, "moe_lm")
        assert status.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("moe_lm: error: ") and error.count("\n") == 1
        return error

    out = ("--out", tmp_path / "new")
    assert "too short" in run("--config", minutes, *out, "--text", short)
    assert "fewer than one" in run("--config", minutes, *out, "--text", few)
    assert "cannot read the text" in run("--config", minutes, *out, "--text", tmp_path / "none")
    assert "must define `recipe`" in run("--config", config, *out)
    assert "nothing_like_it" in run("--config", broken, *out)
    assert "exists" in run("--config", minutes, "--out", trained, "--text", text_file)
    assert "was trained with" in run("--config", minutes, "--out", trained, "--resume")
    assert "cannot open tfds:no_such" in run("--config", minutes, *out, "--text", "tfds:no_such")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.text").exists()
    for wrong, message in (
        ({"seq_len": 64}, "seq_len 64 exceeds"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(RECIPE, **wrong)


@pytest.mark.slow
def test_one_process_of_two_is_stopped(tmp_path, text_file):
    """Both save and end; one process with one device goes on as if it had run from the first."""
    config = tmp_path / "config.py"
    recipe = dataclasses.replace(RECIPE, steps=150, save_every=1000, evaluate_every=150)
    made = f"from recipe import LanguageRecipe\nrecipe = LanguageRecipe(**{vars(recipe)})\n"
    config.write_text(made)

    def start(out, *more, devices=1):
        command = [sys.executable, str(TRAIN / "moe_lm.py"), "--config", str(config)]
        command += ["--out", str(out), "--text", str(text_file), *map(str, more)]
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**os.environ, **flags}, **pipe)

    def losses(out):
        lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
        step, loss = (lines[0].index(name) for name in ("step", "loss"))
        return {int(line[step]): float(line[loss]) for line in lines[1:]}

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    common = ["--coordinator", f"localhost:{port}", "--processes", 2, "--mesh", "data=2,expert=2"]
    pair = [start(out, *common, "--process", n, devices=2) for n in range(2)]
    for _ in range(600):
        if (out / "metrics.csv").exists() and len(losses(out)) > 2:
            break
        time.sleep(0.2)
    pair[1].terminate()
    said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [130, 130], said
    (saved,) = map(int, os.listdir(out / "checkpoints"))
    assert all(f"stopped at step {saved}" in words for words in said)

    alone = tmp_path / "alone"
    for process in (start(out, "--resume"), start(alone)):
        words = process.communicate(timeout=300)[0]
        assert process.returncode == 0, words
    last = [losses(run) for run in (out, alone)]
    assert saved < 150 and last[0] == pytest.approx(last[1], rel=0.02)
