import json
from pathlib import Path

import pytest

from protocol.files import make_directory, staged, write_json, write_text


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    write_json(path, {"rate": 0.5})
    with staged(path) as staging:
        staging.write_text('{"rate": 1.0}')
        assert json.loads(path.read_text()) == {"rate": 0.5}
    assert json.loads(path.read_text()) == {"rate": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "the old text\n")

    def write_half() -> None:
        with staged(path) as staging:
            staging.write_text("hal")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "no such character: \ud800")
    assert path.read_text() == "the old text\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_died_while_writing_stands_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with staged(path) as staging:
        leftover = staging
        staging.write_text("new\n")
    leftover.write_text("half of something much longer than what is written next")
    write_text(path, "newer\n")
    assert path.read_text() == "newer\n"


def test_a_directory_is_made_with_those_above_it_and_may_be_there_already(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mine" / "checkpoints"
    make_directory(path)
    (path / "kept").touch()
    make_directory(path)
    assert [found.name for found in path.iterdir()] == ["kept"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_directory(tmp_path / "file" / "below")
