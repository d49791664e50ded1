"""`rondo status`: read from a run's files, the half-written among them."""

from pathlib import Path

from tests.command_line import command
from tests.written_run import write_run, written_config


def test_a_half_written_line_of_metrics_is_no_iteration_yet(tmp_path: Path) -> None:
    directory = write_run(written_config(tmp_path))
    with directory.metrics.open("a") as metrics:
        metrics.write('{"counter/round": 2, "counter/itera')
    ended = command("status", str(directory.root))
    assert (ended.code, ended.err) == (0, "")
    assert "last iteration: round 2, 20 of 20" in ended.out
    assert "rounds/r002/comparisons.jsonl (round 2: 500 tasks, 3,000 pairs)" in ended.out
