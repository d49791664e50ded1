"""When a run waits for its checkpoints: the end of a round needs one, the others may fail on a full disk."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster import stages as module
from cluster.checkpoint import verify
from cluster.incident_log import IncidentLog
from cluster.run_directory import RunDirectory, claim
from cluster.schedule import Phase, RunState
from cluster.stages import Parts, RunStages
from cluster.stopping import Stopped
from cluster.tracking import Sinks
from protocol.errors import LearnerLostError, Resumable, StorageError
from protocol.messages import IterationReport
from tests.tiny_run import tiny_config


class Learner:
    """A learner's state that is one number in a file, on a disk that can be full."""

    def __init__(self) -> None:
        self.updates = 0
        self.refusals = 0
        self.attempts = 0
        self.restored: list[tuple[str, str, str]] = []

    def load(self, directory: Path) -> None:
        self.restored.append(("all", directory.parent.name, (directory / "updates").read_text()))

    def carry_over(self, directory: Path) -> None:
        self.restored.append(("what outlives a round", directory.parent.name, (directory / "updates").read_text()))

    def save(self, directory: Path) -> None:
        self.attempts += 1
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        (directory / "updates").write_text(str(self.updates))


class Crew:
    """Has a learner, and nobody else."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.draining: list[str] = []

    @property
    def updates(self) -> int:
        return self.learner.updates

    def start_rl(self, round: int, **of_round: Any) -> None:
        """Build nothing."""

    def holds(self, version: int) -> None:
        """Take note of nothing."""

    def ranks_to_go(self) -> list[str]:
        return self.draining

    def stop_learner(self) -> None:
        """Stop nothing."""

    def release(self) -> None:
        """Release nothing."""


class Run:
    """The stages of a run of which nothing but its learner and its files is needed."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.config = tiny_config(root, "tracking.save_rollouts=false", "rounds.iterations=4", *overrides)
        self.directory: RunDirectory = claim(self.config)
        self.learner = Learner()
        self.said: list[str] = []
        self.crew = Crew(self.learner)
        prompts = SimpleNamespace(
            stream=lambda: SimpleNamespace(
                state_dict=lambda: {"taken": self.learner.updates}, load_state_dict=lambda state: None
            ),
            rewind=lambda: None,
        )
        nothing: Any = None
        parts = Parts(
            crew=cast("Any", self.crew),
            collection=nothing,
            refresh=cast("Any", SimpleNamespace(heldout=None)),
            prompts=cast("Any", prompts),
            make_ranking=lambda evaluated: nothing,
        )
        incidents = IncidentLog(self.directory.incidents, say=self.said.append)
        self.stages = RunStages(
            self.config, self.directory, parts, open_sinks=nothing, progress=nothing, incidents=incidents
        )
        self.stages._sinks = Sinks(())

    def iterate(self, done: int) -> RunState:
        """Finish an iteration; checkpoints are due after the second and the fourth, which is the round's last."""
        self.learner.updates += 1
        phase = Phase.EVALUATE if done == 4 else Phase.OPTIMISE
        state = RunState(phase=phase, iteration=done, policy_version=done)
        report = IterationReport(round=1, iteration=done - 1, policy_version=done, metrics={}, samples=())
        self.stages.iterated(report, state)
        return state

    @property
    def committed(self) -> list[tuple[str, str]]:
        found = sorted(path for path in self.directory.checkpoints.iterdir() if not path.name.startswith("."))
        for path in found:
            verify(path)
        return [(path.name, (path / "learner" / "updates").read_text()) for path in found]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)


def test_a_phase_is_reached_when_its_checkpoint_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    *_, state = [run.iterate(done) for done in (1, 2, 3, 4)]
    seen: list[Any] = []
    monkeypatch.setattr(module, "write_json", lambda path, values: seen.append(run.committed))
    run.stages.reached(state)
    assert seen == [[("r001-i000002", "2"), ("r001-i000004", "4")]]


def test_a_checkpoint_names_its_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.stages.reached(run.iterate(4))
    found = verify(run.directory.checkpoints / "r001-i000004")
    assert found.driver["run_id"] == run.directory.run_id.read_text()


def test_a_periodic_checkpoint_may_fail_and_is_not_tried_again_before_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.iterate(1)
    run.learner.refusals = 1
    run.iterate(2)
    run.iterate(3)
    assert run.learner.attempts == 1
    run.stages.reached(run.iterate(4))
    assert run.committed == [("r001-i000004", "4")]
    [line] = run.said
    assert "checkpoint r001-i000002 was not committed" in line


