"""Lineage: recorded once, in the order of making."""

from pathlib import Path

import pytest

from cluster import lineage
from cluster.lineage import Artefact
from protocol.errors import UserError


def test_artefacts_are_kept_in_order_and_recording_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    assert lineage.read(path) == []
    policy = Artefact(name="policies/v000", kind="policy", round=0, config="abc")
    reward = Artefact(
        name="reward_models/v000",
        kind="reward_model",
        round=1,
        config="abc",
        parents=("policies/v000",),
        data={"rows": 3},
    )
    for artefact in (policy, reward, policy):
        lineage.note(path, artefact)
    before = path.stat().st_mtime_ns
    lineage.note(path, reward)
    assert lineage.read(path) == [policy, reward]
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"policies/v000": 3}', '{"a": {"name": "a", "parents": [], "x": 1}}', "\xff"]
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lineage.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read: .*damaged. Next: restore it") as error:
        lineage.read(path)
    assert error.value.where == str(path)


def test_comparisons_are_counted_in_tasks_and_pairs() -> None:
    name = "rounds/r002/comparisons.jsonl"
    held = {"tasks": 1482, "pairs": 8892}
    now = Artefact(name=name, kind="comparisons", round=2, config="abc", data=held)
    before = Artefact(name=name, kind="comparisons", round=2, config="abc", data={"rows": 1482})
    assert lineage.compared(now) == "1,482 tasks, 8,892 pairs"
    assert lineage.compared(before) == "1,482 tasks", "what a run of before counted"
    assert lineage.compared(Artefact(name="policies/v000", kind="policy", round=0, config="abc", data=held)) is None


def test_what_the_lineage_refers_to_is_found_among_names_and_parents(tmp_path: Path) -> None:
    path = tmp_path / "lineage.json"
    assert lineage.referred(path, below="checkpoints") == set()
    parents = ("checkpoints/r001-i000002/learner", "policies/v000")
    lineage.note(path, Artefact(name="policies/v001", kind="policy", round=1, config="abc", parents=parents))
    assert lineage.referred(path, below="checkpoints") == {"r001-i000002"}
    assert lineage.referred(path, below="policies") == {"v000", "v001"}
