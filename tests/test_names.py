"""Names on the hub, by its own client: from its cache, and from a hub on this machine."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_families import error, fixture, write

import mcjax
from mcjax.hub import names

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def made(tmp_path):
    """A model's folder, with what must never be taken from one."""
    config, tokens, logits, tensors = fixture("qwen3_moe_plain")
    folder = write(tmp_path / "made", config, tensors)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("do as you like")
    for name in ("pytorch_model.bin", "modeling.py", "training.pt", "README.md"):
        (folder / name).write_bytes(b"code")
    return folder, tokens, logits


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A cache with that model as huggingface_hub keeps it, and no network."""
    from huggingface_hub import constants

    folder, tokens, logits = made
    repository = tmp_path / "cache" / "models--maker--small-1.5B"
    snapshot = repository / "snapshots" / REVISION
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "refs" / "v2").write_text(REVISION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot, tokens, logits


@pytest.mark.parametrize("suffix", ["", "@v2", f"@{REVISION}"])
def test_a_cached_model_is_its_folder(cache, suffix):
    snapshot, tokens, logits = cache
    name = f"maker/small-1.5B{suffix}"
    assert names.local(name).samefile(snapshot)
    if not suffix:
        assert error(mcjax.load(name)(tokens), logits) < 1e-4


@pytest.mark.parametrize("name", ["maker/other", "maker/small-1.5B@v3"])
def test_what_is_not_there_is_told_in_a_line(cache, name):
    with pytest.raises(ValueError, match=r"cannot get maker/.*not in the cache.*HF_HUB_OFFLINE"):
        mcjax.load(name)


def test_paths_stay_paths(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "maker" / "small-1.5B").mkdir(parents=True)
    for path in ("maker/small-1.5B", "./maker/other", "../a/b", "/a/b", "one", "a/b/c", "a b/c"):
        assert names.local(path) == Path(path)


def test_the_command_line_without_a_network(cache, tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-m", "mcjax.cli", "eval", "maker/other", "--text", "x.txt"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    lines = run.stderr.splitlines()
    assert run.returncode == 1 and len(lines) == 1 and "HF_HUB_OFFLINE is set" in lines[0], lines


@pytest.fixture
def hub(made):
    """A hub on this machine: one model, one gated; its address, and what was asked of it."""
    folder, asked = made[0], []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path, kind, own = self.path.split("?")[0], None, {}
            body = b""
            if "gated" in path:
                kind = "GatedRepo"
            elif path.endswith("/revision/v9"):
                kind = "RevisionNotFound"
            elif not path.startswith(("/api/models/maker/small/", "/maker/small/")):
                kind = "RepoNotFound"
            elif "/revision/" in path:
                body = json.dumps({"id": "maker/small", "sha": REVISION}).encode()
            elif "/tree/" in path:
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in sorted(folder.iterdir())
                ]
                body = json.dumps(files).encode()
            else:
                name = path.rpartition("/")[2]
                body = (folder / name).read_bytes()
                own = {"ETag": f'"{name}"', "X-Repo-Commit": REVISION}
            self.send_response(200 if kind is None else 404)
            for key, value in ({} if kind is None else {"X-Error-Code": kind}).items():
                self.send_header(key, value)
            for key, value in own.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


SCRIPT = """
import sys
from mcjax.hub import local
for name in sys.argv[1:]:
    try:
        print("got", local(name))
    except ValueError as error:
        print(error)
"""


def test_downloads_what_a_model_needs_and_no_more(hub, tmp_path):
    address, asked = hub
    environment = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "new")}
    named = ("maker/small", "maker/small@v9", "maker/gated", "maker/none")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *named],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    got, *refused = run.stdout.splitlines()
    folder = Path(got.removeprefix("got "))
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert {file.name for file in folder.iterdir()} == wanted, run.stderr
    assert not any(path.endswith((".bin", ".py", ".pt")) for path in asked)
    said = ("no revision 'v9'", "licence to be accepted first", "no such repository on the hub")
    for line, words in zip(refused, said, strict=True):
        assert line.startswith("cannot get maker/") and words in line
