"""The demo, whole, in fewer windows and rounds; the embedded model is what it is said to be."""

import json

import numpy as np
import pytest

import mcjax
from mcjax import cli, demo
from mcjax.checkpoint import read_manifest
from mcjax.hub import Folder
from mcjax.job import EFFORTS
from mcjax.models.language_model import LanguageModel
from mcjax.text import encode_file, perplexity, windows

BUDGETS = demo.BUDGETS[:3]
"""Enough of those that the demo has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "mcjax-demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "normal", EFFORTS["fast"])
        patch.setattr(demo, "BUDGETS", BUDGETS)
        demo.demo(out, windows=16)
    return out


def test_what_it_leaves(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"artifact", "demo.json", "perplexity.png", "allocation.png"}
    for name in ("perplexity.png", "allocation.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "demo.json").read_text())
    assert [row["budget"] for row in facts["rows"]] == list(BUDGETS)
    for row in facts["rows"]:
        assert facts["full"] < row["artifact"]
        assert row["budget"] < row["effective_bits"] <= row["budget"] + 0.3
    first = facts["rows"][0]
    assert first["artifact"] < first["gptq"]
    assert facts["sample"].startswith(demo.PROMPT)
    for row in facts["pruning"]:
        assert 0.1 < row["skipped"] < 0.2
    assert len(demo.tables(facts)) == 2


def test_figures_are_those_of_the_artifact(folder):
    """The one dequantised program that the demo shares gives what `load` gives."""
    facts = json.loads((folder / "demo.json").read_text())
    model = mcjax.load(folder / "artifact", budget=2.5)
    source = Folder(demo.EMBEDDED)
    tokens = encode_file(source.tokenizer_path, demo.EMBEDDED / "held_out.txt", 2048)
    from mcjax.text import spread

    some = spread(windows(tokens, 256), 16)
    value = perplexity(model.module, model.params, some)[0]
    np.testing.assert_allclose(value, facts["rows"][2]["artifact"], rtol=1e-4)
    assert model.bytes_read == facts["rows"][2]["bytes_read"]


def test_every_expert_is_in_use(folder):
    frequency = np.array(read_manifest(folder / "artifact")["statistics"]["frequency"])
    share = frequency / frequency.sum(axis=1, keepdims=True) * frequency.shape[1]
    assert share.min() > 0.2


def test_embedded_model_is_small_and_reads_its_text():
    size = sum(path.stat().st_size for path in demo.EMBEDDED.iterdir())
    assert size < 8e6
    source = Folder(demo.EMBEDDED)
    tokens = encode_file(source.tokenizer_path, demo.EMBEDDED / "held_out.txt", 2048)
    value = perplexity(
        LanguageModel(source.decoder), source.read(np.float32), windows(tokens, 256)[:8]
    )
    assert value[0] < 40


def test_bad_places(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "mcjax-demo").mkdir()
    (tmp_path / "mcjax-demo" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert "is not an earlier demo" in error and error.count("\n") == 1
    assert (tmp_path / "mcjax-demo" / "precious").read_text() == "mine"
