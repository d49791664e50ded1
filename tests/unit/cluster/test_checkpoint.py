"""The joint commit: complete or absent, verified before use, old ones deleted last."""

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


@pytest.mark.parametrize("name", ["learner/state.bin", "driver.json"])
def test_any_changed_byte_is_detected_and_the_older_one_is_used(tmp_path: Path, name: str) -> None:
    commit(tmp_path, "r001-i000001")
    damaged = commit(tmp_path, "r001-i000002").directory
    content = bytearray((damaged / name).read_bytes())
    content[0] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        checkpoint.verify(damaged)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.directory.name == "r001-i000001"


def test_when_none_verifies_each_is_listed_and_nothing_starts_fresh(tmp_path: Path) -> None:
    for name in ("r001-i000001", "r001-i000002"):
        (commit(tmp_path, name).directory / "learner" / "state.bin").unlink()
    with pytest.raises(UserError) as error:
        checkpoint.newest(tmp_path)
    assert "r001-i000001" in str(error.value)
    assert "r001-i000002" in str(error.value)


def test_a_manifest_cannot_leave_its_directory(tmp_path: Path) -> None:
    directory = commit(tmp_path, "r001-i000001").directory
    (tmp_path / "outside").write_bytes(b"x")
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace("driver.json", "../outside"))
    with pytest.raises(CheckpointError, match="outside"):
        checkpoint.verify(directory)


def test_a_stranger_file_is_refused(tmp_path: Path) -> None:
    directory = commit(tmp_path, "r001-i000001").directory
    (directory / "extra.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra\.pt"):
        checkpoint.verify(directory)


def test_old_ones_go_only_after_the_newest_was_verified(tmp_path: Path) -> None:
    for i in range(4):
        commit(tmp_path, f"r001-i00000{i}")
    (checkpoint.committed(tmp_path)[-1] / "driver.json").write_text("{}")
    with pytest.raises(CheckpointError):
        checkpoint.retain(tmp_path, keep=1)
    assert len(checkpoint.committed(tmp_path)) == 4
    commit(tmp_path, "r001-i000009")
    checkpoint.retain(tmp_path, keep=2)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["r001-i000003", "r001-i000009"]
