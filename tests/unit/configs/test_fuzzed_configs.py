"""Five hundred bad configurations: each is refused at once, in one message that names the place, and writes nothing."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import PRESETS, dump, load
from tests.command_line import assert_refused, command
from tests.unit.configs.bad_configs import NUM_CASES, Case, all_cases

ROOT = Path(__file__).parents[3]
CASES = all_cases()
SUBPROCESSES = random.Random(7).sample(CASES, 4)


def test_there_are_five_hundred_different_ones() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == NUM_CASES
    assert len({(case.content, case.overrides) for case in CASES}) == NUM_CASES


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments_of(case: Case) -> list[str]:
    if case.content is not None:
        Path("mine.yaml").write_bytes(case.content)
    return ["quickstart" if case.content is None else "mine.yaml", *case.overrides]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_configuration_is_refused(case: Case, here: Path) -> None:
    arguments = arguments_of(case)
    before = sorted(here.rglob("*"))
    ended = command("train", *arguments, "--dry-run")
    assert_refused(ended, case.says)
    assert sorted(here.rglob("*")) == before
    if case.meant is not None:
        suggested = ended.err.partition(case.says)[2].partition("?")[0]
        assert case.meant in suggested.split(" or ")


@pytest.mark.parametrize("case", SUBPROCESSES, ids=lambda case: case.name)
def test_a_process_of_its_own_refuses_it_alike(case: Case, here: Path) -> None:
    arguments = arguments_of(case)
    before = sorted(here.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert case.says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(here.rglob("*")) == before


def test_what_is_not_a_file_is_refused(here: Path) -> None:
    (here / "folder.yaml").mkdir()
    os.mkfifo(here / "pipe.yaml")
    for source, says in (
        ("folder.yaml", "is a directory"),
        ("pipe.yaml", "no configuration file at pipe.yaml"),
        ("missing.yaml", "no configuration file at missing.yaml"),
        ("x" * 5000, "can not be read"),
        ("no/such/folder/quickstart.yaml", "no configuration file"),
        ("", "is a directory"),
    ):
        assert_refused(command("train", source, "--dry-run"), says)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_what_is_accepted_is_what_was_asked(name: str) -> None:
    """Every value of every preset, given once more on the command line, gives the same configuration."""
    config = load(name)
    # JSON is YAML, so this is every section as a user may write it.
    values = config.model_dump(mode="json")
    overrides = [f"{section}={json.dumps(inner)}" for section, inner in values.items()]
    assert dump(load(name, overrides)) == dump(config)
