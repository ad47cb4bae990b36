"""Outputs appear whole or not at all."""

import pytest

from mcjax.atomic import whole


def test_whole_or_not_at_all(tmp_path):
    file, folder = tmp_path / "out.png", tmp_path / "out"
    with whole(file) as aside:
        assert aside.suffix == ".png" and aside.parent == tmp_path
        aside.write_text("one")
    with pytest.raises(KeyError), whole(file) as aside:
        aside.write_text("half")
        raise KeyError
    assert file.read_text() == "one"
    with pytest.raises(KeyError), whole(folder) as aside:
        aside.mkdir()
        (aside / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == [file]
    with whole(folder) as aside:
        aside.mkdir()
        (aside / "whole").touch()
    assert (folder / "whole").exists() and len(list(tmp_path.iterdir())) == 2
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match="gone is not a folder"), whole(gone / "out.png"):
        raise KeyError
