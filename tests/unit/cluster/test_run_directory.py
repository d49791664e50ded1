"""Run directories: one configuration each, one driver at a time."""

from pathlib import Path

import pytest

from cluster import run_directory
from configs.load import load
from protocol.errors import UserError


def config(tmp_path: Path, *overrides: str):
    return load("quickstart", [f"run.dir={tmp_path}", *overrides])


def test_the_same_configuration_takes_its_directory_up_again(tmp_path: Path) -> None:
    first = run_directory.claim(config(tmp_path))
    assert run_directory.claim(config(tmp_path)) == first
    assert load(first.config) == config(tmp_path)


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    run_directory.claim(config(tmp_path))
    with pytest.raises(UserError, match="rollout.workers was 1, now 2"):
        run_directory.claim(config(tmp_path, "rollout.workers=2"))


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    directory = run_directory.claim(config(tmp_path))
    first = run_directory.lock(directory)
    with pytest.raises(UserError, match="another process"):
        run_directory.lock(directory)
    run_directory.os.close(first)
    run_directory.os.close(run_directory.lock(directory))


def test_a_path_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=PATH"):
        run_directory.claim(load("quickstart", [f"run.dir={tmp_path / 'file'}"]))


def test_a_jobs_temporary_copy_is_no_place_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "x"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match="would be lost"):
        run_directory.claim(load("quickstart"))
    assert list(copy.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"pha',
        "",
        "[]",
        "7",
        '{"round": 1}',
        '{"phase": "nope"}',
        '{"phase": "sft", "new_field": 1}',
        '{"phase": "sft", "round": "2"}',
        '{"phase": "sft", "iteration": -1}',
        "\xff\xfe",
    ],
)
def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    directory = run_directory.RunDirectory(tmp_path)
    assert run_directory.state_of(directory).round == 1
    directory.state.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"cannot be read: .*Next: restore it .*rm {directory.state}") as error:
        run_directory.state_of(directory)
    assert error.value.where == str(directory.state)
