"""What breaks at random: files that are read, and runs that are killed.

Readers answer damage with a clear error or with what was there; a killed run that goes on ends with
what an unbroken one writes. `uv run pytest -m slow tests/test_faults.py` does it a thousand times.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_train import RECIPE, TRAIN
from tokenizers import ByteLevelBPETokenizer

import mcjax
from mcjax import bench, checkpoint
from mcjax.hub import Folder, write
from mcjax.models import weights
from mcjax.models.families import describe

few = pytest.param(30, id="few")
SECONDS = 20
"""Longer than any reading of so small a model takes: it hangs."""


def damaged(content, rng):
    """A file's bytes with one thing wrong."""
    content = bytearray(content)
    at = int(rng.integers(max(1, len(content))))
    match rng.integers(5):
        case 0:
            content[at : at + 1] = [content[at] ^ (1 << int(rng.integers(8)))] if content else [1]
        case 1:
            run = content[at : at + 1 + int(rng.integers(64))]
            content[at : at + len(run)] = rng.bytes(len(run))
        case 2:
            del content[at:]
        case 3:
            content[at : at + 1 + int(rng.integers(4096))] = b""
        case 4:
            content += rng.bytes(1 + int(rng.integers(64)))
    return bytes(content)


def survives(folder, files, read, rng, damage, tally):
    """Damages one file, a large one more often than a small, reads, and puts it back."""
    sizes = np.array([file.stat().st_size for file in files], float)
    file = files[rng.choice(len(files), p=sizes / sizes.sum() if rng.random() < 0.5 else None)]
    before = file.read_bytes()
    if rng.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(damage(before, rng))
    start = time.monotonic()
    try:
        same = read()
    except (ValueError, OSError) as error:
        assert str(error).strip(), file
        assert len(str(error)) < 2000, error
        tally["refused"] += 1
    else:
        assert same, f"another result, in silence: {file.relative_to(folder)}"
        tally["the same"] += 1
    finally:
        file.write_bytes(before)
    assert time.monotonic() - start < SECONDS


