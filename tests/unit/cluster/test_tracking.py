"""Metric files: whole lines only, cut to what stands, and readable whatever happened to the disk."""

import json
from pathlib import Path

import pytest

from cluster.tracking import LinesFile, Sinks, TensorBoard, metrics_lines, read_lines
from protocol.errors import StorageError, UserError
from protocol.messages import IterationReport
from tests.small_disk import files_no_longer_than


def report(number: int) -> IterationReport:
    return IterationReport(
        round=1, iteration=number, policy_version=number + 1, metrics={"b": 0.5 + number, "a": 1.0}, samples=()
    )


def opened(path: Path, keep: int) -> LinesFile:
    return LinesFile(path, keep=keep, lines=metrics_lines)


def test_a_line_is_flat_and_sorted_and_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = opened(path, 0)
    file.write(report(0))
    assert path.read_text() == '{"a": 1.0, "b": 0.5}\n'
    file.close()


def test_what_a_resume_repeats_is_taken_off_with_half_a_line_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a"')
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
    file = opened(path, 2)
    file.write(report(2))
    file.close()
    assert read_lines(path) == [{"a": 1}, {"a": 2}, {"a": 1.0, "b": 2.5}]


def test_a_line_that_the_disk_does_not_take_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = opened(path, 0)
    file.write(report(0))
    with files_no_longer_than(30), pytest.raises(StorageError, match=str(path)):
        file.write(report(1))
    assert [line["b"] for line in read_lines(path)] == [0.5]
    file.write(report(1))
    assert [line["b"] for line in read_lines(path)] == [0.5, 1.5]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(UserError, match=f"{path}, line 2: broken JSON"):
        read_lines(path)
    assert read_lines(tmp_path / "none") == []


def scalars(path: Path) -> dict[int, dict[str, float]]:
    """Read a file as TensorBoard does."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    events = LegacyEventFileLoader(str(path)).Load()
    return {e.step: {v.tag: v.simple_value for v in e.summary.value} for e in events if e.summary.value}


def test_tensorboard_reads_the_scalars_also_after_a_disk_was_full(tmp_path: Path) -> None:
    directory = tmp_path / "tensorboard"
    board = TensorBoard(directory)
    board.write(report(0))
    [path] = directory.iterdir()
    length = path.stat().st_size
    with files_no_longer_than(length + 20), pytest.raises(StorageError, match="events.out.tfevents"):
        board.write(report(1))
    assert path.stat().st_size == length
    board.write(report(2))
    board.close()
    assert scalars(path) == {1: {"a": 1.0, "b": 0.5}, 3: {"a": 1.0, "b": 2.5}}


def test_all_sinks_are_closed(tmp_path: Path) -> None:
    sinks = [opened(tmp_path / name, 0) for name in ("one", "two")]
    with Sinks(sinks) as together:
        together.write(report(0))
    for sink in sinks:
        with pytest.raises(OSError, match="Bad file descriptor"):
            sink.close()
    assert json.loads((tmp_path / "two").read_text())["b"] == 0.5
