"""Texts as documents, from every kind of file and from a data set."""

import gzip
import json
import sys

import numpy as np
import pytest

from mcjax import documents, text

ROWS = [{"text": "one two"}, {"text": ""}, {"text": "three\nfour", "id": 7}]
WANTED = ["one two", "three\nfour"]


def test_plain_lines_and_compressed(tmp_path):
    lines = "\n".join(map(json.dumps, ROWS)) + "\n\n"
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.txt", "a.txt.gz"):
        assert documents.read_documents(tmp_path / name) == ["one\ntwo"]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.gz"):
        assert documents.read_documents(str(tmp_path / name)) == WANTED


def test_separators_within_a_text_end_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three"}\n')
    assert documents.read_documents(tmp_path / "a.jsonl") == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"content": "a"}', r"line 1, has no text field of a string; it has \['cont"),
        ("a.jsonl", b'{"text": 3}', "has no text field of a string"),
        ("a.jsonl", b'["a"]', "it has list"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.gz", b"plain", "is not a whole gzip file"),
        ("a.gz", gzip.compress(b"some text" * 99, mtime=0)[:-20], "is not a whole gzip file"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        documents.read_documents(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        documents.read_documents(tmp_path / "none.txt")


def test_documents_are_kept_apart(model_folder, tmp_path):
    """By the token that the tokenizer names, else by the model's."""
    tokenizer = model_folder / "tokenizer.json"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.txt").write_text("three\nfour")
    first, second = (
        text.encode_file(tokenizer, tmp_path / name, 300) for name in ("a.txt", "b.txt")
    )
    both = text.encode_file(tokenizer, tmp_path / "a.jsonl", 300, (7, 8))
    np.testing.assert_array_equal(both, [*first, 7, *second])
    both = text.encode_file(tokenizer, tmp_path / "a.jsonl", 300)
    np.testing.assert_array_equal(both, [*first, *second])
    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    opened = text.open_tokenizer(tokenizer)
    end = opened.token_to_id("a")
    (named / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    both = text.encode_file(named / "tokenizer.json", tmp_path / "a.jsonl", 300, (7,))
    np.testing.assert_array_equal(both, [*first, end, *second])


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data_set(no_network, tmp_path):
    """A folder that the data sets library reads."""
    folder = tmp_path / "maker" / "set"
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        lines = "\n".join(json.dumps({"id": 0, **row}) for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    return folder


def test_a_data_set(data_set, monkeypatch):
    assert documents.read_documents(data_set) == WANTED
    assert documents.read_documents(f"{data_set}::test") == WANTED[:1]
    monkeypatch.setattr(documents, "CHARACTERS", 5)
    assert documents.read_documents(data_set) == WANTED[:1]


def test_data_sets_that_cannot_be_had(data_set, monkeypatch):
    with pytest.raises(ValueError, match="maker/none is no file here, and no data set to be had"):
        documents.read_documents("maker/none")
    with pytest.raises(ValueError, match="validation"):
        documents.read_documents(f"{data_set}::validation")
    for file in (data_set / "data").iterdir():
        file.write_text('{"content": "a"}')
    with pytest.raises(ValueError, match=r"they have \['content'\]"):
        documents.read_documents(data_set)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="install datasets"):
        documents.read_documents(data_set)
