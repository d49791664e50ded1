"""`rondo data inspect`: what is counted, and that it can be shown."""

import io
import json

import pytest
from rich.console import Console

from cluster.inspect import inspect, render
from protocol.errors import UserError
from protocol.tokens import train_tokenizer


def _shown(summary):
    console = Console(width=300, file=io.StringIO())
    console.print(render(summary))
    return console.file.getvalue()


@pytest.fixture
def preferences(tmp_path):
    rows = [{"prompt": "p" * length, "chosen": "a" * (2 * length), "rejected": "b"} for length in range(1, 11)]
    rows.append({"prompt": "[bold]p[/bold]", "chosen": "same", "rejected": "same"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_lengths_and_drops_are_counted(preferences):
    summary = inspect(str(preferences), max_tokens=8)
    assert str(summary.type) == "preference, standard"
    assert (summary.num_rows, summary.is_complete) == (11, True)
    assert summary.report.dropped == {"chosen and rejected are identical": 1}
    found = {lengths.part: lengths for lengths in summary.lengths}
    # at 0, 50, 90, 99 and 100 percent of 1..10; between two lengths the longer one
    assert found["prompt"].percentiles == (1, 6, 10, 10, 10)
    assert found["chosen"].percentiles == (2, 12, 20, 20, 20)
    assert [found[part].num_overlong for part in ("prompt", "chosen", "rejected")] == [2, 6, 0]
    assert summary.examples[1] == (("prompt", "pp"), ("chosen", "aaaa"), ("rejected", "b"))
    assert len(summary.examples) == 3


def test_tokens_are_counted_with_the_chat_template(tmp_path):
    tokenizer = train_tokenizer(["hi ho"], vocab_size=103, context_tokens=32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    row = {
        "prompt": [{"role": "user", "content": "zz"}],
        "completion": [{"role": "assistant", "content": "z"}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    summary = inspect(str(tmp_path / "rows.jsonl"), tokenizer=str(tmp_path / "tokenizer"), max_tokens=4)
    found = {(lengths.part, lengths.unit): lengths for lengths in summary.lengths}
    assert found["prompt", "tokens"].percentiles == (5,) * 5  # user, z, z, end, assistant
    assert found["completion", "tokens"].percentiles == (2,) * 5  # z, end
    assert found["prompt", "characters"].num_overlong is None
    assert found["prompt", "tokens"].num_overlong == 1
    assert "prompt: 1 longer than 4 tokens (refused by a run, unless data.overlong_prompts=drop)" in _shown(summary)


def test_the_summary_is_shown_as_text(preferences):
    text = _shown(inspect(str(preferences), limit=5))
    assert "preference, standard; the first 5 rows" in text
    assert "5 of 5 rows kept; nothing dropped" in text
    assert "example 3" in text
    text = _shown(inspect(str(preferences)))
    assert "1 dropped: chosen and rejected are identical (such as" in text


def test_markup_in_the_data_is_not_obeyed(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "[bold]hi[/nonsense]"}))
    assert "[bold]hi[/nonsense]" in _shown(inspect(str(tmp_path / "rows.jsonl")))


def test_generators_are_asked_for_as_many_rows_as_the_limit():
    summary = inspect("examples.quickstart.data:prompts", limit=20)
    assert (summary.num_rows, summary.is_complete) == (20, False)


def test_an_unreadable_source_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no data file here"):
        inspect(str(tmp_path / "missing.jsonl"))


def test_a_conversation_that_the_chat_template_refuses_is_named(tmp_path):
    tokenizer = train_tokenizer(["who speaks next , and who then ?"] * 3, vocab_size=120, context_tokens=32)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
    )
    file = tmp_path / "talks.jsonl"
    turn = {"role": "user", "content": "who ?"}
    file.write_text("".join(json.dumps({"prompt": [turn] * times}) + "\n" for times in (1, 2)))
    with pytest.raises(
        UserError, match="prompt of record 2, .*refuses the conversation: turns must alternate"
    ) as error:
        inspect(str(file), tokenizer=tokenizer)
    assert "its turns are user, user" in str(error.value)
