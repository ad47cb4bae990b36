"""The commands as a user types them: results on stdout, one clear line for bad input."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mcjax import checkpoint, cli, compress
from mcjax.job import prepare
from mcjax.notes import Note


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def options(model, out, text, *more):
    """As of `artifact`, whose programs are compiled then."""
    return ("compress", model, out, "--calibration", text, "--max-bits", 3, "--group-size",
            32, "--samples", 16, "--seq-len", 64, *more)  # fmt: skip


def refuse(capsys, message, *arguments):
    """The command fails with exactly one line that says `message`."""
    capsys.readouterr()
    assert run(*arguments) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and message in lines[0], captured.err


def test_import_is_light():
    heavy = "optax orbax tensorstore cvxpy safetensors tokenizers matplotlib tensorflow_datasets"
    code = f"import sys, mcjax; sys.exit(any(m in sys.modules for m in {heavy.split()!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out.split() == ["mcjax", metadata.version("mcjax")]


def test_compiled_programs_are_kept(model_folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path)}

    def generate(*more):
        return subprocess.run(
            [sys.executable, "-m", "mcjax.cli", "generate", model_folder, "--prompt", "bame",
             "--max-new-tokens", "1", *more],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip

    def kept():
        return {f.name for f in (tmp_path / "mcjax" / "compiled").glob("*prefill*-cache")}

    first = generate()
    assert kept() and first.stderr.count("\n") == 1
    before = kept()
    again = generate()
    assert kept() == before and again.stdout == first.stdout and again.stderr.count("\n") == 1


def test_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)

    def keep(choice=None):
        changed.clear()
        cli._keep_programs(choice)
        return changed.get("jax_compilation_cache_dir")

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "anywhere")
    assert keep() is None and not changed
    assert keep(str(tmp_path / "own")) == str(tmp_path / "own") and (tmp_path / "own").is_dir()
    assert keep("off") is None and changed == {"jax_enable_compilation_cache": False}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep() == str(tmp_path / "mcjax" / "compiled")
    assert changed["jax_persistent_cache_min_compile_time_secs"] <= 0.2
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert keep() == str(tmp_path / "home" / ".cache" / "mcjax" / "compiled")
    file = tmp_path / "file"
    file.touch()
    with pytest.warns(Note, match="not kept: cannot write to"):
        assert keep(str(file / "cache")) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert keep() is None


def test_eval_and_info(artifact, model_folder, text_file, capsys, tmp_path):
    common = ("--text", text_file, "--seq-len", 64, "--max-tokens", 1280, "--json")
    assert run("eval", model_folder, *common) == 0
    dense = json.loads(capsys.readouterr().out.splitlines()[-1])
    copy = tmp_path / "copy.mcjax"
    shutil.copytree(artifact, copy)
    facts = {}
    for precision in ("--bits", 3), ("--bits", 1), ("--budget", 2.5):
        assert run("eval", copy, *common, *precision) == 0
        facts[precision] = json.loads(capsys.readouterr().out.splitlines()[-1])
    three, one, budget = facts.values()
    assert dense["tokens"] == three["tokens"] == 20 * 63
    assert abs(three["perplexity"] / dense["perplexity"] - 1) < 0.05
    assert one["bytes_read"] < budget["bytes_read"] < three["bytes_read"] < dense["bytes_read"]
    # 2 layers, keys and values, 2 heads of 16, 64 tokens, float32.
    assert three["cache_bytes"] == dense["cache_bytes"] == 2 * 2 * 2 * 16 * 64 * 4
    assert three["effective_bits"] == 4 and dense["effective_bits"] == 16
    assert budget["average_bits"] <= 2.5 and budget["experts_pruned"] == 0
    assert three["tokens_per_second"] > 0
    for more in ((), ("--budget", 2), ("--budget", "400kB")):
        plot = tmp_path / "plot.png"
        assert run("info", copy, "--plot", plot, "--json", *more) == 0
        assert plot.read_bytes()[:4] == b"\x89PNG"
        info = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(info["measured"]) == 3 and [1, 3, 0] in info["rare_experts"]
        assert info["cache_bytes"] == 64 * three["cache_bytes"]  # of 4,096 tokens
    assert info["expert_bytes"]["3"] == 4 * 2 * 5 * 3 * 96 * 256 / 8
    assert run("info", copy, "--budget", "400kB") == 0
    printed = capsys.readouterr().out
    assert "layer 1 mixer_output" in printed and "predicted loss" in printed
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_bad_models(model_folder, text_file, tmp_path, capsys):
    def damaged(change):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model_folder, folder)
        change(folder)
        return folder

    def weights(change):
        def apply(folder):
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")

        return apply

    def config(**changes):
        def apply(folder):
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return apply

    def index(name):
        return lambda folder: (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": name}})
        )

    def cut(folder):
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def pickled(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def poison(value):
        name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

        def apply(tensors):
            tensors[name] = tensors[name].copy()
            tensors[name][3, 4] = value

        return weights(apply)

    cases = [
        (lambda f: (f / "model.safetensors").unlink(), "holds no *.safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "not a readable"),
        (cut, "not a readable"),
        (pickled, "pickled weights"),
        (index("../x.safetensors"), "outside the folder"),
        (index("/etc/x.safetensors"), "outside the folder"),
        (index("gone.safetensors"), "shard gone.safetensors is missing"),
        (lambda f: (f / "model.safetensors.index.json").write_text("["), "not valid JSON"),
        (weights(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
        (poison(np.nan), "1 NaN or infinite"),
        (poison(np.inf), "1 NaN or infinite"),
        (config(model_type="gpt2"), "'gpt2' is not supported"),
        (config(hidden_size="96"), "hidden_size"),
        (config(hidden_size=128), "config.json implies"),
        (config(vocab_size=100), "tokenizer does not belong"),
    ]
    out = tmp_path / "out.mcjax"
    for change, message in cases:
        refuse(capsys, message, *options(damaged(change), out, text_file))
        assert [p.name for p in tmp_path.iterdir()] == ["model"], message
    refuse(capsys, "is not a folder", *options(tmp_path / "nowhere", out, text_file))


def test_bad_options(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out.mcjax"
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("bame")
    binary.write_bytes(b"caf\xe9 " * 999)
    for message, text, more in [
        ("groups of 64", text_file, ("--group-size", 64)),
        ("groups of 33", text_file, ("--group-size", 33)),
        ("number or auto", text_file, ("--group-size", "big")),
        ("--max-bits must be 1 to 8, got 9", text_file, ("--max-bits", 9)),
        ("--samples must be at least 1", text_file, ("--samples", 0)),
        (
            "--effort must be one of fast, normal, thorough, best, got 'finest'",
            text_file,
            ("--effort", "finest"),
        ),
        ("--memory must be a size such as 6GB, got '6'", text_file, ("--memory", 6)),
        ("--memory must be a size such as 6GB, got '6XB'", text_file, ("--memory", "6XB")),
        ("fewer than one window", short, ()),
        ("not UTF-8", binary, ()),
        ("No such file", tmp_path / "gone.txt", ()),
    ]:
        refuse(capsys, message, *options(model_folder, out, text, *more))
        assert not out.exists() and not list(tmp_path.glob(".*"))
    out.mkdir()
    refuse(capsys, "exists", *options(model_folder, out, text_file))
    with pytest.raises(SystemExit, match="2"):
        run("compress", "--nonsense")


def test_bad_artifacts(artifact, text_file, tmp_path, capsys):
    def damaged(change):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(artifact, folder)
        change(folder)
        return folder

    def edit(old, new):
        def apply(folder):
            path = folder / checkpoint.MANIFEST
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new, 1))

        return apply

    def largest(folder):
        files = (folder / "layers" / "1").rglob("d/*")
        return max(files, key=lambda f: f.stat().st_size)

    def flip(folder):
        path = largest(folder)
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[64::512] ^= 255  # everywhere, since one place may be a table that is not read
        path.write_bytes(data.tobytes())

    def truncate(folder):
        path = largest(folder)
        path.write_bytes(path.read_bytes()[:999])

    read = ("--text", text_file, "--seq-len", 64)
    for change, message in [
        (edit('"format_version":7', '"format_version":8'), "has format version 8"),
        (edit('"max_bits":3', '"max_bits":2'), "checksum does not match"),
        (flip, "is damaged"),
        (truncate, "is damaged"),
        (lambda f: largest(f).unlink(), "is damaged"),
        (lambda f: (f / checkpoint.MANIFEST).unlink(), "config.json is missing"),
    ]:
        refuse(capsys, message, "eval", damaged(change), *read)
    refuse(capsys, "is damaged", "info", damaged(flip), "--verify")
    assert run("info", artifact, "--verify") == 0
    for message, more in [
        ("not feasible", ("--budget", "nan")),
        ("widths (1, 2, 3) allow 1 to 3 bits", ("--budget", 0.5)),
        ("allow 1 to 3 bits", ("--budget", 3.5)),
        ("allow 1 to 3 bits", ("--budget", -1)),
        ("neither average bits", ("--budget", "4.2 bits")),
        ("1000 bytes is not feasible", ("--budget", "1kB")),
        ("bits 4 is not one of", ("--bits", 4)),
        ("less than one window", ("--max-tokens", 5)),
    ]:
        refuse(capsys, message, "eval", artifact, *read, *more)
    refuse(capsys, "not supported", "info", artifact, "--plot", tmp_path / "plot.nonsense")
    gone = tmp_path / "gone"
    refuse(capsys, f"{gone} is not a folder", "info", artifact, "--plot", gone / "plot.png")
    refuse(capsys, "is not an mcjax artifact", "info", tmp_path)


def test_interrupted_and_resumed(model_folder, text_file, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole.mcjax", tmp_path / "out.mcjax"
    assert run(*options(model_folder, whole, text_file)) == 0
    assert "expert 3 of layer 1" in capsys.readouterr().err
    original, calls = compress.quantize_layer, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(compress, "quantize_layer", interrupted)
    assert run(*options(model_folder, out, text_file, "--resume")) == 130
    assert not out.exists() and (tmp_path / ".out.mcjax.partial").exists()
    capsys.readouterr()
    refuse(capsys, "another model, text or options",
           *options(model_folder, out, text_file, "--resume", "--samples", 4))  # fmt: skip
    assert run(*options(model_folder, out, text_file, "--resume")) == 0
    assert len(calls) == 3  # the first layer was not done again
    assert checkpoint.read_manifest(out) == checkpoint.read_manifest(whole)
    assert not list(tmp_path.glob(".*"))


def test_dry_run(model_folder, text_file, tmp_path, capsys):
    """Says what it would take, and writes nothing."""
    arguments = options(model_folder, tmp_path / "out", text_file)
    assert run(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    for stage in ("importance of tokens", "layers", "what widths cost", "at most, and in all"):
        assert re.search(rf"{stage} +│ +[0-9.]+ [MG]B +│ +[0-9.]+ ", said), said
    assert "for the artifact" in said
    assert not list(tmp_path.iterdir())


def test_ended_but_not_cleared(model_folder, text_file, artifact, tmp_path, capsys):
    """A run that was killed as it ended has nothing left to do; another one does not take its."""
    out, work = tmp_path / "out", tmp_path / ".out.work"
    shutil.copytree(artifact, out)
    work.mkdir()
    (work / "identity.json").write_text("{}")
    arguments = options(model_folder, out, text_file, "--resume")
    refuse(capsys, "exists", *arguments)
    made_of = dict(max_bits=3, group_size=32, samples=16, seq_len=64)
    job = prepare(model_folder, text_file, **made_of)
    (work / "identity.json").write_text(json.dumps(job.identity))
    manifest = compress.compress(model_folder, out, text_file, resume=True, **made_of)
    assert manifest == checkpoint.read_manifest(artifact) and not work.exists()


def test_full_disk_leaves_nothing(model_folder, text_file, tmp_path):
    """A limit on file sizes stands in for the full disk: the system refuses writes."""
    out = tmp_path / "out.mcjax"
    code = (
        "import resource, signal, sys; from mcjax import cli;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "cli.program()"
    )
    assert hasattr(resource, "RLIMIT_FSIZE")
    command = [sys.executable, "-c", code, *map(str, options(model_folder, out, text_file))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
