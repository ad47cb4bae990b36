"""Tokenizers as files say, windows, and how texts begin."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mcjax import hub, text
from mcjax.sampling import Sampling, sample
from mcjax.speculate import accept


@pytest.fixture
def tokenizer(tmp_path):
    """Letters a to d as tokens 1 to 4, <s> as 0, written where the files beside it can be too."""
    vocab = {"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    made = Tokenizer(models.WordLevel(vocab, unk_token="d"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()

    def write(begins=False, **changes):
        if begins:
            made.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 0)]
            )
        path = tmp_path / "tokenizer.json"
        made.save(str(path))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return path

    return write


def test_truncation_and_padding_are_switched_off(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("a b c " * 50)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokens = text.encode_file(tokenizer(truncation=cut), tmp_path / "text.txt", 5)
    assert tokens.tolist() == [1, 2, 3] * 50


def test_texts_begin_as_the_tokenizer_says(tokenizer, tmp_path):
    path = tokenizer()
    assert text.beginning(path) is None
    with pytest.raises(ValueError, match=r"--bos always.*tokenizer_config.json.*config.json"):
        text.beginning(path, "always")
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 4}))
    assert text.beginning(path) is None
    assert text.beginning(path, "always") == 4
    named = {"bos_token": {"content": "<s>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert text.beginning(path) == 0
    assert text.beginning(path, "never") is None
    with pytest.raises(ValueError, match="'sometimes'"):
        text.beginning(path, "sometimes")


def test_texts_begin_as_the_post_processor_has_it(tokenizer):
    assert text.beginning(tokenizer(begins=True)) == 0


def test_windows_begin_with_the_token():
    cut = text.windows(np.arange(1, 9), 4, first=0)
    assert cut.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert text.windows(np.arange(1, 9), 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_all_ends_of_both_configs_end_a_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert hub.read_config(tmp_path)["eos_token_id"] == 2
    generation = {"eos_token_id": [1, 2, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hub.read_config(tmp_path)["eos_token_id"] == [2, 1, 7]


def test_ids_that_the_tokenizer_does_not_know_are_never_drawn():
    logits = jnp.zeros((500, 8)).at[:, 6].set(9.0).at[:, 3].set(1.0)
    for temperature in (0.0, 5.0):
        sampling = Sampling(temperature=temperature, known=5)
        drawn = sample(jax.random.key(0), logits, sampling)
        assert drawn.max() == (3 if temperature == 0 else 4)
    drafted = jnp.full((500, 1), 6)
    for temperature in (0.0, 5.0):
        sampling = Sampling(temperature=temperature, known=5)
        tokens, accepted = accept(
            jax.random.key(1), drafted, logits[:, None], jnp.stack([logits] * 2, 1), sampling
        )
        assert tokens[:, 0].max() < 5 and accepted.max() == 0
