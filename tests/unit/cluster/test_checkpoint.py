"""The joint commit: complete or absent, verified before use, old ones deleted last."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster import checkpoint
from cluster.checkpoint import CheckpointError
from protocol.errors import UserError


def commit(root: Path, name: str, payload: bytes = b"weights") -> checkpoint.Checkpoint:
    def write_parts(staging: Path) -> None:
        (staging / "learner").mkdir()
        (staging / "learner" / "state.bin").write_bytes(payload)

    return checkpoint.commit(root, name, driver={"n": name}, config_hash="abc", write_parts=write_parts)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_was_committed_is_found_and_verified(tmp_path: Path) -> None:
    commit(tmp_path, "r001-i000001")
    commit(tmp_path, "r001-i000002")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.driver == {"n": "r001-i000002"}


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_a_writer_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    commit(tmp_path, "r001-i000001")

    def fail(staging: Path) -> None:
        (staging / "half").write_bytes(b"x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.commit(tmp_path, "r001-i000002", driver={}, config_hash="abc", write_parts=fail)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.directory.name == "r001-i000001"


def test_a_damaged_one_is_passed_over_aloud_and_the_older_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit(tmp_path, "r001-i000001")
    damaged = commit(tmp_path, "r001-i000002").directory
    flip(damaged / "learner" / "state.bin", 0)
    with caplog.at_level(logging.WARNING, logger="cluster.checkpoint"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "r001-i000001"
    assert "r001-i000002: learner/state.bin does not match its hash" in caplog.text


def test_when_none_verifies_each_is_listed_and_nothing_starts_fresh(tmp_path: Path) -> None:
    for name in ("r001-i000001", "r001-i000002"):
        (commit(tmp_path, name).directory / "learner" / "state.bin").unlink()
    with pytest.raises(UserError) as error:
        checkpoint.newest(tmp_path)
    assert "r001-i000001: learner/state.bin is missing" in str(error.value)
    assert "r001-i000002: learner/state.bin is missing" in str(error.value)


def test_a_name_that_is_taken_is_left_alone_and_the_new_one_is_found(tmp_path: Path) -> None:
    first = commit(tmp_path, "r001-i000001", b"first")
    second = commit(tmp_path, "r001-i000001", b"second")
    third = commit(tmp_path, "r001-i000001", b"third")
    assert [first.name, second.name, third.name] == ["r001-i000001", "r001-i000001.02", "r001-i000001.03"]
    assert checkpoint.verify(first.directory) == first
    found = checkpoint.newest(tmp_path)
    assert found == third


def test_checkpoints_are_in_the_order_of_rounds_and_iterations_whatever_their_digits(tmp_path: Path) -> None:
    names = ["r001-i000009", "r001-i000009.02", "r001-i000009.10", "r001-i000010", "r001-i1000000", "r010-i000001"]
    for name in ["a-copy-of-mine", *reversed(names)]:
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["a-copy-of-mine", *names]


def test_a_name_that_a_resume_could_not_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint's name"):
        commit(tmp_path, "../elsewhere")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_commit_gives_its_space_back(tmp_path: Path) -> None:
    def fail(staging: Path) -> None:
        (staging / "half").write_bytes(b"x")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.commit(tmp_path, "r001-i000002", driver={}, config_hash="abc", write_parts=fail)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_verified_later_is_not_committed(tmp_path: Path) -> None:
    def link(staging: Path) -> None:
        (staging / "weights").symlink_to("/etc/hostname")

    with pytest.raises(CheckpointError, match="weights is a symlink"):
        checkpoint.commit(tmp_path, "r001-i000001", driver={}, config_hash="abc", write_parts=link)
    assert checkpoint.committed(tmp_path) == []


def newest_two(found: Sequence[checkpoint.Checkpoint]) -> list[str]:
    return [each.name for each in found[-2:]]


def test_old_ones_go_only_after_the_newest_was_verified(tmp_path: Path) -> None:
    for i in range(3):
        latest = commit(tmp_path, f"r001-i00000{i}")
    (latest.directory / "driver.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.retain(tmp_path, latest, choose=newest_two)
    assert len(checkpoint.committed(tmp_path)) == 3
    latest = commit(tmp_path, "r001-i000009")
    checkpoint.retain(tmp_path, latest, choose=newest_two)
    # The damaged one takes nobody's place.
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["r001-i000001", "r001-i000009"]


def test_what_was_passed_over_on_the_resume_goes_when_its_iterations_are_repeated(tmp_path: Path) -> None:
    for i in (2, 4, 6):
        commit(tmp_path, f"r001-i00000{i}")
    for i in (4, 6):
        flip(tmp_path / f"r001-i00000{i}" / "learner" / "state.bin", 3)
    assert checkpoint.newest(tmp_path).name == "r001-i000002"
    latest = commit(tmp_path, "r001-i000004")
    checkpoint.retain(tmp_path, latest, choose=newest_two)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["r001-i000002", "r001-i000004.02"]


def test_what_is_referred_to_stays_and_so_does_what_somebody_else_has_named(tmp_path: Path) -> None:
    for i in (2, 4, 6):
        latest = commit(tmp_path, f"r001-i00000{i}")
    shutil.copytree(latest.directory, tmp_path / "a-copy-of-mine")
    checkpoint.retain(tmp_path, latest, choose=lambda found: {"r001-i000002"})
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a-copy-of-mine", "r001-i000002", "r001-i000006"}


def test_the_latest_stays_whatever_is_chosen(tmp_path: Path) -> None:
    commit(tmp_path, "r001-i000001")
    latest = commit(tmp_path, "r001-i000002")
    checkpoint.retain(tmp_path, latest, choose=lambda found: ())
    assert checkpoint.committed(tmp_path) == [latest.directory]


def test_leftovers_go_when_the_newest_has_been_verified_and_not_before(tmp_path: Path) -> None:
    latest = commit(tmp_path, "r001-i000001")
    leftovers = [tmp_path / ".staging-r001-i000002-0a", tmp_path / ".discarded-r001-i000000-0b"]
    for path in leftovers:
        (path / "learner").mkdir(parents=True)
    content = (latest.directory / "driver.json").read_bytes()
    (latest.directory / "driver.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.retain(tmp_path, latest, choose=newest_two)
    assert all(path.is_dir() for path in leftovers)
    (latest.directory / "driver.json").write_bytes(content)
    checkpoint.retain(tmp_path, latest, choose=newest_two)
    assert [path.name for path in tmp_path.iterdir()] == ["r001-i000001"]
