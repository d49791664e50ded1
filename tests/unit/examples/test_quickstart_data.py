"""The data sources: determinism, the split, and the facts to which the world was calibrated."""

import math
import random
import statistics
from itertools import islice

import pytest

from examples.quickstart import data, labels, world
from examples.quickstart.gold import Analysis, analyse
from protocol.tokens import encode_prompt, encode_response, train_tokenizer


def _judge(record: dict, column: str) -> Analysis:
    return analyse(record["prompt"][0]["content"], record[column][0]["content"], True)


@pytest.fixture(scope="module")
def demonstrations():
    return list(data.demonstrations(seed=0, count=10_000))


def test_records_have_the_agreed_form():
    (prompt,) = data.prompts(seed=3, count=1)
    assert set(prompt) == {"prompt", "id", "kind"}
    task = world.task_by_text()[prompt["prompt"][0]["content"]]
    assert prompt == {
        "prompt": [{"role": "user", "content": task.text}], "id": task.task_id, "kind": task.kind
    }  # fmt: skip
    (demonstration,) = data.demonstrations(seed=3, count=1)
    assert set(demonstration) == {"prompt", "completion"}
    assert demonstration["completion"][0]["role"] == "assistant"
    (pair,) = data.preferences(seed=3, count=1)
    assert set(pair) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize("source", [data.prompts, data.heldout_prompts, data.demonstrations, data.preferences])
def test_sources_are_a_function_of_the_seed(source):
    first = list(source(seed=5, count=200))
    assert len(first) == 200
    assert list(source(seed=5, count=200)) == first
    assert list(islice(source(seed=5, count=400), 200)) == first
    assert list(source(seed=6, count=200)) != first


def test_sources_leave_the_global_random_state_alone():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    list(data.preferences(seed=5, count=20))
    assert random.random() == expected


def test_prompts_come_once_and_a_quarter_is_unsafe():
    records = list(data.prompts(seed=0, count=8000))
    assert len({record["id"] for record in records}) == 8000
    assert len({record["prompt"][0]["content"] for record in records}) == 8000
    assert sum(record["kind"] == "unsafe" for record in records) == 2000


def test_ids_stay_unique_when_prompts_come_again():
    records = list(data.heldout_prompts(seed=0, count=3000))  # 348 unsafe prompts are held out, 750 are asked for
    assert len({record["id"] for record in records}) == 3000
    assert len({record["prompt"][0]["content"] for record in records if record["kind"] == "unsafe"}) == 348


def test_held_out_prompts_are_disjoint_from_all_training_sources():
    def combinations(records):
        return {world.task_by_text()[record["prompt"][0]["content"]].combination for record in records}

    held_out = combinations(data.heldout_prompts(seed=0, count=2000))
    for source in (data.prompts, data.demonstrations, data.preferences):
        assert not held_out & combinations(source(seed=1, count=4000))


def test_demonstrations_are_as_mediocre_as_calibrated(demonstrations):
    found = [_judge(record, "completion") for record in demonstrations]
    scores = [one.score for one in found]
    assert statistics.mean(scores) == pytest.approx(-0.22, abs=0.03)
    assert statistics.pstdev(scores) == pytest.approx(0.66, abs=0.04)
    assert sum(one.unparseable for one in found) == 0
    assert max(one.words for one in found) <= 40
    safe = [one for one in found if one.kind == "safe"]
    unsafe = [one for one in found if one.kind == "unsafe"]
    assert len(safe) == 7500
    assert statistics.mean(one.holds_wrong_piece for one in safe) == pytest.approx(0.42, abs=0.03)
    assert statistics.mean(one.refused for one in safe) == pytest.approx(0.06, abs=0.01)
    assert statistics.mean(one.complied for one in unsafe) == pytest.approx(0.55, abs=0.03)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("sorry , i can not help with that . it is not safe . please stay safe !", -0.275),  # .75 x -.7 + .25 x 1
        ("sure , happy to help . good luck !", -1.0),
        ("", -0.75),
    ],
)
def test_one_answer_for_everything_does_not_pay(answer, expected):
    records = list(data.heldout_prompts(seed=0, count=1000))
    scores = [analyse(record["prompt"][0]["content"], answer, True).score for record in records]
    assert statistics.mean(scores) == pytest.approx(expected)


def test_labels_follow_the_gold_score_noisily():
    pairs = [(_judge(record, "chosen").score, _judge(record, "rejected").score)
             for record in data.preferences(seed=0, count=4000)]  # fmt: skip
    untied = [chosen > rejected for chosen, rejected in pairs if abs(chosen - rejected) > 1e-9]
    assert statistics.mean(untied) == pytest.approx(0.87, abs=0.02)
    assert 1 - len(untied) / 4000 == pytest.approx(0.095, abs=0.02)


def test_no_preference_pair_is_identical():
    assert all(record["chosen"] != record["rejected"] for record in data.preferences(seed=2, count=1000))


def test_labeler_is_a_sigmoid_of_four_times_the_difference():
    assert labels.preference_probability(0.5, 0.5) == 0.5
    assert labels.preference_probability(0.5, 0.25) == pytest.approx(1 / (1 + math.exp(-1)))
    rng = random.Random(0)
    share = statistics.mean(labels.prefers_first(rng, 0.5, 0.25) for _ in range(4000))
    assert share == pytest.approx(0.731, abs=0.02)


def test_everything_fits_the_quickstart_lengths(demonstrations):
    texts = [turn[0]["content"] for record in demonstrations for turn in (record["prompt"], record["completion"])]
    tokenizer = train_tokenizer(texts, vocab_size=512, context_tokens=128)
    sample = demonstrations[::10]
    prompt_lengths = [len(encode_prompt(tokenizer, record["prompt"])) for record in sample]
    answers = [world.perfect_answer(task) for task in world.tasks("safe")[::10]]
    perfect_lengths = [len(encode_response(tokenizer, answer)) for answer in answers]
    assert statistics.mean(prompt_lengths) == pytest.approx(12, abs=1)
    assert max(prompt_lengths) <= 22
    assert max(perfect_lengths) <= 47
    assert max(len(encode_response(tokenizer, record["completion"])) for record in sample) <= 56
