"""After a loss or a refusal the learner starts again, so often and no oftener; a record says what was done."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.incident_log import IncidentLog
from cluster.run_directory import RunDirectory
from cluster.stages import Parts, RunStages
from protocol.errors import LearnerLostError, NonFiniteError, RollbackError
from tests.tiny_run import tiny_config


class Recovery:
    """The stages of a run of which only the learner's fate matters."""

    def __init__(self, directory: Path, *, restarts: int) -> None:
        self.stopped: list[str] = []
        config = tiny_config(directory, f"cluster.learner_restarts={restarts}")
        self.directory = RunDirectory(directory / "tiny")
        crew: Any = SimpleNamespace(stop_learner=lambda: self.stopped.append("learner"))
        prompts: Any = SimpleNamespace(rewind=lambda: self.stopped.append("prompts"))
        nothing: Any = None
        refresh = cast("Any", SimpleNamespace(heldout=None))
        parts = Parts(crew=crew, collection=nothing, refresh=refresh, prompts=prompts, make_ranking=lambda _: nothing)
        incidents = IncidentLog(self.directory.incidents, say=print)
        self.stages = RunStages(
            config, self.directory, parts, open_sinks=nothing, progress=nothing, incidents=incidents
        )

    def incidents(self) -> list[tuple[str, str]]:
        found = [json.loads(path.read_text()) for path in self.directory.incidents.glob("*.json")]
        return [(i["kind"], i["action"]) for i in sorted(found, key=lambda i: i["at"])]


def refused(iteration: int) -> RollbackError:
    error = RollbackError("gradient of the policy is not finite at step 8", round=1, iteration=iteration)
    error.__cause__ = NonFiniteError("gradient of the policy", "step 8")
    return error


AGAIN = "all ranks start again, from the last checkpoint"


def test_a_refused_batch_rolls_back_once_and_the_second_time_stops_with_the_cause(tmp_path: Path) -> None:
    run = Recovery(tmp_path, restarts=9)
    assert run.stages.recover(refused(4)).iteration == 0
    assert run.stopped == ["learner", "prompts"]
    with pytest.raises(RollbackError, match="iteration 4 of round 1: gradient of the policy is not finite at step 8"):
        run.stages.recover(refused(4))
    assert run.incidents() == [
        ("rolled_back", AGAIN),
        ("rolled_back", "the run stops: after a rollback the learner refuses the same iteration again"),
    ]
    assert run.stopped == ["learner", "prompts"]


def test_rollbacks_of_other_iterations_and_losses_share_one_budget(tmp_path: Path) -> None:
    run = Recovery(tmp_path, restarts=2)
    run.stages.recover(refused(4))
    run.stages.recover(LearnerLostError("lost learner-0", stacks={"learner-0": "asleep"}))
    with pytest.raises(RollbackError):
        run.stages.recover(refused(6))
    assert run.incidents() == [
        ("rolled_back", AGAIN),
        ("learner_lost", AGAIN),
        ("rolled_back", "the run stops: cluster.learner_restarts is used up"),
    ]
