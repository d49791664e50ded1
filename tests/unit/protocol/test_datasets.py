"""Reading data: every type, every kind of file, and every way in which a row can be wrong."""

import gzip
import json
import logging
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.datasets import (
    ReadReport,
    _hub_rows,
    open_records,
    peek,
    read_demonstrations,
    read_preferences,
    read_prompts,
    read_records,
)
from protocol.errors import UserError
from protocol.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RankingRecord,
    UnpairedRecord,
    detect_type,
    normalize,
    text_of,
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is 2 + 2?\n\nAssistant:"

TYPES = [
    ({"prompt": "hi"}, "prompt-only, standard", PromptRecord(prompt="hi")),
    (
        {"prompt": [user("hi")], "id": 7, "kind": "safe", "tags": ["a"], "note": None},
        "prompt-only, conversational",
        PromptRecord(prompt=[user("hi")], record_id="7", metadata={"kind": "safe", "tags": '["a"]'}),
    ),
    (
        {"prompt": "hi", "completion": " there"},
        "prompt-completion, standard",
        DemonstrationRecord(prompt="hi", completion=" there"),
    ),
    (
        {"prompt": [user("hi")], "completion": [assistant("yo")]},
        "prompt-completion, conversational",
        DemonstrationRecord(prompt=[user("hi")], completion=[assistant("yo")]),
    ),
    (
        {"messages": [user("hi"), assistant("yo")]},
        "conversation, conversational",
        DemonstrationRecord(prompt=[user("hi")], completion=[assistant("yo")]),
    ),
    (
        {"prompt": "hi", "chosen": "a", "rejected": "b", "margin": 2},
        "preference, standard",
        PreferenceRecord(prompt="hi", chosen="a", rejected="b", margin=2.0),
    ),
    (
        {"prompt": [user("hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        "preference, conversational",
        PreferenceRecord(prompt=[user("hi")], chosen=[assistant("a")], rejected=[assistant("b")]),
    ),
    (  # the prompt as text, and again at the head of both conversations
        {"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        "preference, conversational",
        PreferenceRecord(prompt=[user("hi")], chosen=[assistant("a")], rejected=[assistant("b")]),
    ),
    (
        {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]},
        "preference with implicit prompt, conversational",
        PreferenceRecord(prompt=[user("hi")], chosen=[assistant("a")], rejected=[assistant("b")]),
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        "preference with implicit prompt, standard",
        PreferenceRecord(prompt="The sky is ", chosen="blue.", rejected="black."),
    ),
    (
        {"chosen": HH + " 4", "rejected": HH + " 5"},
        "preference with implicit prompt, transcript",
        PreferenceRecord(
            prompt=[user("hi"), assistant("hello"), user("what is 2 + 2?")],
            chosen=[assistant("4")],
            rejected=[assistant("5")],
        ),
    ),
    (
        {"prompt": "hi", "completion": "a", "label": False},
        "unpaired preference, standard",
        UnpairedRecord(prompt="hi", completion="a", label=False),
    ),
    (
        {"prompt": [user("hi")], "completions": [[assistant("a")], [assistant("b")]], "ranks": [2, 1]},
        "ranking, conversational",
        RankingRecord(prompt=[user("hi")], completions=([assistant("a")], [assistant("b")]), ranks=(2, 1)),
    ),
]


@pytest.mark.parametrize(("row", "expected_type", "expected"), TYPES, ids=[name for _, name, _ in TYPES])
def test_type_and_normal_form(row, expected_type, expected):
    assert str(detect_type(row)) == expected_type
    assert normalize(row) == expected


def test_a_null_column_counts_as_absent():
    assert str(detect_type({"prompt": "hi", "completion": None})) == "prompt-only, standard"


def test_a_ranking_gives_every_ordered_pair():
    ranking = RankingRecord(prompt="p", completions=("a", "b", "c"), ranks=(2, 1, 2))
    assert [(pair.chosen, pair.rejected) for pair in ranking.pairs()] == [("b", "a"), ("b", "c")]


def test_text_of_a_conversation_is_its_last_user_turn():
    assert text_of("plain") == "plain"
    assert text_of([{"role": "system", "content": "s"}, user("one"), assistant("x"), user("two")]) == "two"


BAD_ROWS = [
    ({"completion": "a"}, "the row has no prompt"),
    ({"prompt": "  "}, "the row has no prompt"),
    ({"prompt": []}, "the row has no prompt"),
    ({"text": "a", "url": "b"}, "do not make a known record type"),
    ({"prompt": "hi", "chosen": "a"}, "do not make a known record type"),
    ({"prompt": [user("hi"), assistant("yo")]}, "ends with an assistant turn"),
    ({"prompt": 3}, "prompt is a int, not a list of messages"),
    ({"prompt": [{"from": "human", "value": "hi"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": "tool", "content": "hi"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "not a message with role and text content"),
    ({"prompt": "hi", "completion": ""}, "completion is empty"),
    ({"prompt": "hi", "completion": 3}, "completion is a int"),
    ({"prompt": [user("hi")], "completion": [assistant("a"), user("b")]}, "exactly one assistant turn"),
    ({"prompt": "hi", "chosen": "a", "rejected": "b", "margin": "big"}, "margin is not a number"),
    ({"prompt": "hi", "completion": "a", "label": "good"}, "label is neither true nor false"),
    ({"prompt": "hi", "completions": ["a", "b"], "ranks": [1]}, "not lists of the same length"),
    ({"prompt": "hi", "completions": ["a"], "ranks": [1]}, "two or more completions"),
    ({"chosen": "yes", "rejected": "no"}, "the row has no prompt"),
    ({"chosen": "so it is", "rejected": "so "}, "rejected is empty"),
    ({"chosen": [user("a"), assistant("x")], "rejected": "x"}, "rejected is a str"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_stops_the_reading_at_its_line(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    good = {"prompt": "hi"}
    file.write_text("\n".join(json.dumps(one) for one in (good, good, row)))
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(str(file)))
    assert str(caught.value).startswith(f"{file}, line 3: ")


@pytest.fixture
def rows():
    return [{"prompt": f"question {number}", "id": str(number)} for number in range(5)]


def _write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz", " array.json", " array.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, rows, suffix):
    path = tmp_path / f"data{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(f"\ufeff  \n{json.dumps(rows)}" if "array" in suffix else f"\ufeff\n{text}", encoding="utf-8")
    assert list(open_records(str(path))) == rows
    assert list(open_records(str(path), count=2)) == rows[:2]
    assert str(peek(str(path))) == "prompt-only, standard"


def test_directories_and_globs_are_read_in_the_order_of_their_names(tmp_path, rows):
    (tmp_path / "more").mkdir()
    _write_jsonl(tmp_path / "b.jsonl", rows[2:3])
    _write_jsonl(tmp_path / "a.jsonl", rows[:2])
    _write_jsonl(tmp_path / "more" / "c.jsonl", rows[3:])
    (tmp_path / "README.md").write_text("not data")
    assert list(open_records(str(tmp_path))) == rows
    assert list(open_records(f"{tmp_path}/*.jsonl")) == rows[:3]
    assert list(open_records(f"{tmp_path}/**/c.*")) == rows[3:]


def test_a_generator_is_given_seed_and_count(tmp_path, monkeypatch):
    (tmp_path / "my_rows_for_test.py").write_text(
        "def some(*, seed, count):\n    for number in range(count):\n        yield {'prompt': f'{seed}-{number}'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "my_rows_for_test:some"
    assert list(open_records(source, seed=4, count=2)) == [{"prompt": "4-0"}, {"prompt": "4-1"}]
    assert str(peek(source)) == "prompt-only, standard"
    with pytest.raises(UserError, match="no length of its own"):
        list(open_records(source))
    with pytest.raises(UserError, match="can not be imported"):
        list(open_records("my_rows_for_test:other", count=1))
    del sys.modules["my_rows_for_test"]


def test_hub_rows_come_through_the_datasets_library(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    _write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    found = list(_hub_rows(str(tmp_path / "set"), split="train", streaming=True))
    assert [row for _, row in found] == rows
    with pytest.raises(UserError, match="can not be loaded"):
        list(_hub_rows(str(tmp_path / "set"), split="no-such-split", streaming=True))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/folder", "no-such/*.jsonl", "a/b/c"])
def test_a_missing_file_is_named(source):
    with pytest.raises(UserError, match="no data file here") as caught:
        peek(source)
    assert caught.value.where == source


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.json").write_text("[]")
    for name in ("empty.jsonl", "empty.json"):
        with pytest.raises(UserError, match="the data set is empty"):
            list(read_records(str(tmp_path / name)))
        with pytest.raises(UserError, match="the data set is empty"):
            peek(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2: broken JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2: the row is a list"),
        ('[{"prompt": "a"}, 3]', "row 2: the row is a int"),
        ('[{"prompt": "a"},\n{]', "broken JSON .* at line 2"),
    ],
)
def test_broken_json_is_named_by_line(tmp_path, text, message):
    (tmp_path / "broken.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_records(str(tmp_path / "broken.jsonl")))


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "bad.csv").write_text("prompt\nhi\n")
    for name, message in {
        "bad.jsonl": "not be read as text",
        "bad.jsonl.gz": "not be read as text",
        "bad.parquet": "Parquet file can not be read",
        "bad.csv": "kind of file is not known",
    }.items():
        with pytest.raises(UserError, match=message):
            list(open_records(str(tmp_path / name)))


def test_useless_rows_are_dropped_and_counted(tmp_path, caplog):
    file = tmp_path / "hh.jsonl"
    other_turn = HH.replace("hello", "good day")
    _write_jsonl(
        file,
        [
            {"chosen": HH + " 4", "rejected": HH + " 5"},
            {"chosen": HH + " 4", "rejected": HH + " 4"},
            {"chosen": HH + " 4", "rejected": HH},
            {"chosen": HH + " 4", "rejected": other_turn + " 4"},
            {"chosen": HH + " 4", "rejected": HH + " 4"},
        ],
    )
    report = ReadReport(source="hh")
    assert len(list(read_preferences(str(file), report=report))) == 1
    identical, differing = (
        "chosen and rejected are identical",
        "the transcripts differ in more than one last, non-empty Assistant turn",
    )
    assert report.dropped == {identical: 2, differing: 2}
    assert report.examples[identical] == [f"{file}, line 2", f"{file}, line 5"]
    assert (report.num_kept, report.num_dropped) == (1, 4)
    assert report.summary().startswith("1 of 5 rows kept; 2 dropped: chosen and rejected are identical (such as ")
    with caplog.at_level(logging.WARNING):
        list(read_preferences(str(file)))
    assert "1 of 5 rows kept" in caplog.text


def test_a_data_set_of_which_nothing_is_left_is_refused(tmp_path):
    _write_jsonl(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "a"}])
    with pytest.raises(UserError, match="no row of the data set can be used"):
        list(read_preferences(str(tmp_path / "same.jsonl")))


def test_rows_serve_the_purposes_that_they_can(tmp_path):
    file = tmp_path / "rows.jsonl"
    _write_jsonl(file, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert list(read_prompts(str(file))) == [PromptRecord(prompt="p")]
    assert list(read_demonstrations(str(file))) == [DemonstrationRecord(prompt="p", completion="a")]
    _write_jsonl(file, [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}])
    pairs = [(pair.chosen, pair.rejected) for pair in read_preferences(str(file))]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]
    _write_jsonl(file, [{"prompt": "p"}])
    with pytest.raises(UserError, match="line 1: the row is a prompt, but data.demonstrations needs"):
        list(read_demonstrations(str(file)))
    with pytest.raises(UserError, match=r"data\.preferences needs a chosen and a rejected answer"):
        list(read_preferences(str(file)))


def test_an_error_says_what_where_why_and_what_next():
    error = UserError("it broke", cause="a stone", next_step="lift it").at("here")
    assert str(error) == "here: it broke. Likely cause: a stone. Next: lift it."
    assert str(error.at("outside")) == "outside, here: it broke. Likely cause: a stone. Next: lift it."
