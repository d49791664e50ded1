"""A checkpoint is checked to the last byte before anything is loaded from it."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import checkpoint
from cluster.checkpoint import CheckpointError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A committed checkpoint of a few small files."""

    def write_parts(staging: Path) -> None:
        (staging / "learner" / "policy").mkdir(parents=True)
        (staging / "learner" / "policy" / "rank0.pt").write_bytes(bytes(range(40)))
        (staging / "learner" / "learner.json").write_text('{"policy_version": 3}')
        (staging / "learner" / "empty").touch()

    return checkpoint.commit(
        tmp_path / "checkpoints", "r001-i000001", driver={"n": 1}, config_hash="abc", write_parts=write_parts
    ).directory


def rewrite(directory: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest as somebody would who can also write its hash."""
    values = json.loads((directory / "manifest.json").read_text())
    change(values)
    content = json.dumps(values).encode()
    (directory / "manifest.json").write_bytes(content)
    (directory / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_one_flipped_bit_anywhere_is_detected(directory: Path) -> None:
    checkpoint.verify(directory)
    assert {path.name for path in files(directory)} == {
        "driver.json", "manifest.json", "manifest.sha256", "rank0.pt", "learner.json", "empty",
    }  # fmt: skip
    for path in files(directory):
        content = path.read_bytes()
        for place in range(len(content)):
            for bit in (1, 0x20, 0x80):  # a digit, the case of a letter, and no text any more
                path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
                with pytest.raises(CheckpointError):
                    checkpoint.verify(directory)
        path.write_bytes(content)
    checkpoint.verify(directory)


def test_every_file_that_is_cut_short_grown_or_gone_is_detected(directory: Path) -> None:
    for path in files(directory):
        content = path.read_bytes()
        for changed in ({content[:-1], content[: len(content) // 2], b""} - {content}) | {content + b"\n"}:
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                checkpoint.verify(directory)
        path.unlink()
        with pytest.raises(CheckpointError):
            checkpoint.verify(directory)
        path.write_bytes(content)
    checkpoint.verify(directory)


@pytest.mark.parametrize(
    "name", ["../outside", "learner/../../outside", "{outside}", "./driver.json", "learner//x", ""]
)
def test_a_manifest_cannot_leave_its_directory(directory: Path, name: str) -> None:
    outside = directory.parent / "outside"
    outside.write_bytes(b"x")
    name = name.format(outside=outside)
    entry = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    rewrite(directory, lambda values: values["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint.verify(directory)


def test_a_file_that_the_manifest_does_not_name_is_refused(directory: Path) -> None:
    (directory / "learner" / "extra.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"does not name: learner/extra\.pt"):
        checkpoint.verify(directory)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_symlink_in_place_of_a_file_is_refused_even_if_its_content_is_right(directory: Path, where: str) -> None:
    path = directory / "learner" / "policy" / "rank0.pt"
    target = path.with_name("other.pt") if where == "inside" else directory.parent / "other.pt"
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(CheckpointError, match=r"rank0\.pt is a symlink"):
        checkpoint.verify(directory)


def test_a_symlink_in_place_of_a_directory_is_refused_even_if_its_content_is_right(directory: Path) -> None:
    (directory / "learner").rename(directory.parent / "elsewhere")
    (directory / "learner").symlink_to(directory.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="learner is a symlink"):
        checkpoint.verify(directory)


def test_a_checkpoint_that_is_itself_a_symlink_is_refused(directory: Path) -> None:
    directory.rename(directory.parent.parent / "elsewhere")
    directory.symlink_to(directory.parent.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="is a symlink"):
        checkpoint.verify(directory)


def test_symlinks_that_nothing_names_are_refused_too(directory: Path) -> None:
    (directory / "learner" / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="learner/dangling is a symlink"):
        checkpoint.verify(directory)


def test_a_pipe_is_refused_and_not_waited_for(directory: Path) -> None:
    (directory / "driver.json").unlink()
    os.mkfifo(directory / "driver.json")
    with pytest.raises(CheckpointError, match="neither a file nor a directory"):
        checkpoint.verify(directory)


class LeavesAMark:
    """What a pickle can do when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_was_put_in_runs_nothing(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(LeavesAMark(mark))
    pickle.loads(payload)
    assert mark.exists()  # such a payload works where it is read
    mark.unlink()

    shard = directory / "learner" / "policy" / "rank0.pt"
    for content in (payload, payload[:40].ljust(40, b".")):
        shard.write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoint.verify(directory)
    shard.write_bytes(payload)
    (directory / "driver.json").write_bytes(payload)
    (directory / "manifest.json").write_bytes(payload)
    with pytest.raises(CheckpointError):
        checkpoint.verify(directory)
    assert not mark.exists()


@pytest.mark.parametrize("values", [[], 3, {}, {"format_version": 2, "config_hash": "abc", "files": ["driver.json"]}])
def test_a_manifest_of_another_shape_is_an_error_and_no_accident(directory: Path, values: Any) -> None:
    content = json.dumps(values).encode()
    (directory / "manifest.json").write_bytes(content)
    (directory / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match="is no manifest"):
        checkpoint.verify(directory)


def test_a_checkpoint_without_a_drivers_state_is_refused(directory: Path) -> None:
    (directory / "driver.json").unlink()
    rewrite(directory, lambda values: values["files"].pop("driver.json"))
    with pytest.raises(CheckpointError, match=r"driver\.json"):
        checkpoint.verify(directory)


def test_another_format_is_named(directory: Path) -> None:
    rewrite(directory, lambda values: values.update(format_version=7))
    with pytest.raises(CheckpointError, match="has format 7, and this version reads 2"):
        checkpoint.verify(directory)


def test_the_first_format_is_refused_with_what_to_do(directory: Path) -> None:
    hashes = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(directory)
        if not path.name.startswith("manifest")
    }
    manifest = {"format_version": 1, "config_hash": "abc", "files": hashes}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (directory / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match="finish the run with the version of Rondo that wrote it"):
        checkpoint.verify(directory)
