"""A run goes on from a checkpoint of its own configuration, or says what differs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import checkpoint, resumption
from cluster.checkpoint import Checkpoint
from cluster.incident_log import IncidentLog
from cluster.run_directory import RunDirectory, claim, run_id
from cluster.schedule import Phase, RunState
from cluster.stages import Parts, RunStages
from configs.load import config_hash, load
from configs.run import RunConfig
from protocol.errors import UserError
from tests.tiny_run import tiny_config


def commit(root: Path, config: RunConfig, *, iteration: int = 2, hash: str | None = None) -> Checkpoint:
    state = RunState(phase=Phase.OPTIMISE, iteration=iteration, policy_version=iteration)
    root.mkdir(parents=True, exist_ok=True)
    return checkpoint.commit(
        root,
        checkpoint.name_of(round=1, iteration=iteration),
        driver={"state": state.to_json(), "prompts": {}, "run_id": run_id(RunDirectory(root.parent))},
        config_hash=config_hash(config) if hash is None else hash,
        write_parts=lambda staging: resumption.write_config(staging, config),
    )


def stages(config: RunConfig, directory: RunDirectory, *, trust_checkpoint: bool = False) -> RunStages:
    """The stages of a run of which nothing but its files is needed."""
    nothing: Any = None
    parts = Parts(
        crew=nothing,
        collection=nothing,
        refresh=cast("Any", SimpleNamespace(heldout=None)),
        prompts=nothing,
        make_ranking=lambda evaluated: nothing,
    )
    incidents = IncidentLog(directory.incidents, say=print)
    return RunStages(
        config,
        directory,
        parts,
        open_sinks=nothing,
        progress=nothing,
        incidents=incidents,
        trust_checkpoint=trust_checkpoint,
    )


def test_a_checkpoint_of_the_same_configuration_is_taken(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    found = commit(tmp_path / "checkpoints", config)
    assert resumption.newest(tmp_path / "checkpoints", config) == found
    assert resumption.newest(tmp_path / "none", config) is None


def test_a_run_may_be_moved(tmp_path: Path) -> None:
    commit(tmp_path / "before" / "checkpoints", tiny_config(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    assert resumption.newest(tmp_path / "after" / "checkpoints", tiny_config(tmp_path / "after")) is not None


def test_a_checkpoint_of_another_run_is_refused_unless_the_user_trusts_it(tmp_path: Path) -> None:
    """Also one without a name, from before checkpoints had any; and an older one of its own does not stand in."""
    config = tiny_config(tmp_path)
    for number, mark in enumerate(({"run_id": "another"}, {})):
        directory = RunDirectory(tmp_path / str(number))
        commit(directory.checkpoints, config, iteration=2)
        made = checkpoint.commit(
            directory.checkpoints,
            "r001-i000004",
            driver={"state": RunState(phase=Phase.OPTIMISE, iteration=4).to_json(), "prompts": {}, **mark},
            config_hash=config_hash(config),
            write_parts=lambda staging: resumption.write_config(staging, config),
        )
        with pytest.raises(UserError, match="--trust-checkpoint") as error:
            resumption.newest(directory.checkpoints, config)
        assert error.value.where == str(made.directory)
        with pytest.raises(UserError, match="--trust-checkpoint"):
            stages(config, directory).resume()
        assert resumption.newest(directory.checkpoints, config, trusts_all=True) == made
        assert stages(config, directory, trust_checkpoint=True).resume().iteration == 4


def test_a_run_whose_id_is_lost_knows_none_of_its_checkpoints(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    commit(tmp_path / "checkpoints", config)
    RunDirectory(tmp_path).run_id.unlink()
    with pytest.raises(UserError, match="not known to be of this run"):
        resumption.newest(tmp_path / "checkpoints", config)


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs_and_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    made = commit(root, tiny_config(tmp_path))
    with pytest.raises(UserError) as error:
        resumption.newest(root, tiny_config(tmp_path, "algorithm.minibatch_responses=16"))
    assert "algorithm.minibatch_responses was 8, now 16" in str(error.value)
    assert str(made.directory) in str(error.value)
    assert f"cp {made.directory / 'config.yaml'} {tmp_path / 'config.yaml'}" in str(error.value)


def test_an_older_checkpoint_does_not_stand_in_for_one_of_another_configuration(tmp_path: Path) -> None:
    root, config = tmp_path / "checkpoints", tiny_config(tmp_path)
    commit(root, config, iteration=2)
    commit(root, tiny_config(tmp_path, "run.seed=5"), iteration=4)
    with pytest.raises(UserError, match="run.seed was 5, now 0"):
        resumption.newest(root, config)


def test_a_configuration_from_before_a_key_existed_is_the_same_if_the_key_has_its_default(tmp_path: Path) -> None:
    """Its hash differs from today's; its values, as this version reads them, do not."""
    root, config = tmp_path / "checkpoints", tiny_config(tmp_path)

    def write_older(staging: Path) -> None:
        resumption.write_config(staging, config)
        text = (staging / "config.yaml").read_text()
        assert "  round_end_checkpoints_kept: 1\n" in text
        (staging / "config.yaml").write_text(text.replace("  round_end_checkpoints_kept: 1\n", ""))

    driver = {"run_id": run_id(RunDirectory(tmp_path))}
    found = checkpoint.commit(root, "r001-i000002", driver=driver, config_hash="0123456789ab", write_parts=write_older)
    assert resumption.newest(root, config) == found


def test_a_checkpoint_that_does_not_say_what_its_configuration_was_is_refused_by_its_hash(tmp_path: Path) -> None:
    config, root = tiny_config(tmp_path), tmp_path / "checkpoints"
    driver = {"run_id": run_id(RunDirectory(tmp_path))}
    checkpoint.commit(root, "r001-i000002", driver=driver, config_hash="0123", write_parts=lambda staging: None)
    with pytest.raises(UserError, match=f"its hash is 0123, the run's is {config_hash(config)}"):
        resumption.newest(root, config)


def test_a_run_whose_config_was_edited_does_not_resume_and_goes_on_when_it_is_restored(tmp_path: Path) -> None:
    directory = claim(tiny_config(tmp_path))
    commit(directory.checkpoints, tiny_config(tmp_path))
    original = directory.config.read_text()
    directory.config.write_text(original.replace("minibatch_responses: 8", "minibatch_responses: 16"))
    edited = load(directory.config)
    assert edited.algorithm.minibatch_responses == 16
    with pytest.raises(UserError, match="algorithm.minibatch_responses was 8, now 16"):
        stages(edited, directory).resume()
    directory.config.write_bytes((directory.checkpoints / "r001-i000002" / "config.yaml").read_bytes())
    assert stages(load(directory.config), directory).resume().iteration == 2


def test_a_resume_clears_leftovers_away_and_a_refused_one_does_not(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    directory = claim(config)
    commit(directory.checkpoints, config)
    leftover = directory.checkpoints / ".staging-r001-i000004-0a"
    leftover.mkdir()
    with pytest.raises(UserError):
        stages(tiny_config(tmp_path, "run.seed=5"), directory).resume()
    assert leftover.exists()
    assert stages(config, directory).resume().iteration == 2
    assert not leftover.exists()
