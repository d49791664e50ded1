"""A run whose learner shall have another size: refused, with a command that works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import checkpoint, preflight, resumption
from cluster.run_directory import RunDirectory, claim, run_id
from configs.load import config_hash, load
from configs.run import RunConfig
from protocol.errors import UserError
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_run import tiny_config

ROOT = Path(__file__).parents[3]


def command_in(error: UserError) -> list[str]:
    found = re.search(r"`(rondo train [^`]*)`", str(error))
    assert found is not None, str(error)
    return shlex.split(found[1])


def runs_dry(command: list[str]) -> str:
    """Do exactly what a person would who copies the command, but for starting anything."""
    arguments = [sys.executable, "-m", "cluster.cli", *command[1:], "--dry-run"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def export(directory: Path) -> None:
    tiny_llama(directory)
    tiny_tokenizer().save_pretrained(directory)


@pytest.fixture
def wanted(tmp_path: Path) -> RunConfig:
    """A run with policies, and its configuration with another learner."""
    root = tmp_path / "some runs"  # a path that a shell must not split
    directory = claim(tiny_config(root))
    for version in (0, 2, 10):
        export(directory.policy(version))
    (directory.root / "policies" / ".v011.tmp").mkdir()
    return tiny_config(root, "learner.workers=2", "learner.zero_stage=3")


def test_another_size_is_refused_with_a_command_that_starts_from_the_newest_policy(wanted: RunConfig) -> None:
    with pytest.raises(UserError) as error:
        claim(wanted)
    assert "learner.workers was 1, now 2; learner.zero_stage was 0, now 3" in str(error.value)
    root = Path(wanted.run.dir) / "tiny"
    assert f"continue the old one with `rondo resume {root}`" in str(error.value)
    command = command_in(error.value)
    assert "tiny-w2z3" in runs_dry(command)
    again = load(command[2], command[3:])
    assert (again.learner.workers, again.learner.zero_stage) == (2, 3)
    assert again.models.policy.path == str(root / "policies" / "v010")
    assert again.models.reference == str(root / "policies" / "v000")
    assert again.data.demonstrations is None
    assert (again.run.name, again.run.dir) == ("tiny-w2z3", wanted.run.dir)
    assert again.rounds == wanted.rounds
    preflight.check(again)  # the policy's tokenizer is there, and all prompts fit
    claim(again)


def test_an_edited_configuration_is_refused_with_the_same_command(wanted: RunConfig) -> None:
    root = Path(wanted.run.dir) / "tiny"
    before = tiny_config(Path(wanted.run.dir))
    made = checkpoint.commit(
        root / "checkpoints",
        "r001-i000002",
        driver={"state": {}, "prompts": {}, "run_id": run_id(RunDirectory(root))},
        config_hash=config_hash(before),
        write_parts=lambda staging: resumption.write_config(staging, before),
    )
    with pytest.raises(UserError) as error:
        resumption.newest(root / "checkpoints", wanted)
    assert f"cp {made.directory / 'config.yaml'} {root / 'config.yaml'}" in str(error.value)
    assert "learner.workers=2" in command_in(error.value)


def test_other_differences_and_runs_without_a_policy_get_no_such_command(tmp_path: Path) -> None:
    claim(tiny_config(tmp_path))
    for change in ("learner.workers=2", "run.seed=3"):
        with pytest.raises(UserError) as error:
            claim(tiny_config(tmp_path, change))
        assert "rondo train" not in str(error.value)
        assert "give the new run another name" in str(error.value)
        (tmp_path / "tiny" / "policies" / "v000").mkdir(parents=True, exist_ok=True)
