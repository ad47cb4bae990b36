"""Predictions over the likeliest part of a vocabulary."""

import numpy as np
import pytest
from conftest import CONFIG
from scipy.special import log_softmax, softmax

from mcjax import vocabulary
from mcjax.models.families import describe


@pytest.fixture
def large(monkeypatch):
    """A decoder of 900 tokens, of which 50 are compared by what 16 rows say."""
    monkeypatch.setattr(vocabulary, "MOST", 50)
    monkeypatch.setattr(vocabulary, "ASKED", 16)
    return describe(CONFIG | {"vocab_size": 900})[1]


def unit(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def test_the_likeliest_tokens_are_compared(large):
    rng = np.random.default_rng(0)
    name = "embedding" if large.tied else "head"
    head = rng.normal(size=(900, 96)).astype(np.float32) / 4
    outside = {"norm": np.ones(96, np.float32), name: head}
    x, other = rng.normal(size=(2, 4, 8, 96)).astype(np.float32)
    norm, rows = vocabulary.head_of(large, outside, x)
    some = x.reshape(-1, 96)[::2]
    chance = softmax(unit(some) @ head.T, axis=-1).mean(axis=0)
    best = np.argsort(-chance)[:50]
    assert set(map(bytes, np.asarray(rows))) == set(map(bytes, head[best]))

    expected, got = (log_softmax(unit(a) @ head[best].T, axis=-1) for a in (x, other))
    exact = np.mean(np.sum(np.exp(expected) * (expected - got), axis=-1))
    found = vocabulary.divergence(large, norm, rows, other, x)
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_a_small_vocabulary_is_compared_whole():
    small = describe(CONFIG)[1]
    name = "embedding" if small.tied else "head"
    outside = {"norm": np.ones(96), name: np.eye(300, 96, dtype=np.float32)}
    np.testing.assert_array_equal(vocabulary.head_of(small, outside, None)[1], outside[name])
