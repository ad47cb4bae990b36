"""Once-QAT of experts: starts where the artifact is, ends as an artifact like any other."""

import sys

import loop
import numpy as np
import once_lm
import pytest

import mcjax
from mcjax import checkpoint
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
