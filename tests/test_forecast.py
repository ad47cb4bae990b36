"""What compressing takes, said before: against what it then leaves on the disk, and shapes."""

import math
import re
import sys

import numpy as np
import pytest

from mcjax.checkpoint import ArtifactReader, verify
from mcjax.compress import compress
from mcjax.forecast import forecast, within
from mcjax.job import prepare
from mcjax.models import weights

OPTIONS = dict(max_bits=3, group_size=32, samples=16, seq_len=64)
"""As those of the artifact that tests share."""


@pytest.fixture(scope="module")
def job(model_folder, text_file):
    return prepare(model_folder, text_file, **OPTIONS, batch_tokens=256)


@pytest.fixture(scope="module")
def found(job):
    return forecast(job, timed=False)


def test_stages_hold_at_least_their_arrays(job, found):
    assert [s.name for s in found.stages] == ["importance of tokens", "layers", "what widths cost"]
    decoder = job.folder.decoder
    layer = sum(math.prod(r.shape) for r in weights.roles(decoder.layers[0], decoder.width))
    for stage, layers in zip(found.stages, (1, 1, 2), strict=True):
        assert stage.bytes > 4 * layers * layer
        assert math.isnan(stage.seconds)
    assert found.memory == found.process + max(stage.bytes for stage in found.stages)


def test_tuning_holds_all_layers(model_folder, text_file, found):
    best = prepare(model_folder, text_file, **OPTIONS, batch_tokens=256, effort="best")
    tuning = forecast(best, timed=False).stages[-1]
    assert tuning.name == "tuning" and tuning.bytes > found.artifact
    less = forecast(best._replace(most_kept=0), timed=False).stages[-1]
    assert found.artifact < less.bytes < tuning.bytes


@pytest.mark.slow
def test_time_is_that_of_all_layers(job):
    took = forecast(job, timed=True)
    assert all(0 < stage.seconds < 600 for stage in took.stages)
    assert took.seconds == sum(stage.seconds for stage in took.stages)


def test_disk_is_what_a_run_leaves(model_folder, artifact, text_file, tmp_path, found):
    """And what is made with less at once is the same."""
    seen = []

    def sizes(items, **_):
        for item in items:
            files = (tmp_path / ".out.work").rglob("*")
            seen.append(sum(f.stat().st_size for f in files if f.is_file()))
            yield item

    given = model_folder, tmp_path / "out", text_file
    made = compress(*given, **OPTIONS, batch_tokens=256, progress=sizes)["statistics"]
    beside = found.disk - found.artifact
    assert 0.6 * beside < max(seen) < 1.1 * beside
    assert verify(ArtifactReader(tmp_path / "out")) == pytest.approx(found.artifact, rel=0.05)
    usual = ArtifactReader(artifact).manifest["statistics"]
    np.testing.assert_allclose(made["error"], usual["error"], rtol=0.02)
    assert made["frequency"] == usual["frequency"]


@pytest.mark.slow
def test_less_at_once_keeps_to_less_memory(job, monkeypatch):
    for name in ("forecast", "meter"):
        monkeypatch.setattr(sys.modules[f"mcjax.{name}"], "process_bytes", lambda: 0)
    found = forecast(job, timed=False)
    assert within(job, 2 * found.memory) == job
    refusal = r"0.00 GB of memory are too few: (.*) GB are the least, for"
    with pytest.raises(ValueError, match=refusal) as refused:
        within(job, 1)
    least = 1e9 * float(re.match(refusal, str(refused.value))[1])
    some = int(least + found.memory) // 2
    smaller = within(job, some)
    assert smaller.batch_tokens < job.batch_tokens and smaller.how.chunk < job.how.chunk
    assert smaller.most_kept < job.most_kept
    assert forecast(smaller, timed=False).memory <= some < found.memory
