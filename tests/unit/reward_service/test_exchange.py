"""Preferences out and in again, in rondo's own formats and in those of others."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from protocol.datasets import ReadReport, peek, read_preferences
from protocol.errors import UserError
from protocol.records import PreferenceRecord, RecordKind
from reward_service.preferences.exchange import Format, export, read_import, training_rows
from reward_service.preferences.outbound import num_pairs
from reward_service.preferences.records import Candidate, Label, LabeledTask, Outcome, Task
from reward_service.preferences.store import PreferenceStore

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
TIE, BAD = Outcome(verdict="tie"), Outcome(verdict="both_bad")
SKIP, INVALID = Outcome(verdict="skip", reason="?"), Outcome(verdict="invalid", reason="garbage")


def wins(winner: str, strength: int | None = None) -> Outcome:
    return Outcome(verdict="preference", winner=winner, strength=strength)


def ranks(*groups: str) -> Outcome:
    return Outcome(verdict="preference", ranking=tuple(tuple(group) for group in groups))


def labeled(name: str, *outcomes: Outcome, ids: str = "ab", **changes: Any) -> LabeledTask:
    """Make a task whose responses are `NAME says a` and so on, and a label by each of the labelers l0, l1, ..."""
    candidates = tuple(
        Candidate(candidate_id=one, text=f"{name} says {one}", policy=f"v00{place}", policy_version=place)
        for place, one in enumerate(ids)
    )
    kind = "pair" if len(ids) == 2 else "ranking"
    fields = {"round": 3, "kind": kind, "purpose": "training", "prompt_id": f"p-{name}", "prompt": "Why?"}
    task = Task(**{"task_id": name, "candidates": candidates, **fields, **changes})
    labels = tuple(
        Label(
            label_id=f"{name}-{number}",
            task_id=name,
            labeler_id=f"l{number}",
            labeler_kind="person",
            presented=tuple(reversed(ids)),
            outcome=outcome,
            submitted_at=100.5 + number,
        )
        for number, outcome in enumerate(outcomes)
    )
    return LabeledTask(task=task, labels=labels)


def with_texts(entry: LabeledTask, *texts: str) -> LabeledTask:
    pairs = zip(entry.task.candidates, texts, strict=True)
    candidates = tuple(replace(candidate, text=text) for candidate, text in pairs)
    return replace(entry, task=replace(entry.task, candidates=candidates))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exported(tmp_path: Path, entries: list[LabeledTask], format: Format) -> tuple[list[dict[str, Any]], ReadReport]:
    path = tmp_path / "out.jsonl"
    report = export(entries, path, format=format)
    return rows_of(path), report


def written(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_our_own_formats_lose_nothing(tmp_path: Path, format: Format) -> None:
    pair = labeled("t1", wins("a", 2), purpose="evaluation", prompt=CHAT, overlap=2, metadata={"topic": "ü"})
    candidate = replace(
        pair.task.candidates[0],
        text="\x00 \ud83d \u202e <script>",
        sampling={"temperature": 0.1},
        finish_reason="stop",
        token_ids=(5, 6),
        scores={"rm": -0.1},
    )
    task = replace(pair.task, candidates=(candidate, pair.task.candidates[1]), expected="b")
    first = replace(pair.labels[0], ratings={"a": 7}, flags={"b": ("untrue", "harmful")}, note="\x00", ui_version="1")
    correction = replace(first, label_id="c", outcome=BAD, supersedes=first.label_id)
    ranking = labeled("t2", ranks("c", "ab"), ids="abc")
    unlabeled = labeled("t3").task
    with closing(PreferenceStore.open(f"sqlite:///{tmp_path}/store.db")) as store:
        store.add_tasks([task, ranking.task, unlabeled])
        store.record_all([first, correction, *ranking.labels], now=1.0)
        path = tmp_path / f"all.{format}"
        report = export(store, path, format=format)
    assert report.num_kept == 6
    tasks, labels = read_import(path, format=format)
    assert tasks == [task, ranking.task, unlabeled]
    assert labels == [first, correction, *ranking.labels]
    with closing(PreferenceStore.open(f"sqlite:///{tmp_path}/other.db")) as other:
        assert other.add_tasks(tasks) == 3
        assert other.record_all(labels, now=2.0) == 3
        again = tmp_path / f"again.{format}"
        export(other, again, format=format)
    assert again.read_bytes() == path.read_bytes()


def test_the_parquet_file_can_be_queried_by_column(tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    export([labeled("t1", wins("b", 3))], path, format="parquet")
    columns = parquet.read_table(path).to_pydict()
    assert columns["record"] == ["rondo-preferences", "task", "label"]
    assert columns["task_id"] == [None, "t1", "t1"]
    assert columns["winner"] == [None, None, "b"]
    assert columns["strength"] == [None, None, 3]
    assert columns["submitted_at"] == [None, None, 100.5]


def test_a_file_of_something_else_or_of_the_future_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of preferences that rondo wrote"):
        read_import(written(tmp_path, {"prompt": "x", "chosen": "a", "rejected": "b"}), format="jsonl")
    with pytest.raises(UserError, match="version 2"):
        read_import(written(tmp_path, {"record": "rondo-preferences", "version": 2}), format="jsonl")
    damaged = written(tmp_path, {"record": "rondo-preferences", "version": 1}, {"record": "task", "task_id": "t1"})
    with pytest.raises(UserError, match="record 2"):
        read_import(damaged, format="jsonl")
    with pytest.raises(UserError, match="row 1"):
        read_import(written(tmp_path, {"prompt": "x"}), format="trl-preference")
    with pytest.raises(UserError, match="overall_preference"):
        read_import(written(tmp_path, {"prompt": "x"}), format="helpsteer3")


def test_training_rows_hold_the_consensus_and_count_the_rest() -> None:
    entries = [
        labeled("one", wins("b")),
        labeled("strong", wins("a", 3), wins("a", 2), wins("b", 1), prompt=CHAT),
        labeled("tie", TIE, TIE, wins("a")),
        labeled("bad", BAD),
        labeled("split", wins("a"), wins("b")),
        labeled("half", wins("a"), TIE),
        labeled("skip", SKIP),
        labeled("invalid", INVALID),
        labeled("nobody"),
        labeled("outvoted", SKIP, INVALID, wins("a")),
        with_texts(labeled("same", wins("a")), "x", "x"),
        with_texts(labeled("empty", wins("a")), "x", " "),
        labeled("ranked", ranks("c", "ab"), ids="abc"),
        labeled("mean", ranks("a", "b", "c"), ranks("b", "c", "a"), TIE, ids="abc"),
        labeled("level", ranks("a", "b", "c"), ranks("c", "b", "a"), ids="abc"),
    ]
    report = ReadReport(source="round 3")
    rows = list(training_rows(entries, source="round 3", report=report))
    answers = [[{"role": "assistant", "content": f"strong says {one}"}] for one in "ab"]
    shared = {"prompt": "Why?", "source": "round 3"}
    assert rows == [
        {"chosen": "one says b", "rejected": "one says a", "margin": None, **shared},
        {"prompt": CHAT, "chosen": answers[0], "rejected": answers[1], "margin": 2.5, "source": "round 3"},
        {"chosen": "outvoted says a", "rejected": "outvoted says b", "margin": None, **shared},
        {"completions": ["ranked says a", "ranked says b", "ranked says c"], "ranks": [2, 2, 1], **shared},
        # Places: a 1, 3, 2; b 2, 1, 2; c 3, 2, 2.
        {"completions": ["mean says a", "mean says b", "mean says c"], "ranks": [2, 1, 3], **shared},
    ]
    assert report.num_kept == 5
    assert report.dropped == {
        "tie": 2,
        "both bad": 1,
        "no majority": 2,
        "skipped": 1,
        "invalid": 1,
        "no label": 1,
        "identical responses": 1,
        "empty response": 1,
    }


def test_training_rows_are_read_by_the_data_module(tmp_path: Path) -> None:
    entries = [
        labeled("t1", wins("b", 1)),
        labeled("t2", wins("a"), prompt=CHAT),
        labeled("t3", ranks("c", "ab"), ids="abc"),
    ]
    path = written(tmp_path, *training_rows(entries, source="round 3"))
    records = list(read_preferences(str(path)))
    assert records[0] == PreferenceRecord(prompt="Why?", chosen="t1 says b", rejected="t1 says a", margin=1.0)
    assert [record.margin for record in records] == [1.0, None, None, None]
    assert {record.chosen for record in records[2:]} == {"t3 says c"}


def test_trl_preferences(tmp_path: Path) -> None:
    entries = [
        labeled("t1", wins("b", 3)),
        labeled("t2", wins("a"), prompt=CHAT),
        labeled("t3", TIE),
        labeled("t4", BAD),
        labeled("t5", SKIP),
        labeled("t6", ranks("c", "ab"), ids="abc"),
        labeled("t7", wins("a"), purpose="evaluation"),
    ]
    rows, report = exported(tmp_path, entries, "trl-preference")
    common = {"round": 3, "source": "round 3"}
    assert rows[0] == {"prompt": "Why?", "chosen": "t1 says b", "rejected": "t1 says a", "margin": 3.0, **common}
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "t2 says a"}]
    assert rows[1]["prompt"] == CHAT
    assert [row["margin"] for row in rows] == [3.0, 0.0, 0.0, 0.0]
    assert [(row["chosen"], row["rejected"]) for row in rows[2:]] == [
        ("t6 says c", "t6 says a"),
        ("t6 says c", "t6 says b"),
    ]
    assert report.num_kept == 4
    assert report.dropped == {"a task for evaluation": 1, "tie": 1, "both bad": 1, "skipped": 1}
    assert report.summary().startswith("4 pairs from 3 of 7 tasks; 1 task left out: a task for evaluation")
    assert "1 task left out: tie (such as t3)" in report.summary()
    assert peek(str(tmp_path / "out.jsonl")).kind is RecordKind.PREFERENCE


def test_what_is_left_out_is_counted_by_what_it_is(tmp_path: Path) -> None:
    entry = labeled("t1", ranks("a", "b", "c"), ids="abc")
    twins = tuple(replace(one, text="the same") for one in entry.task.candidates[:2])
    task = replace(entry.task, candidates=(*twins, entry.task.candidates[2]))
    _, report = exported(tmp_path, [LabeledTask(task=task, labels=entry.labels)], "trl-preference")
    assert report.summary() == "2 pairs from 1 of 1 task; 1 pair left out: identical responses (such as t1)"


def test_pairs_of_a_row_are_those_that_it_orders() -> None:
    assert num_pairs({"chosen": "a", "rejected": "b"}) == 1
    assert num_pairs({"ranks": [1, 2, 3, 4]}) == 6
    assert num_pairs({"ranks": [1, 1, 2]}) == 2


def test_trl_preferences_without_any_strength_have_no_margin(tmp_path: Path) -> None:
    rows, _ = exported(tmp_path, [labeled("t1", wins("b")), labeled("t2", wins("a"))], "trl-preference")
    assert all(set(row) == {"prompt", "chosen", "rejected", "round", "source"} for row in rows)


def test_trl_preferences_come_back(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "Why?", "chosen": "A", "rejected": "B", "margin": 2.0, "round": 4, "source": "crowd", "id": 7},
        {
            "prompt": CHAT,
            "chosen": [{"role": "assistant", "content": "C"}],
            "rejected": [{"role": "assistant", "content": "D"}],
        },
        {"prompt": "Why?", "chosen": "A", "rejected": "B", "margin": 2.0, "round": 4, "source": "crowd", "id": 7},
        {"chosen": "Q: hi A: yes", "rejected": "Q: hi A: no", "margin": 0.7},
    )
    report = ReadReport(source="x")
    tasks, labels = read_import(path, format="trl-preference", round=1, report=report)
    assert report.num_kept == 4
    assert [(one.round, one.prompt, one.overlap) for one in tasks] == [
        (4, "Why?", 2),
        (1, CHAT, 1),
        (1, "Q: hi A: ", 1),
    ]
    assert [[candidate.text for candidate in one.candidates] for one in tasks] == [
        ["A", "B"],
        ["C", "D"],
        ["yes", "no"],
    ]
    assert {candidate.policy for one in tasks for candidate in one.candidates} == {"imported"}
    assert [one.outcome.strength for one in labels] == [2, 2, None, None]
    assert [one.labeler_id for one in labels] == ["imported-1", "imported-2", "imported-1", "imported-1"]
    assert {one.labeler_kind for one in labels} == {"imported"}
    assert json.loads(tasks[0].metadata["columns"]) == {"source": "crowd", "id": 7}
    assert json.loads(tasks[2].metadata["columns"]) == {"margin": 0.7}
    assert read_import(path, format="trl-preference", round=1) == (tasks, labels)
    with closing(PreferenceStore.open(f"sqlite:///{tmp_path}/store.db")) as store:
        store.add_tasks(tasks)
        assert store.record_all(labels, now=1.0) == 4
        export(store, tmp_path / "out.jsonl", format="trl-preference")
    back = rows_of(tmp_path / "out.jsonl")
    assert back[0] == {"prompt": "Why?", "chosen": "A", "rejected": "B", "margin": 2.0, "round": 4, "source": "crowd"}


def test_trl_unpaired(tmp_path: Path) -> None:
    rated = labeled("t1", TIE)
    rated = replace(rated, labels=(replace(rated.labels[0], ratings={"a": 6, "b": 4}),))
    entries = [
        rated,
        labeled("t2", wins("b")),
        labeled("t3", BAD),
        labeled("t4", TIE),
        labeled("t5", ranks("b", "c", "a"), ids="abc"),
    ]
    rows, report = exported(tmp_path, entries, "trl-unpaired")
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("t1 says a", True),
        ("t2 says a", False),
        ("t2 says b", True),
        ("t3 says a", False),
        ("t3 says b", False),
        ("t5 says a", False),
        ("t5 says b", True),
    ]
    assert report.dropped == {"rated in the middle": 1, "tie": 1, "neither best nor last": 1}
    assert peek(str(tmp_path / "out.jsonl")).kind is RecordKind.UNPAIRED_PREFERENCE


def test_trl_unpaired_comes_back(tmp_path: Path) -> None:
    said = [
        ("p", "A", True),
        ("p", "B", False),
        ("q", "C", True),
        ("r", "D", True),
        ("r", "E", True),
        ("r", "F", False),
    ]
    said += [("s", "G", False), ("s", "H", False), ("t", "I", True), ("t", "J", True)]
    path = written(tmp_path, *({"prompt": p, "completion": c, "label": good} for p, c, good in said))
    report = ReadReport(source="x")
    tasks, labels = read_import(path, format="trl-unpaired", report=report)
    assert report.dropped == {"a response alone, with nothing to compare it with": 1}
    assert [one.outcome.verdict for one in labels] == ["preference", "preference", "both_bad", "tie"]
    assert [len(group) for group in labels[1].outcome.ranking] == [2, 1]
    entries = [LabeledTask(task=one, labels=(given,)) for one, given in zip(tasks, labels, strict=True)]
    rows, _ = exported(tmp_path, entries, "trl-unpaired")
    assert [(row["prompt"], row["completion"], row["label"]) for row in rows] == [one for one in said if one[0] != "q"]


def test_kwise_rows_go_out_and_come_back(tmp_path: Path) -> None:
    entries = [
        labeled("t1", ranks("c", "ab"), ids="abc", prompt=CHAT),
        labeled("t2", wins("b")),
        labeled("t3", TIE),
        labeled("t4", BAD),
    ]
    rows, report = exported(tmp_path, entries, "kwise")
    assert [row["ranks"] for row in rows] == [[2, 2, 1], [2, 1], [1, 1]]
    assert report.dropped == {"both bad": 1}
    too_many = {"prompt": "p", "completions": [str(n) for n in range(10)], "ranks": list(range(10))}
    counted = ReadReport(source="x")
    tasks, labels = read_import(written(tmp_path, *rows, too_many), format="kwise", report=counted)
    assert counted.dropped == {"more than 9 responses": 1}
    assert [one.kind for one in tasks] == ["ranking", "pair", "pair"]
    again = [LabeledTask(task=one, labels=(given,)) for one, given in zip(tasks, labels, strict=True)]
    assert exported(tmp_path, again, "kwise")[0] == rows


def test_helpsteer_goes_out(tmp_path: Path) -> None:
    entries = [
        labeled("t1", wins("a", 3), wins("a", 1), wins("a", 2)),
        labeled("t2", wins("b"), TIE, prompt=CHAT),
        labeled("t3", BAD, SKIP),
        labeled("t4", ranks("a", "b", "c"), ids="abc"),
    ]
    rows, report = exported(tmp_path, entries, "helpsteer3")
    blank = {"reasoning": "", "feedback1": "", "feedback2": ""}
    assert rows[0] == {
        "context": [{"role": "user", "content": "Why?"}],
        "response1": "t1 says a",
        "response2": "t1 says b",
        "overall_preference": -2,
        "individual_preference": [{"score": score, **blank} for score in (-3, -1, -2)],
    }
    assert [one["score"] for one in rows[1]["individual_preference"]] == [2, 0]
    assert (rows[1]["context"], rows[1]["overall_preference"]) == (CHAT, 1)
    assert rows[2]["overall_preference"] == 0
    assert report.num_kept == 3
    assert report.dropped == {"skipped": 1, "a ranking": 1}


def test_helpsteer_comes_back(tmp_path: Path) -> None:
    def said(score: int | None, why: str) -> dict[str, Any]:
        return {"score": score, "reasoning": why, "feedback1": "", "feedback2": ""}

    first = {"domain": "code", "language": "python", "context": CHAT, "response1": "A", "response2": "B"}
    first |= {"overall_preference": -2, "individual_preference": [said(-3, "x"), said(0, "y"), said(-3, "z")]}
    second = {"context": CHAT, "response1": "C", "response2": "D", "overall_preference": 1}
    third = {**second, "response1": "E", "individual_preference": [said(None, "w"), said(2, "v")]}
    path = written(tmp_path, first, second, third)
    report = ReadReport(source="x")
    tasks, labels = read_import(path, format="helpsteer3", report=report)
    assert report.dropped == {"a score that is no whole number from -3 to 3": 1}
    assert [one.overlap for one in tasks] == [3, 1, 1]
    ids = [one.candidate_id for one in tasks[0].candidates]
    assert [one.outcome for one in labels[:3]] == [wins(ids[0], 3), TIE, wins(ids[0], 3)]
    assert [one.note for one in labels[:3]] == ["x", "y", "z"]
    entries = [LabeledTask(task=tasks[0], labels=tuple(labels[:3]))]
    assert exported(tmp_path, entries, "helpsteer3")[0] == [first]


def test_arena_battles_go_out_and_come_back(tmp_path: Path) -> None:
    entries = [
        labeled("t1", wins("a", 3), TIE, BAD, SKIP, prompt=CHAT),
        labeled("t2", wins("b")),
        labeled("t3", ranks("a", "b", "c"), ids="abc"),
    ]
    rows, report = exported(tmp_path, entries, "arena")
    assert report.dropped == {"skipped": 1, "a ranking": 1}
    # b was shown first, so it is model a.
    assert rows[0] == {
        "turn": 1,
        "anony": True,
        "language": "unknown",
        "question_id": "p-t1",
        "model_a": "v001",
        "model_b": "v000",
        "winner": "model_b",
        "judge": "l0",
        "conversation_a": [*CHAT, {"role": "assistant", "content": "t1 says b"}],
        "conversation_b": [*CHAT, {"role": "assistant", "content": "t1 says a"}],
        "tstamp": 100.5,
    }
    assert [row["winner"] for row in rows] == ["model_b", "tie", "tie (bothbad)", "model_a"]
    tasks, labels = read_import(written(tmp_path, *rows), format="arena")
    assert [one.overlap for one in tasks] == [3, 1]
    assert {candidate.policy: candidate.text for candidate in tasks[0].candidates} == {
        "v000": "t1 says a",
        "v001": "t1 says b",
    }
    back = [
        LabeledTask(task=one, labels=tuple(given for given in labels if given.task_id == one.task_id)) for one in tasks
    ]
    assert exported(tmp_path, back, "arena")[0] == rows


def test_odd_battles_are_counted_or_refused(tmp_path: Path) -> None:
    def battle(**changes: Any) -> dict[str, Any]:
        a, b = ([{"role": "user", "content": "q", "num_tokens": 1}, {"role": "assistant", "content": c}] for c in "AB")
        row = {"question_id": "1", "model_a": "x", "model_b": "y", "winner": "model_a", "judge": "j", "turn": 1}
        return {**row, "conversation_a": a, "conversation_b": b, "language": "English", **changes}

    swapped = battle(winner="model_a", judge="k", model_a="y", model_b="x")
    swapped["conversation_a"], swapped["conversation_b"] = swapped["conversation_b"], swapped["conversation_a"]
    longer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Z"}, {"role": "user", "content": "r"}]
    apart = battle(conversation_a=[*longer, {"role": "assistant", "content": "W"}])
    report = ReadReport(source="x")
    path = written(tmp_path, battle(), swapped, battle(), battle(winner="tie"), apart)
    tasks, labels = read_import(path, format="arena", report=report)
    assert report.dropped == {"the same judgement again": 1, "the conversations part before the last answer": 1}
    [task] = tasks
    x, y = (candidate.candidate_id for candidate in task.candidates)
    assert task.overlap == 2
    assert json.loads(task.metadata["columns"]) == {"turn": 1, "language": "English"}
    assert [(one.labeler_id, one.presented, one.outcome) for one in labels] == [
        ("j", (x, y), wins(x)),
        ("k", (y, x), wins(y)),
        ("j", (x, y), TIE),
    ]
    assert [one.supersedes for one in labels] == [None, None, labels[0].label_id]
    with pytest.raises(UserError, match="tie \\(bothbad\\)"):
        read_import(written(tmp_path, battle(winner="nobody")), format="arena")


@pytest.mark.parametrize("format", ["trl-preference", "trl-unpaired", "kwise", "helpsteer3", "arena"])
def test_every_format_can_be_a_parquet_file(tmp_path: Path, format: Format) -> None:
    entries = [labeled("t1", wins("b", 3), prompt=CHAT), labeled("t2", wins("a", 1), prompt=CHAT)]
    export(entries, tmp_path / "out.parquet", format=format)
    export(entries, tmp_path / "out.jsonl", format=format)
    assert read_import(tmp_path / "out.parquet", format=format) == read_import(tmp_path / "out.jsonl", format=format)


def test_nothing_to_export_is_said_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="1 task left out: tie"):
        export([labeled("t1", TIE)], path, format="trl-preference")
    with pytest.raises(UserError, match=".jsonl or .parquet"):
        export([labeled("t1", wins("a"))], tmp_path / "out.csv", format="trl-preference")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["Why?", CHAT], ids=["standard", "conversational"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("strength", [None, 2], ids=["plain", "margin"])
def test_the_trainers_of_trl_take_a_step_on_an_export(
    tmp_path: Path, prompt: Any, suffix: str, strength: int | None
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    from datasets import load_dataset

    from tests.tiny import tiny_llama

    path = tmp_path / f"out{suffix}"
    entries = [labeled(f"t{n}", wins("ab"[n % 2], strength if n else None), prompt=prompt) for n in range(4)]
    export(entries, path, format="trl-preference")
    loader = "parquet" if suffix == ".parquet" else "json"
    rows = load_dataset(loader, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    model = str(tiny_llama(tmp_path / "model"))
    shared = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    for number, (trainer, config) in enumerate(
        [(trl.RewardTrainer, trl.RewardConfig), (trl.DPOTrainer, trl.DPOConfig)]
    ):
        arguments = config(output_dir=str(tmp_path / f"run{number}"), **shared)
        done = trainer(model=model, args=arguments, train_dataset=rows).train()
        assert done.global_step == 1
        assert 0 < done.training_loss < 100