def equal(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


@pytest.mark.parametrize("times", [few, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_artifact(artifact, tmp_path, times):
    """Whichever of its own files it is; what it takes over from the model's folder is not its."""
    folder = tmp_path / "artifact"
    shutil.copytree(artifact, folder)
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("token"))
    options = [{"bits": 3}, {"bits": 1}, {"budget": 2.0, "prune": "affine"}]
    expected = [mcjax.load(artifact, **each) for each in options]
    rng, tally = np.random.default_rng(times), {"refused": 0, "the same": 0}

    for n in range(times):

        def read(n=n):
            model = mcjax.load(folder, **options[n % 3])
            wanted = expected[n % 3]
            return model.module == wanted.module and equal(model.params, wanted.params)

        survives(folder, files, read, rng, damaged, tally)
    print(tally)
    assert tally["refused"] > times / 10, tally


@pytest.mark.parametrize("times", [few, pytest.param(300, marks=pytest.mark.slow)])
def test_a_damaged_folder(model_folder, tmp_path, times):
    """Where damage can be seen: not a weight's own bytes, nor a digit of config.json."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]
    expected = Folder(model_folder).read()

    def damage(content, rng):
        if content.startswith(b"{") and rng.random() < 0.5:
            values = json.loads(content)
            key = sorted(values)[int(rng.integers(len(values)))]
            values |= {key: [None, "x", -1, [], {}][int(rng.integers(5))]}
            if rng.random() < 0.5:
                del values[key]
            return json.dumps(values).encode()
        if content.startswith(b"{"):
            at = int(rng.integers(len(content)))
            cut = content[:at] + bytes([int(rng.integers(8))]) * int(rng.integers(1, 9))
            return cut + (content[at + 8 :] if rng.random() < 0.5 else b"")
        header = 8 + int.from_bytes(content[:8], "little")
        made = damaged(content[:header], rng)
        return made + content[header:] if rng.random() < 0.7 else damaged_end(content, header, rng)

    rng, tally = np.random.default_rng(times), {"refused": 0, "the same": 0}
    for _ in range(times):
        survives(folder, files, lambda: equal(Folder(folder).read(), expected), rng, damage, tally)
    print(tally)
    assert tally["refused"] > times / 10, tally


def damaged_end(content, header, rng):
    """Weights that are too few or too many bytes."""
    if rng.random() < 0.5:
        return content[: int(rng.integers(header, len(content)))]
    return content + rng.bytes(1 + int(rng.integers(64)))


COMMAND = ("--calibration", "{text}", "--samples", "8", "--seq-len", "64", "--max-bits", "2")


def command(folder, text, out, *more):
    options = [each.format(text=text) for each in COMMAND]
    script = (
        "from mcjax import cli, schedule; schedule.STEPS = {1: 4, 2: 4}; schedule.MIXED_STEPS = 4; "
        "schedule.MOST_TIMES = 1; import sys; sys.argv[0] = 'mcjax'; cli.program()"
    )
    return [sys.executable, "-c", script, "compress", folder, out, *options, *more]


def environment():
    """That of this test, whose fixtures may say how to compile."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def run_killed(arguments, seconds):
    """Runs a command and kills it after so long; whether it ended by itself."""
    process = subprocess.Popen(
        list(map(str, arguments)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    assert process.returncode == 0, said[-2000:]
    return True


def lived(arguments, sign):
    """Runs a command to its end: seconds until a file says that it works, and in all."""
    start, begun = time.monotonic(), None
    process = subprocess.Popen(
        list(map(str, arguments)), stderr=subprocess.PIPE, text=True, env=environment()
    )
    while process.poll() is None:
        if begun is None and sign.exists():
            begun = time.monotonic() - start
        time.sleep(0.01)
    assert process.returncode == 0, process.stderr.read()[-2000:]
    return begun, time.monotonic() - start


KILLS = 20


def broken_runs(arguments, folder, begun, life):
    """Runs a command to its end in several lives, as often as it takes for so many kills.

    Args:
      arguments: from where to write to the command.
      folder: where these places are.
      begun: seconds after which it works.
      life: the least and the most of it in seconds from then on.

    Yields:
      Each of the places, once the command has ended there by itself.
    """
    rng, kills = np.random.default_rng(0), 0
    for n in range(KILLS):
        out = folder / f"broken_{n}"
        while not run_killed(arguments(out), begun + rng.uniform(*life)):
            kills += 1
            assert kills < 5 * KILLS, "it makes no progress"
        yield out
        if kills >= KILLS:
            print(f"killed {kills} times in {n + 1} runs, after {begun:.0f} seconds and {life}")
            return
    raise AssertionError(f"{KILLS} runs were killed {kills} times")


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["normal", "best"])
def test_killed_at_random(model_folder, text_file, tmp_path, effort):
    """Again and again, anywhere in quantising, measuring, tuning and saving.

    A life is long enough for a layer: what is left of one is made again.
    """

    def arguments(out, *more):
        return command(model_folder, text_file, out, "--effort", effort, *more)

    def again(out):
        return arguments(out, "--resume")

    for name in ("compiled", "whole"):  # the second finds its programs, as those after it do
        sign = tmp_path / f".{name}.work" / "identity.json"
        begun, whole = lived(arguments(tmp_path / name), sign)
    expected, some = checkpoint.ArtifactReader(tmp_path / "whole"), whole - begun
    for out in broken_runs(again, tmp_path, begun, (0.05 * some, 0.6 * some)):
        got = checkpoint.ArtifactReader(out)
        assert got.manifest == expected.manifest
        checkpoint.verify(got)
        assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_training_killed_at_random(text_file, tmp_path):
    """At any step and while checkpoints are written; the parameters are the same to the bit."""
    config = tmp_path / "config.py"
    recipe = dataclasses.replace(RECIPE, steps=60, save_every=1, evaluate_every=60)
    config.write_text(
        f"from recipe import LanguageRecipe\nrecipe = LanguageRecipe(**{vars(recipe)})\n"
    )

    def arguments(out, *more):
        options = {"--config": config, "--text": text_file, "--out": out}
        each = [value for option in options.items() for value in option]
        return [sys.executable, TRAIN / "moe_lm.py", *each, *more]

    def again(out):
        return arguments(out, "--resume")

    for name in ("compiled", "whole"):  # the second finds its programs, as those after it do
        begun, whole = lived(arguments(tmp_path / name), tmp_path / name / "recipe.json")
    expected, places = Folder(tmp_path / "whole" / "model").read(), {"compiled", "whole"}
    for out in broken_runs(again, tmp_path, begun, (0, 0.4 * (whole - begun))):
        assert equal(Folder(out / "model").read(), expected)
        places.add(out.name)
        assert {path.name for path in tmp_path.iterdir()} == {*places, "config.py"}


@pytest.mark.slow
def test_large_layers_get_done_between_kills(text_file, tmp_path):
    """The model that `mcjax bench` decodes, 195 million parameters, killed every 20 seconds."""
    folder, out = tmp_path / "model", tmp_path / "out"
    config = bench.MOE
    params = weights.init(describe(config)[1], jax.random.key(0))
    folder.mkdir()
    write(folder, config, params)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text_file)], vocab_size=300, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = ("--calibration", text_file, "--samples", 8, "--seq-len", 128, "--max-bits", 4)
    command = [sys.executable, "-c", "from mcjax import cli; cli.program()", "compress"]
    kills = 0  # in 20 seconds two cores begin and finish several weights
    while not run_killed([*command, folder, out, *options, "--resume"], 20):
        kills += 1
        print(f"kill {kills}: {len(list((tmp_path / '.out.work').glob('layer_*')))} layers")
        assert kills < 60, "it makes no progress"
    assert kills
    checkpoint.verify(checkpoint.ArtifactReader(out))
    assert not list(tmp_path.glob(".*"))
