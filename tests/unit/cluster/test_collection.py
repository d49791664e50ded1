"""What a reward model learns from: frozen once, and counted in tasks and pairs."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import cast

from cluster import lineage
from cluster.collection import Collection
from cluster.crew import Crew
from cluster.run_directory import claim
from reward_service.preferences.records import Candidate, Label, LabeledTask, Outcome, Task
from reward_service.preferences.store import PreferenceStore
from tests.written_run import written_config


def _labeled(name: str, outcome: Outcome, ids: str) -> LabeledTask:
    candidates = tuple(
        Candidate(candidate_id=one, text=f"{name} {one}", policy="v000", policy_version=0) for one in ids
    )
    task = Task(
        task_id=name,
        round=1,
        kind="pair" if len(ids) == 2 else "ranking",
        purpose="training",
        prompt_id=name,
        prompt="Why?",
        candidates=candidates,
    )
    label = Label(
        label_id=f"of {name}",
        task_id=name,
        labeler_id="ann",
        labeler_kind="person",
        presented=tuple(ids),
        outcome=outcome,
    )
    return LabeledTask(task=task, labels=(label,))


def test_comparisons_are_frozen_and_counted_in_tasks_and_pairs(tmp_path: Path) -> None:
    config = written_config(tmp_path)
    directory = claim(config)
    ranking = Outcome(verdict="preference", ranking=(("a",), ("b", "c"), ("d",)))  # orders 5 of its 6 pairs
    entries = [
        _labeled("t1", Outcome(verdict="preference", winner="a"), "ab"),
        _labeled("t2", ranking, "abcd"),
        _labeled("t3", Outcome(verdict="tie"), "ab"),
    ]
    with closing(PreferenceStore.open(f"sqlite:///{directory.preferences}")) as store:
        store.add_labeled([entry.task for entry in entries], [entry.labels[0] for entry in entries], now=1.0)
        collection = Collection(
            config,
            directory,
            crew=cast(Crew, None),  # nothing is sampled
            store=store,
            make_labeler=lambda _: (_ for _ in ()).throw(AssertionError("nobody is asked")),
            say=print,
        )
        path = collection.comparisons(1)
        assert path is not None
        frozen = path.read_bytes()
        [artefact] = lineage.read(directory.lineage)
        assert (artefact.data["tasks"], artefact.data["pairs"]) == (2, 6)
        assert artefact.data["sha256"] == lineage.sha256(frozen)
        late = replace(entries[0].labels[0], label_id="late", supersedes="of t1", outcome=Outcome(verdict="tie"))
        store.record(late, now=2.0)
        assert collection.comparisons(1) == path
        assert path.read_bytes() == frozen