def test_the_end_of_a_round_is_tried_again_where_it_stands_until_there_is_room(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.learner.refusals = 3
    run.stages.reached(run.iterate(4))
    assert run.learner.attempts == 4
    assert run.committed == [("r001-i000004", "1")]
    assert len(run.said) == 3
    assert json.loads(run.directory.state.read_text())["phase"] == "evaluate"


def test_a_round_that_cannot_be_kept_is_not_left(tmp_path: Path) -> None:
    run = Run(tmp_path, "cluster.checkpoint_failures_allowed=2")
    run.iterate(2)
    run.learner.refusals = 100
    state = run.iterate(4)
    with pytest.raises(StorageError, match="3 times in a row; .*r001-i000002 stands"):
        run.stages.reached(state)
    assert run.learner.attempts == 4
    assert not run.directory.state.exists()
    assert run.committed == [("r001-i000002", "1")]


def test_a_run_that_must_stop_keeps_what_the_learner_holds(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.iterate(2)
    run.stages.save()
    assert run.learner.attempts == 1  # that one was committed already
    run.iterate(3)
    run.stages.save()
    assert run.committed == [("r001-i000002", "1"), ("r001-i000003", "2")]
    run.learner.updates += 1  # it has moved on from the end of the iteration
    run.stages.save()
    assert run.learner.attempts == 2


def test_a_run_whose_learner_is_on_a_node_that_is_drained_is_committed_and_ends(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.crew.draining = ["learner-1"]
    with pytest.raises(Resumable, match="Ray drains the node of learner-1"):
        run.iterate(1)
    assert run.committed == [("r001-i000001", "1")]


def test_a_periodic_checkpoint_that_failed_is_made_up_for_when_the_run_must_stop(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.learner.refusals = 1
    run.iterate(2)
    run.stages.save()
    assert run.committed == [("r001-i000002", "1")]


def test_a_lost_learner_goes_on_from_the_commit_that_was_under_way(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.iterate(2)
    assert run.stages._committer.latest is None  # nobody has taken note of it yet
    state = run.stages.recover(LearnerLostError("learner-0 died"))
    assert (state.iteration, state.policy_version) == (2, 2)


def test_a_lost_learner_is_not_asked_to_save_and_not_started_again_after_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.iterate(1)
    monkeypatch.setattr(module.STOPPING, "asked", True)
    with pytest.raises(Stopped):
        run.stages.recover(LearnerLostError("learner-0 died"))
    run.stages.save()
    assert run.learner.attempts == 0


def test_a_run_that_ends_waits_for_its_last_commit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.iterate(2)
    run.stages.close()
    assert run.committed == [("r001-i000002", "1")]


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_a_phase_goes_on_from_the_end_of_the_iterations_before_it_or_these_are_repeated(tmp_path: Path) -> None:
    """The prompt cursor is in that checkpoint: an older one would hand prompts out a second time, and say nothing."""
    run = Run(tmp_path, "rounds.count=2")
    for done in (1, 2, 3):
        run.iterate(done)
    run.stages.reached(run.iterate(4))
    run.directory.policy(4).mkdir(parents=True)  # the round's policy is exported

    def resumed(phase: Phase, round: int, iteration: int) -> tuple[str, int, int]:
        state = RunState(phase=phase, round=round, iteration=iteration, policy_version=4)
        run.directory.state.write_text(json.dumps(state.to_json()))
        found = run.stages.resume()
        return found.phase.value, found.round, found.iteration

    before = [Phase.COLLECT, Phase.LABEL, Phase.REFRESH, Phase.CALIBRATE, Phase.BASELINE, Phase.OPTIMISE]
    after = [Phase.EVALUATE, Phase.RANK, Phase.DONE]
    for phase in before:
        assert resumed(phase, 2, 0) == (phase.value, 2, 0)
        assert resumed(phase, 1, 0) == ("evaluate", 1, 4)  # the checkpoint is ahead
    for phase in after:
        assert resumed(phase, 1, 4) == (phase.value, 1, 4)
        assert resumed(phase, 2, 4) == ("evaluate", 1, 4)  # the second round's iterations are repeated

    damaged = run.directory.checkpoints / "r001-i000004" / "learner" / "updates"
    damaged.write_text("5")
    for place in [(phase, 2, 0) for phase in before] + [(phase, 1, 4) for phase in after]:
        assert resumed(*place) == ("optimise", 1, 2)
        assert run.stages._committer.latest is not None
        assert run.stages._committer.latest.driver["prompts"] == {"taken": 2}


@pytest.mark.parametrize("is_new_process", [False, True], ids=["same process", "new process"])
def test_a_round_begins_with_what_outlives_the_one_before(tmp_path: Path, is_new_process: bool) -> None:
    run = Run(tmp_path, "rounds.count=2")
    run.stages._start_learning(RunState(phase=Phase.OPTIMISE))
    assert run.learner.restored == []
    *_, state = [run.iterate(done) for done in (1, 2, 3, 4)]
    run.stages.reached(state)
    following = replace(state, phase=Phase.OPTIMISE, round=2, iteration=0)
    run.stages.reached(following)
    if is_new_process:
        run = Run(tmp_path, "rounds.count=2")
        assert run.stages.resume() == following
    run.stages._start_learning(following)
    assert run.learner.restored == [("what outlives a round", "r001-i000004", "4")]
    run.stages._start_learning(replace(following, round=1, iteration=4))
    assert run.learner.restored[1:] == [("all", "r001-i000004", "4")]
