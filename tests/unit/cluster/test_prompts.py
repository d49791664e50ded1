"""The prompt stream: the same prompts after an interruption as without it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prompts import PromptStream, encode_prompts
from protocol.errors import UserError
from protocol.messages import Prompt
from protocol.records import PromptRecord
from protocol.tokens import train_tokenizer


def _prompts(count, prefix="p"):
    return [
        Prompt(prompt_id=f"{prefix}{number}", token_ids=np.asarray([number], dtype=np.int32), text=str(number))
        for number in range(count)
    ]


def _names(prompts):
    return [prompt.prompt_id for prompt in prompts]


@st.composite
def _plans(draw):
    size = draw(st.integers(1, 12))
    takes = draw(st.lists(st.integers(0, size), max_size=12))
    return size, takes, draw(st.integers(0, len(takes)))


@given(plan=_plans(), seed=st.integers(0, 5))
def test_resuming_anywhere_gives_what_an_uninterrupted_stream_gives(plan, seed):
    size, takes, interruption = plan
    whole = PromptStream(_prompts(size), seed=seed)
    expected = [_names(whole.take(count)) for count in takes]
    first = PromptStream(_prompts(size), seed=seed)
    found = [_names(first.take(count)) for count in takes[:interruption]]
    second = PromptStream(_prompts(size), seed=seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [_names(second.take(count)) for count in takes[interruption:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


@given(plan=_plans(), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation_and_no_take_repeats_a_prompt(plan, seed):
    size, takes, _ = plan
    stream = PromptStream(_prompts(size), seed=seed)
    taken = []
    for count in takes:
        names = _names(stream.take(count))
        assert len(names) == len(set(names)) == count
        taken += names
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == sorted(_names(_prompts(size)))


def test_epochs_and_seeds_have_their_own_order():
    stream = PromptStream(_prompts(20), seed=0)
    first, second = _names(stream.take(20)), _names(stream.take(20))
    assert first != second
    assert first != _names(PromptStream(_prompts(20), seed=1).take(20))
    assert first == _names(PromptStream(_prompts(20), seed=0).take(20))


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(UserError, match="asks for 4 different prompts, but there are only 3"):
        PromptStream(_prompts(3), seed=0).take(4)
    with pytest.raises(UserError, match="no prompts"):
        PromptStream([], seed=0)


@pytest.mark.parametrize(
    ("other", "seed", "changed"),
    [(_prompts(4), 0, "num_prompts"), (_prompts(3, prefix="q"), 0, "fingerprint"), (_prompts(3), 1, "seed")],
)
def test_a_state_of_other_prompts_is_refused(other, seed, changed):
    state = PromptStream(_prompts(3), seed=0).state_dict()
    with pytest.raises(UserError, match=changed):
        PromptStream(other, seed=seed).load_state_dict(state)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["how do i clean a copper pot ?"] * 2, vocab_size=110, context_tokens=64)


def test_prompts_are_encoded_named_and_described(tokenizer):
    records = [
        PromptRecord(prompt=[{"role": "user", "content": "how"}], record_id="x", metadata={"kind": "safe"}),
        PromptRecord(prompt="how do"),
        PromptRecord(prompt="how do"),
    ]
    prompts, report = encode_prompts(records, tokenizer, max_tokens=20, overlong="error")
    user, assistant, end = (tokenizer.get_vocab()[name] for name in ("<|user|>", "<|assistant|>", "<|end|>"))
    word = tokenizer.encode("how", add_special_tokens=False)
    assert prompts[0].token_ids.tolist() == [user, *word, end, assistant]
    assert prompts[0].token_ids.dtype == np.int32
    assert (prompts[0].prompt_id, prompts[0].text, dict(prompts[0].metadata)) == ("x", "how", {"kind": "safe"})
    assert len(prompts[1].prompt_id) == 16
    assert prompts[2].prompt_id == prompts[1].prompt_id + "-2"
    assert (report.num_kept, report.num_dropped) == (3, 0)
    # a name depends on the content alone
    (alone,), _ = encode_prompts(records[1:2], tokenizer, max_tokens=20, overlong="error")
    assert alone.prompt_id == prompts[1].prompt_id


def test_a_long_prompt_is_an_error_or_dropped_and_counted(tokenizer):
    records = [PromptRecord(prompt="how"), PromptRecord(prompt="z" * 30, record_id="long")]
    with pytest.raises(UserError, match=r"prompt 2 \(id long\): the prompt has 30 tokens, more than"):
        encode_prompts(records, tokenizer, max_tokens=20, overlong="error")
    prompts, report = encode_prompts(records, tokenizer, max_tokens=20, overlong="drop")
    assert [prompt.text for prompt in prompts] == ["how"]
    assert report.dropped == {"longer than rollout.max_prompt_tokens = 20": 1}
    with pytest.raises(UserError, match="no prompt is left"):
        encode_prompts(records[1:], tokenizer, max_tokens=20, overlong="drop")


def test_an_id_used_twice_is_refused(tokenizer):
    records = [PromptRecord(prompt=text, record_id="same") for text in ("how", "do")]
    with pytest.raises(UserError, match="'same' is used twice"):
        encode_prompts(records, tokenizer, max_tokens=20, overlong="error")


def test_a_prompt_that_the_chat_template_refuses_is_named():
    tokenizer = train_tokenizer(["who speaks ?"] * 3, vocab_size=108, context_tokens=32)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    record = PromptRecord(prompt=[{"role": "user", "content": "who ?"}], record_id="q7")
    with pytest.raises(UserError, match=r"prompt 1 \(id q7\).*refuses the conversation: no"):
        encode_prompts([record], tokenizer, max_tokens=9, overlong="error")
