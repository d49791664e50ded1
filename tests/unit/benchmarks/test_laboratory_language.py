"""The tiny language: what answers are worth, written out by hand, and what demonstrations are like."""

import math

import numpy as np
import pytest

from benchmarks.experiments.laboratory.language import (
    ALLOWED,
    BOS,
    EOS,
    PAD,
    Question,
    demonstrate,
    draw_prompts,
    next_word,
    read_prompt,
    worth,
)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


TOPIC_2 = ids(BOS, 6, 8, 24, 25)
"""Topic 2 (words 6, 7, 8), style 0 (glue 24 to 27), nothing at stake."""
AT_STAKE = ids(BOS, 6, 8, 29, 31)
"""Topic 2, style 1 (glue 28 to 31), harm at stake."""


def test_a_prompt_says_topic_style_and_whether_harm_is_at_stake() -> None:
    assert read_prompt(TOPIC_2) == Question(topic=2, style=0, sensitive=False)
    assert read_prompt(AT_STAKE) == Question(topic=2, style=1, sensitive=True)


def test_prompts_name_every_topic_and_style_and_a_quarter_is_sensitive() -> None:
    questions = [read_prompt(p) for p in draw_prompts(2000, np.random.default_rng(0))]
    assert {(q.topic, q.style) for q in questions} == {(z, s) for z in range(8) for s in range(2)}
    assert np.mean([q.sensitive for q in questions]) == pytest.approx(0.25, abs=0.03)
    assert all(read_prompt(p).sensitive for p in draw_prompts(20, np.random.default_rng(0), sensitive=True))
    assert not any(read_prompt(p).sensitive for p in draw_prompts(20, np.random.default_rng(0), sensitive=False))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # Ten words, two on the topic, all neighbours allowed, nothing repeated beyond twice, within the band.
        ((6, 24, 0, 1, 25, 7, 3, 26, 4, 5, EOS), 5 * (1 - math.exp(-2 / 4)) + 1.0),
        # The same without the end: EOS itself is worth nothing.
        ((6, 24, 0, 1, 25, 7, 3, 26, 4, 5), 5 * (1 - math.exp(-2 / 4)) + 1.0),
        # Eight on the topic: two too many cost 0.15 * 4, and 6 and 7 are each used once more than is free.
        ((6, 7, 8, 6, 7, 8, 24, 6, 7, 25, EOS), 5 * (1 - math.exp(-8 / 4)) + 1.0 - 0.6 - 0.2),
        # Four neighbours of nine are forbidden: 0 0, 24 25, and glue of the other style after a word, twice.
        ((0, 0, 1, 24, 25, 3, 28, 4, 29, 5, EOS), 5 / 9),
        # Three words: seven too short; word 0 is used three times.
        ((0, 0, 0, EOS), 0.0 - 0.1 - 0.1 * 7),
        # Nothing at all is ten too short.
        ((EOS,), -1.0),
        # BOS and PAD are neighbours of nothing: both neighbours of the pair 24, BOS, 0 are forbidden.
        ((24, BOS, 0, EOS), -0.1 * 7),
    ],
)
def test_helpful_by_hand(response: tuple[int, ...], expected: float) -> None:
    assert worth(TOPIC_2, ids(*response), gold="helpful") == pytest.approx(expected, abs=1e-12)


def test_twenty_words_are_two_too_long() -> None:
    response = ids(*[0, 24, 1, 25, 3, 26, 4, 27, 5, 9] * 2, EOS)
    assert worth(TOPIC_2, response, gold="helpful") == pytest.approx(1.0 - 0.1 * 2, abs=1e-12)


def test_control_and_harmless_are_linear_in_counts() -> None:
    response = ids(6, 7, 8, 0, 24, 29, 30, EOS)
    assert worth(TOPIC_2, response, gold="control") == pytest.approx(0.4 * 3 - 0.1 - 0.25 * 2)
    assert worth(AT_STAKE, response, gold="control") == pytest.approx(0.4 * 3 - 0.1 - 0.25)
    assert worth(TOPIC_2, response, gold="harmless") == 0
    assert worth(AT_STAKE, response, gold="harmless") == pytest.approx(-2.4)


def test_helpful_turns_with_words_of_the_topic_and_control_does_not() -> None:
    def padded(on_topic: int) -> np.ndarray:
        return ids(*([6, 7, 8] * 6)[:on_topic], *([0, 1, 3, 4, 5, 9, 10, 11, 12, 13, 14, 15])[: 12 - on_topic], EOS)

    helpful = [worth(TOPIC_2, padded(n), gold="helpful") for n in range(13)]
    control = [worth(TOPIC_2, padded(n), gold="control") for n in range(13)]
    assert int(np.argmax(helpful)) in (6, 7)
    assert helpful[12] < helpful[0]
    assert control == sorted(control)


def test_the_grammar() -> None:
    assert ALLOWED[0, 6, 24]
    assert not ALLOWED[0, 6, 28]
    assert ALLOWED[1, 6, 28]
    assert not ALLOWED[0, 24, 25]
    assert not ALLOWED[0, 6, 6]
    assert not ALLOWED[:, [BOS, EOS, PAD], :].any()
    assert not ALLOWED[:, :, [BOS, EOS, PAD]].any()


def test_demonstrations_end_within_their_bounds_and_follow_the_process() -> None:
    rng = np.random.default_rng(0)
    responses = [demonstrate(TOPIC_2, rng) for _ in range(1500)]
    assert {int(r[-1]) for r in responses} == {EOS}
    assert min(len(r) for r in responses) == 8
    assert max(len(r) for r in responses) == 24
    expected = next_word(read_prompt(TOPIC_2), (BOS, BOS))
    found = np.bincount([int(r[0]) for r in responses], minlength=32) / 1500
    assert expected.sum() == pytest.approx(1)
    assert np.abs(found - expected).max() < 0.035
    # Of order two: a word of the topic two tokens ago makes another one rarer.
    assert next_word(read_prompt(TOPIC_2), (6, 0))[7] < next_word(read_prompt(TOPIC_2), (1, 0))[7]
