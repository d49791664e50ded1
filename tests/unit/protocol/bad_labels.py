"""Files for `rondo label import` that cannot be right, in rondo's own format and in those of others."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from reward_service.preferences.records import Candidate, Label, Outcome, Task, label_to_json, task_to_json
from tests.unit.protocol.bad_data import BadFile, lines, parquet, said, user

_TASK = Task(
    task_id="t1",
    round=1,
    kind="pair",
    purpose="training",
    prompt_id="p1",
    prompt="What is a tide?",
    candidates=(
        Candidate(candidate_id="a", text="The sea rises.", policy="v000", policy_version=0),
        Candidate(candidate_id="b", text="No idea.", policy="v000", policy_version=0),
    ),
)
_LABEL = Label(
    label_id="l1",
    task_id="t1",
    labeler_id="alex",
    labeler_kind="person",
    presented=("a", "b"),
    outcome=Outcome(verdict="preference", winner="a"),
)
_HEADER = {"record": "rondo-preferences", "version": 1, "tasks": 1, "labels": 1}
TASK, LABEL = {"record": "task", **task_to_json(_TASK)}, {"record": "label", **label_to_json(_LABEL)}
NATIVE = lines(_HEADER, TASK, LABEL)
"""A file that is right."""

_CHANGES: tuple[tuple[int, str, Any, str], ...] = (
    (1, "round", "one", "record 2"),
    (1, "round", 10**30, "record 2"),
    (1, "round", True, "record 2"),
    (1, "kind", "triple", "record 2"),
    (1, "purpose", "fun", "record 2"),
    (1, "prompt", 5, "record 2"),
    (1, "prompt", [{"role": 1}], "record 2"),
    (1, "candidates", "ab", "record 2"),
    (1, "candidates", [], "record 2"),
    (1, "candidates", [1, 2], "record 2"),
    (1, "candidates.0.text", None, "record 2"),
    (1, "candidates.0.token_ids", 7, "record 2"),
    (1, "candidates.0.token_ids", ["x"], "record 2"),
    (1, "candidates.0.scores", {"reward": "high"}, "record 2"),
    (1, "candidates.0.candidate_id", "b", "record 2"),
    (1, "expected", "c", "record 2"),
    (1, "metadata", [], "record 2"),
    (1, "overlap", 1.5, "record 2"),
    (1, "surprise", 1, "record 2"),
    (1, "record", "tusk", "record 2"),
    (2, "outcome", None, "record 3"),
    (2, "outcome", "a", "record 3"),
    (2, "outcome.verdict", "maybe", "record 3"),
    (2, "outcome.ranking", 3, "record 3"),
    (2, "outcome.winner", "c", "does_not_fit"),
    (2, "outcome.strength", 99, "does_not_fit"),
    (2, "presented", "a", "does_not_fit"),
    (2, "presented", 5, "record 3"),
    (2, "flags", [], "record 3"),
    (2, "ratings", {"a": "good"}, "record 3"),
    (2, "ratings", {"a": 9}, "does_not_fit"),
    (2, "note", 3, "record 3"),
    (2, "submitted_at", float("nan"), "record 3"),
    (2, "submitted_at", "now", "record 3"),
    (2, "task_id", "t2", "unknown_task"),
    (2, "supersedes", "l0", "supersedes_unknown"),
    (0, "version", 2, "version 2"),
    (0, "record", "something", "no file of preferences"),
    (0, "labels", 2, "2 labels were written, and 1 are there"),
    (0, "tasks", 0, "0 tasks were written, and 1 are there"),
)

_TALK = [user("What is a tide?"), said("The sea rises.")]
_OTHER = [user("What is a tide?"), said("No idea.")]
_BATTLE = {
    "question_id": "q",
    "model_a": "m",
    "model_b": "n",
    "winner": "model_a",
    "judge": "j",
    "conversation_a": _TALK,
    "conversation_b": _OTHER,
    "tstamp": 1.0,
}
_STEERED = {"context": [user("x")], "response1": "a", "response2": "b", "overall_preference": -1}
_FOREIGN: tuple[tuple[str, dict[str, Any], dict[str, Any], str], ...] = (
    ("arena", _BATTLE, {"winner": "model_c"}, "winner"),
    ("arena", _BATTLE, {"winner": ["model_a"]}, "winner"),
    ("arena", _BATTLE, {"winner": None}, "winner"),
    ("arena", _BATTLE, {"tstamp": "yesterday"}, "tstamp"),
    ("arena", _BATTLE, {"tstamp": [1]}, "tstamp"),
    ("arena", _BATTLE, {"tstamp": float("inf")}, "tstamp"),
    ("arena", _BATTLE, {"model_a": None}, "model_a"),
    ("arena", _BATTLE, {"conversation_a": None}, "conversations"),
    ("arena", _BATTLE, {"conversation_a": "hello"}, "conversations"),
    ("arena", _BATTLE, {"conversation_a": [said(None)]}, "conversations"),
    ("arena", _BATTLE, {"conversation_a": [{"role": "user"}]}, "conversations"),
    ("arena", _BATTLE, {"conversation_b": [user("\ud83d"), said("x")]}, "half a character"),
    ("arena", _BATTLE, {"round": 10**30}, "no round"),
    ("arena", _BATTLE, {"round": -1}, "no round"),
    ("helpsteer3", _STEERED, {"context": "x"}, "conversations"),
    ("helpsteer3", _STEERED, {"context": None}, "context"),
    ("helpsteer3", _STEERED, {"response1": 1}, "response1"),
    ("helpsteer3", _STEERED, {"overall_preference": None}, "overall_preference"),
    ("helpsteer3", _STEERED, {"individual_preference": "much"}, "individual_preference"),
    ("helpsteer3", _STEERED, {"individual_preference": [3]}, "individual_preference"),
    ("trl-preference", {"prompt": "x", "chosen": "a", "rejected": "b"}, {"chosen": ""}, "chosen is empty"),
    ("trl-preference", {"prompt": "x", "chosen": "a", "rejected": "b"}, {"margin": "x"}, "margin"),
    ("trl-preference", {"prompt": "x", "chosen": "a", "rejected": "b"}, {"rejected": None}, "known record type"),
    ("trl-unpaired", {"prompt": "x", "completion": "a", "label": True}, {"label": "yes"}, "neither true nor false"),
    ("trl-unpaired", {"prompt": "x", "completion": "a", "label": True}, {"label": None}, "prompt, completion, label"),
    ("kwise", {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 2]}, {"ranks": [1]}, "same length"),
    ("kwise", {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 2]}, {"ranks": None}, "ranks"),
)


def label_files() -> Iterator[BadFile]:
    """Bad files of preferences."""
    for row, path, value, says in _CHANGES:
        rows = deepcopy([_HEADER, TASK, LABEL])
        *parents, last = path.split(".")
        node: Any = rows[row]
        for name in parents:
            node = node[int(name)] if name.isdecimal() else node[name]
        node[last] = value
        name = f"own: {path} of record {row + 1} is {str(value)[:20]}"
        yield BadFile(name=name, path="x.jsonl", content=lines(*rows), says=("x.jsonl", says), format="jsonl")
    for cut in (10, 60, 200, len(NATIVE) - 5):
        yield BadFile(name=f"own: cut at {cut}", path="x.jsonl", content=NATIVE[:cut], says=("line",), format="jsonl")
    without_label = b"".join(NATIVE.splitlines(keepends=True)[:2])
    yield BadFile(
        name="own: cut between lines", path="x.jsonl", content=without_label, says=("0 are there",), format="jsonl"
    )
    for name, body, says in (
        ("a cut body", '{"record": "ta', "record 2"),
        ("a list as body", "[]", "record 2"),
        ("no body", None, "record 2"),
        ("a deep body", "[" * 100_000, "record 2"),
    ):
        content = parquet([{"body": json.dumps(_HEADER)}, {"body": body}])
        yield BadFile(
            name=f"own Parquet: {name}", path="x.parquet", content=content, says=("x.parquet", says), format="parquet"
        )
    for format, good, change, says in _FOREIGN:
        content = lines(good, good | change)
        name = f"{format}: {str(change)[:60]}"
        yield BadFile(name=name, path="x.jsonl", content=content, says=("row 2", says), format=format)
