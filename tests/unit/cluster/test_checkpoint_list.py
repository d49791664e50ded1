"""`rondo ckpt`: what there is, whether it verifies, and which one a resume would use."""

import os
import signal
import time
from pathlib import Path

import pytest

from cluster import checkpoint, resumption
from cluster.cli import main
from cluster.run_directory import RunDirectory, claim, run_id
from cluster.schedule import Phase, RunState
from configs.load import config_hash
from tests.tiny_run import tiny_config


def commit(directory: RunDirectory, *, round: int, iteration: int, version: int, seed: int = 0) -> Path:
    config = tiny_config(directory.root.parent, f"run.seed={seed}")
    state = RunState(phase=Phase.OPTIMISE, round=round, iteration=iteration, policy_version=version)

    def write_parts(staging: Path) -> None:
        resumption.write_config(staging, config)
        (staging / "rank0.pt").write_bytes(bytes(1_500_000))

    return checkpoint.commit(
        directory.checkpoints,
        checkpoint.name_of(round=round, iteration=iteration),
        driver={"state": state.to_json(), "run_id": run_id(directory)},
        config_hash=config_hash(config),
        write_parts=write_parts,
    ).directory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with three checkpoints."""
    directory = claim(tiny_config(tmp_path))
    commit(directory, round=1, iteration=20, version=20)
    commit(directory, round=2, iteration=4, version=25)
    commit(directory, round=2, iteration=8, version=29)
    return directory


def spoil(directory: Path) -> None:
    content = bytearray((directory / "rank0.pt").read_bytes())
    content[700_000] ^= 1
    (directory / "rank0.pt").write_bytes(content)


def rondo(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Call the command line as a person would."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    captured = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, (captured.out + captured.err).splitlines()


def row(lines: list[str], name: str) -> list[str]:
    [found] = [line for line in lines if name in line.split()[1:2]]
    return found.replace("│", " ").split()


def test_the_list_says_where_each_stands_and_which_a_resume_uses(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    long_ago = time.time() - 3 * 3600 - 60
    os.utime(run.checkpoints / "r001-i000020", (long_ago, long_ago))
    code, lines = rondo(capsys, "ckpt", "ls", run.root)
    assert code == 0
    assert row(lines, "r001-i000020") == ["r001-i000020", "1", "20", "v020", "1.5", "MB", "3", "h", "yes"]
    assert row(lines, "r002-i000004")[:6] == ["r002-i000004", "2", "4", "v025", "1.5", "MB"]
    newest = " ".join(row(lines, "r002-i000008"))
    assert newest.endswith("newest, a resume uses it yes")
    assert sum("a resume uses it" in line for line in lines) == 1


def test_the_list_shows_a_damaged_newest_and_the_one_that_a_resume_falls_back_to(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run.checkpoints / "r002-i000008")
    _, lines = rondo(capsys, "ckpt", "ls", run.root)
    damaged = row(lines, "r002-i000008")
    assert damaged[:4] == ["r002-i000008", "2", "8", "?"]
    assert "newest" in damaged
    assert "no:" in damaged
    text = " ".join(line.strip("│ ") for line in lines)
    assert "does not match its hash" in " ".join(text.split())
    assert " ".join(row(lines, "r002-i000004")).endswith("a resume uses it yes")


def test_the_list_says_that_a_resume_would_refuse_another_configuration(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run, round=2, iteration=12, version=33, seed=5)
    _, lines = rondo(capsys, "ckpt", "ls", run.root)
    refused = " ".join(row(lines, "r002-i000012"))
    assert "newest, a resume refuses yes, but of another configuration: run.seed was 5, now 0" in refused
    assert not any("a resume uses it" in line for line in lines)


def test_the_list_says_that_a_resume_would_refuse_another_runs_checkpoint(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.run_id.write_text("another")
    _, lines = rondo(capsys, "ckpt", "ls", run.root)
    text = " ".join(" ".join(line.strip("│ ") for line in lines).replace("│", " ").split())
    assert "newest, a resume refuses yes, but not known to be of this run: see --trust-checkpoint" in text
    assert not any("a resume uses it" in line for line in lines)


def test_verify_checks_all_and_exits_with_2_and_the_reason_if_one_is_damaged(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = rondo(capsys, "ckpt", "verify", run.root)
    assert code == 0
    assert [line.split()[0] for line in lines] == ["ok"] * 3
    spoil(run.checkpoints / "r002-i000004")
    code, lines = rondo(capsys, "ckpt", "verify", run.root)
    assert code == 2
    assert [line.split()[0] for line in lines] == ["ok", "FAIL", "ok"]
    assert lines[1] == f"FAIL  {run.checkpoints / 'r002-i000004'}: rank0.pt does not match its hash"


def test_verify_checks_one_by_name(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run.checkpoints / "r002-i000004")
    assert rondo(capsys, "ckpt", "verify", run.root, "r002-i000008")[0] == 0
    assert rondo(capsys, "ckpt", "verify", run.root, "r002-i000004")[0] == 2
    code, lines = rondo(capsys, "ckpt", "verify", run.root, "r002-i000005")
    assert code == 2
    assert "it has r001-i000020, r002-i000004, r002-i000008" in " ".join(lines)


def test_a_run_without_checkpoints_has_an_empty_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = claim(tiny_config(tmp_path))
    assert rondo(capsys, "ckpt", "ls", directory.root)[0] == 0
    code, lines = rondo(capsys, "ckpt", "verify", directory.root)
    assert code == 2
    assert f"{directory.root} has no checkpoints yet" in " ".join(lines)
