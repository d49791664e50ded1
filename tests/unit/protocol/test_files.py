import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from protocol.errors import StorageError, UserError
from protocol.files import (
    RecordFile,
    keep_lines,
    make_directory,
    staged,
    storage_failure,
    write_json,
    write_text,
    writing,
)
from tests.small_disk import files_no_longer_than, fill, small_disk


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="1m") as place:
        yield place


def test_a_file_that_a_limit_stops_keeps_its_old_content_and_says_which_it_is_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"round": 1})
    with files_no_longer_than(50), pytest.raises(StorageError) as error:
        write_json(path, {"round": 2, "long": "x" * 100})
    assert str(error.value).startswith(f"{path}: it cannot be written. Likely cause: File too large.")
    assert f"df -h {tmp_path}" in str(error.value)
    assert json.loads(path.read_text()) == {"round": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_on_a_full_disk_keeps_its_old_content(disk: Path) -> None:
    path = disk / "state.json"
    write_json(path, {"round": 1})
    ballast = fill(disk, leave=0)
    with pytest.raises(StorageError, match="No space left on device"):
        write_json(path, {"round": 2, "long": "x" * 100})
    assert json.loads(path.read_text()) == {"round": 1}
    assert sorted(disk.iterdir()) == [ballast, path]


def test_a_record_that_is_not_taken_in_full_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    file.append(b"first\n")
    with files_no_longer_than(10), pytest.raises(StorageError, match=f"{path}: it cannot be written"):
        file.append(b"second, of which four bytes fit\n")
    assert path.read_bytes() == b"first\n"
    file.append(b"third\n")
    file.close()
    again = RecordFile(path)
    again.append(b"fourth\n")
    again.close()
    assert path.read_bytes() == b"first\nthird\nfourth\n"


def test_records_on_a_disk_that_fills_up_stay_whole(disk: Path) -> None:
    path, record = disk / "metrics.jsonl", b"x" * 999 + b"\n"
    file = RecordFile(path)
    file.append(record)
    ballast = fill(disk, leave=4096)
    with pytest.raises(StorageError, match="No space left on device"):
        append(file, record, times=20)
    content = path.read_bytes()
    assert content == record * (len(content) // 1000)
    assert len(content) >= 4000
    ballast.unlink()
    file.append(record)
    assert path.read_bytes() == content + record


def append(file: RecordFile, record: bytes, *, times: int) -> None:
    for _ in range(times):
        file.append(record)


def test_lines_are_cut_off_in_place_also_where_nothing_more_fits(disk: Path) -> None:
    path = disk / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\nthree\nhal")
    fill(disk, leave=0)
    assert keep_lines(path, 4) == 0
    assert keep_lines(path, 2) == 2
    assert path.read_bytes() == b"one\ntwo\n"
    assert keep_lines(path, 0) == 2
    assert path.read_bytes() == b""
    assert keep_lines(disk / "none", 3) == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(2**21)),
        lambda path: save_file({"weights": torch.zeros(2**19)}, path),
        lambda path: parquet.write_table(pyarrow.table({"x": np.random.default_rng(0).random(2**18)}), path),
    ],
    ids=["Python", "safetensors", "Parquet"],
)
def test_whichever_library_meets_the_full_disk_the_file_is_named(disk: Path, write: Callable[[Path], object]) -> None:
    path = disk / "artefact"
    with (
        pytest.raises(StorageError, match=f"{path}: it cannot be written.*No space left on device"),
        staged(path) as at,
    ):
        write(at)
    assert list(disk.iterdir()) == []


def test_a_directory_stands_for_what_is_written_below_it(tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "file"
    with pytest.raises(StorageError, match=f"{inside}: it cannot be written"), writing(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(inside))
    with pytest.raises(StorageError, match=f"{tmp_path}: it cannot be written"), writing(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_only_what_a_disk_refuses_is_a_failure_of_the_disk() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        assert storage_failure(OSError(code, "no")).errno == code
        assert storage_failure(ValueError(f"I/O error: no (os error {code})")).errno == code
    for other in (
        OSError(errno.EACCES, "no"),
        OSError("No space left on device"),
        ValueError("I/O error: no such file (os error 2)"),
        UserError("the file ends early (os error 28)"),
        KeyError(28),
    ):
        assert storage_failure(other) is None


def test_the_error_comes_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(StorageError("/run/metrics.jsonl: it cannot be written.")))
    assert isinstance(error, StorageError)
    assert str(error) == "/run/metrics.jsonl: it cannot be written."
