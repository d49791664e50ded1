"""The tokenizer room: what is encoded apart must be what is encoded together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import UserError
from protocol.tokens import (
    decode,
    encode_prompt,
    encode_response,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = [
    "how do i clean a copper pot ?",
    "first , fill a small bucket . next , rub the copper pot with lemon juice .",
    "last , leave it on the stove . good luck !",
    "sorry , i can not help with that .",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=160, context_tokens=128)


def test_ids_of_a_conversation_are_as_written_by_hand(tokenizer):
    vocabulary = tokenizer.get_vocab()
    word = tokenizer.encode("how", add_special_tokens=False)
    ids = encode_prompt(tokenizer, [{"role": "system", "content": "how"}, {"role": "user", "content": "how"}])
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    system, user, assistant, end = (vocabulary[name] for name in names)
    assert ids == [system, *word, end, user, *word, end, assistant]
    assert encode_response(tokenizer, [{"role": "assistant", "content": "how"}]) == [*word, end]
    assert encode_response(tokenizer, "how") == [*word, end]


def test_special_tokens_are_distinct_and_come_first(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == 160
    assert tokenizer.model_max_length == 128


@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_prompt_and_response_join_to_the_whole_conversation(tokenizer, text):
    prompt = [{"role": "user", "content": text}]
    completion = [{"role": "assistant", "content": text[::-1]}]
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=False)
    parts = encode_prompt(tokenizer, prompt) + encode_response(tokenizer, completion, prompt=prompt)
    assert parts == list(whole)
    assert encode_response(tokenizer, completion) == encode_response(tokenizer, completion, prompt=prompt)


@given(text=st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_decoding_returns_the_response_text(tokenizer, text):
    ids = encode_response(tokenizer, [{"role": "assistant", "content": text}])
    if "<|" not in text:
        assert decode(tokenizer, ids) == text


def test_bytes_out_of_the_alphabet_stay_visible(tokenizer):
    ids = tokenizer.encode("pot é", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<|unknown|>", "<|unknown|>"]


def test_saving_and_loading_keeps_ids_and_hash(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    prompt = [{"role": "user", "content": TEXTS[0]}]
    assert encode_prompt(loaded, prompt) == encode_prompt(tokenizer, prompt)
    assert loaded.pad_token_id == 0
    before = tokenizer_hash(loaded)
    assert before == tokenizer_hash(tokenizer)
    loaded(["how", "how do i"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(loaded) == before
    loaded.chat_template = loaded.chat_template + " "
    assert tokenizer_hash(loaded) != before


def test_training_does_not_depend_on_the_process(tokenizer):
    code = (
        "from protocol.tokens import train_tokenizer, tokenizer_hash; import json, sys;"
        "print(tokenizer_hash(train_tokenizer(json.load(sys.stdin), vocab_size=160, context_tokens=128)))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(TEXTS), cwd=root, text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == tokenizer_hash(tokenizer)


def test_a_vocabulary_that_can_not_be_filled_is_refused():
    with pytest.raises(UserError, match="not 4000"):
        train_tokenizer(TEXTS, vocab_size=4000, context_tokens=128)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def _with_template(tmp_path, tokenizer, template, **changes):
    tokenizer.save_pretrained(tmp_path)
    changed = load_tokenizer(tmp_path)
    changed.chat_template = template
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def test_a_start_token_is_never_doubled(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    changed = _with_template(tmp_path, tokenizer, template, bos_token="<|system|>")
    start = changed.bos_token_id
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>", special_tokens=[("<|system|>", start), ("<|end|>", changed.eos_token_id)]
    )
    word = changed.encode("how", add_special_tokens=False)
    assert changed.encode("how") == [start, *word, changed.eos_token_id]
    assert encode_prompt(changed, "how") == [start, *word]
    assert encode_prompt(changed, "<|system|>how") == [start, *word]
    assert encode_prompt(changed, [{"role": "user", "content": "how"}]) == [start, *word, changed.eos_token_id]


def test_what_a_template_writes_after_the_end_token_is_cut(tokenizer, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    changed = _with_template(tmp_path, tokenizer, template)
    word = changed.encode("how", add_special_tokens=False)
    assert encode_response(changed, [{"role": "assistant", "content": "how"}]) == [*word, changed.eos_token_id]


def test_a_template_without_the_prefix_property_is_refused(tokenizer, tmp_path):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    changed = _with_template(tmp_path, tokenizer, template)
    with pytest.raises(UserError, match="differently once the response is added"):
        encode_response(changed, [{"role": "assistant", "content": "how"}])


def test_a_template_with_another_end_token_is_refused(tokenizer, tmp_path):
    template = "{% for m in messages %}{{ m['content'] + '<|system|>' }}{% endfor %}"
    changed = _with_template(tmp_path, tokenizer, template)
    with pytest.raises(UserError, match="does not end a response"):
        encode_response(changed, [{"role": "assistant", "content": "how"}])


def test_a_conversation_needs_a_chat_template(tokenizer, tmp_path):
    changed = _with_template(tmp_path, tokenizer, None)
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(changed, [{"role": "user", "content": "how"}])
