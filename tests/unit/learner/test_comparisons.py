"""Comparisons: pairs and rankings read from a file, and the losses of a reward model on them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.data import SourceConfig
from configs.load import ConfigError
from configs.run import RunConfig
from learner.comparison_task import ComparisonTask
from learner.comparisons import (
    BASE,
    Comparisons,
    ComparisonSource,
    Half,
    Ranking,
    RewardModelJob,
    read_comparisons,
    split,
)
from protocol.datasets import ReadReport
from protocol.errors import UserError
from tests.tiny import tiny_tokenizer
from tests.tiny_run import tiny_config

PAIRS = [
    {"prompt": "one", "chosen": "the fox", "rejected": "the dog", "margin": 3},
    {"prompt": "one", "chosen": "the fox", "rejected": "a river", "margin": 1},
    {"prompt": "two", "chosen": "the sky", "rejected": "the sea", "margin": 2.5},
    {"prompt": "two", "chosen": "the dog", "rejected": "the sea"},
]
RANKED = {"prompt": "three", "completions": ["a", "b", "c", "d"], "ranks": [2, 1, 3, 2]}


def read(
    tmp_path: Path, rows: list[dict[str, Any]], *overrides: str, context_tokens: int | None = None
) -> tuple[list[Comparisons], ReadReport, RunConfig]:
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(tmp_path, f"data.preferences={{source: {path}}}", *overrides)
    assert config.data.preferences is not None
    sources = [ComparisonSource(name=BASE, data=config.data.preferences)]
    return *read_comparisons(config, tiny_tokenizer(), sources, context_tokens=context_tokens), config


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        ("given", [3.0, 1.0, 2.5, 0.0]),
        ("large", [3.0, 1.0, 2.5, 0.0]),
        ("small", [1.0, 1 / 3, 2.5 / 3, 0.0]),
        ("none", [0.0] * 4),
    ],
)
def test_v11b_margins_are_read_off_the_strengths(tmp_path: Path, margin: str, expected: list[float]) -> None:
    elements, _, _ = read(tmp_path, PAIRS, f"learner.reward_model.margin={margin}")
    assert [m for element in elements for m in element.margins] == pytest.approx(expected)


def test_a_margin_that_is_no_strength_is_taken_as_it_is_or_refused(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "three", "chosen": "x", "rejected": "y", "margin": 7.5}]
    elements, _, _ = read(tmp_path, rows)
    assert elements[-1].margins == (0.0,)  # strengths are no log-odds: they count only where they are asked for
    elements, _, _ = read(tmp_path, rows, "learner.reward_model.margin=given")
    assert elements[-1].margins == (7.5,)
    for margin in ("small", "large"):
        with pytest.raises(UserError, match=r"base, comparison 5: the margin 7\.5 is no strength"):
            read(tmp_path, rows, f"learner.reward_model.margin={margin}")


def test_a_ranking_stays_whole_and_gives_the_pairs_that_it_orders(tmp_path: Path) -> None:
    elements, reading, _ = read(tmp_path, [RANKED, PAIRS[2]])
    ranked = elements[0]
    # In the order in which the pairs name them: a over c, b over a, b over c, b over d, d over c.
    texts = [tiny_tokenizer().decode(s.response_ids, skip_special_tokens=True) for s in ranked.sequences]
    assert texts == ["a", "c", "b", "d"]
    assert list(zip(ranked.better, ranked.worse, strict=True)) == [(0, 1), (2, 0), (2, 1), (2, 3), (3, 1)]
    assert ranked.margins == (0.0,) * 5
    assert ranked.rankings == (Ranking(completions=(0, 2, 1, 3), ranks=(2, 1, 3, 2), weight=1.0),)
    assert elements[1].rankings == (Ranking(completions=(0, 1), ranks=(1, 2), weight=1.0),)
    assert reading.num_kept == 2


def test_pairs_of_one_prompt_share_a_completion(tmp_path: Path) -> None:
    elements, _, _ = read(tmp_path, PAIRS)
    assert [len(element.sequences) for element in elements] == [3, 3]
    assert (elements[0].better, elements[0].worse) == ((0, 0), (1, 2))
    assert (elements[1].better, elements[1].worse) == ((0, 2), (1, 1))
    assert [ranking.completions for ranking in elements[1].rankings] == [(0, 1), (2, 1)]


def gathered(tmp_path: Path, second: list[dict[str, Any]]) -> list[Comparisons]:
    """Read PAIRS from one source of weight 1, and others from a second of weight 3."""
    sources: list[ComparisonSource] = []
    for name, rows, weight in ((BASE, PAIRS, 1.0), ("round 2", second, 3.0)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        sources.append(ComparisonSource(name=name, data=SourceConfig(source=str(path)), weight=weight))
    config = tiny_config(tmp_path)
    return read_comparisons(config, tiny_tokenizer(), sources, context_tokens=None)[0]


AGAIN = [
    {"prompt": "one", "chosen": "a river", "rejected": "the sky"},
    {"prompt": "four", "chosen": "a", "rejected": "b"},
]


def test_a_prompt_of_two_sources_is_one_element(tmp_path: Path) -> None:
    elements = gathered(tmp_path, AGAIN)
    prompts = [tiny_tokenizer().decode(element.sequences[0].prompt_ids) for element in elements]
    assert [word for text in prompts for word in ("one", "two", "four") if word in text] == ["one", "two", "four"]
    one, two, four = elements
    assert (one.better, one.worse) == ((0, 0, 2), (1, 2, 3))  # "a river" of the second source is that of the first
    assert one.sources == (BASE, BASE, "round 2")
    assert one.weights == (1.0, 1.0, 3.0)
    assert [ranking.weight for ranking in one.rankings] == [1.0, 1.0, 3.0]
    assert (one.pairs(), one.pairs(BASE), one.pairs("round 2")) == (
        [(0, 1), (0, 2), (2, 3)],
        [(0, 1), (0, 2)],
        [(2, 3)],
    )
    assert (two.pairs("round 2"), four.pairs(BASE)) == ([], [])
    assert (set(two.weights), set(four.weights)) == ({1.0}, {3.0})


@pytest.mark.parametrize("half", ["all", "train", "heldout"])
def test_no_prompt_of_two_sources_is_on_two_sides(half: Half, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    elements = gathered(tmp_path, [*rows, *AGAIN, *rows])
    assert len(elements) == 63
    job = RewardModelJob(policy=tmp_path, output=tmp_path, sources=(), half=half, heldout_share=0.5)
    train, heldout = split(elements, job, fraction=0.3, seed=0)
    prompts = [[elements[index].sequences[0].prompt_ids.tobytes() for index in side] for side in (train, heldout)]
    assert len({*prompts[0]} | {*prompts[1]}) == len(train) + len(heldout)
    assert min(len(train), len(heldout)) > 5


@pytest.mark.parametrize("objective", ["k_choose_2", "pairwise", "plackett_luce"])
def test_a_judgement_counts_by_its_source_within_a_prompt_too(tmp_path: Path, objective: str) -> None:
    elements = gathered(tmp_path, AGAIN)
    scores = scores_of(elements)
    # Prompt "one": two judgements of weight 1 and one of weight 3; "two": two of weight 1; "four": one of weight 3.
    losses = [[math.log1p(math.exp(s[w] - s[b])) for b, w in e.pairs()] for e, s in zip(elements, scores, strict=True)]
    (a, b, c), (d, e), (f,) = losses
    whole = [a + b + 3 * c, d + e, 3 * f]
    if objective == "pairwise":
        expected, total = sum(whole) / 10, 10
    else:
        expected, total = (whole[0] / 3 + whole[1] / 2 + whole[2]) / (5 / 3 + 1 + 3), 5 / 3 + 1 + 3
    judged = task(elements, objective)
    assert judged.normalizer([0, 1, 2]) == pytest.approx(total)
    loss, _ = judged.loss(table, [0, 1, 2], normalizer=judged.normalizer([0, 1, 2]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_ranking_without_what_is_too_long_is_kept_while_it_orders_something(tmp_path: Path) -> None:
    long = "w" * 60
    rows = [
        {"prompt": "one", "completions": ["a", long, "c"], "ranks": [1, 2, 3]},
        {"prompt": "two", "completions": ["a", "b", long], "ranks": [1, 1, 3]},
        {"prompt": "three", "chosen": "a", "rejected": long},
        {"prompt": "four", "chosen": "a", "rejected": "b"},
    ]
    elements, reading, _ = read(tmp_path, rows, context_tokens=40)
    assert [len(element.sequences) for element in elements] == [2, 2]
    assert elements[0].rankings == (Ranking(completions=(0, 1), ranks=(1, 3), weight=1.0),)
    assert (reading.num_kept, reading.num_dropped) == (2, 3)
    assert reading.examples == {
        "longer than the model's context of 40 tokens": ["base, comparison 1", "base, comparison 2",
                                                         "base, comparison 3"]
    }  # fmt: skip


def table(ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """A network of one number a sequence: a mean over its row, so that every token counts."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(600, generator=generator)
    row, column = last // ids.shape[1], last % ids.shape[1]
    cumulated = torch.cumsum(values[ids], dim=1)
    return cumulated[row, column] / (1 + positions[row, column])


def task(elements: list[Comparisons], objective: str, centering: float = 0.0) -> ComparisonTask:
    return ComparisonTask(
        elements,
        centering=centering,
        pad_id=0,
        layout="sorted",
        device=torch.device("cpu"),
        objective=objective,
    )


def scores_of(elements: list[Comparisons]) -> list[np.ndarray]:
    scorer = task(elements, "k_choose_2")
    return [scorer.scores(table, [index]).numpy() for index in range(len(elements))]


def test_each_loss_is_the_mean_that_it_says(tmp_path: Path) -> None:
    elements, _, _ = read(tmp_path, [*PAIRS, RANKED], "learner.reward_model.margin=small")
    scores = scores_of(elements)
    by_pair = [
        [
            math.log1p(math.exp(-(s[better] - s[worse] - margin)))
            for better, worse, margin in zip(element.better, element.worse, element.margins, strict=True)
        ]
        for element, s in zip(elements, scores, strict=True)
    ]
    expected = {
        "k_choose_2": np.mean([np.mean(losses) for losses in by_pair]),
        "pairwise": np.mean([loss for losses in by_pair for loss in losses]),
        "plackett_luce": np.mean(
            [
                np.mean([ranking_loss(s, ranking) for ranking in element.rankings])
                for element, s in zip(elements, scores, strict=True)
            ]
        ),
    }  # fmt: skip
    for objective, wanted in expected.items():
        judged = task(elements, objective)
        normalizer = judged.normalizer([0, 1, 2])
        assert normalizer == (9 if objective == "pairwise" else 3)
        loss, diagnostics = judged.loss(table, [0, 1, 2], normalizer=normalizer)
        assert loss.item() == pytest.approx(wanted, rel=1e-5)
        assert 0 <= diagnostics["accuracy"].item() <= 1


def ranking_loss(scores: np.ndarray, ranking: Ranking) -> float:
    total = 0.0
    for place, rank in zip(ranking.completions, ranking.ranks, strict=True):
        below = [scores[p] for p, r in zip(ranking.completions, ranking.ranks, strict=True) if r > rank]
        total += math.log(sum(map(math.exp, [scores[place], *below]))) - scores[place]
    return total


@pytest.mark.parametrize("objective", ["k_choose_2", "pairwise", "plackett_luce"])
def test_micro_batches_and_their_order_do_not_change_the_loss(tmp_path: Path, objective: str) -> None:
    elements, _, _ = read(tmp_path, [*PAIRS, RANKED])
    judged = task(elements, objective, centering=0.01)
    normalizer = judged.normalizer([0, 1, 2])
    whole, figures = judged.loss(table, [0, 1, 2], normalizer=normalizer)
    parts = [judged.loss(table, part, normalizer=normalizer) for part in ([2], [], [1, 0])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-5, atol=1e-6)
    for name, figure in figures.items():
        torch.testing.assert_close(sum(found[name] for _, found in parts), figure, rtol=1e-5, atol=1e-6)


def test_pairs_alone_give_plackett_luce_and_pairs_the_same_loss(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "margin"} for row in PAIRS]
    elements, _, _ = read(tmp_path, rows)
    losses = [task(elements, name).loss(table, [0, 1], normalizer=2.0)[0] for name in ("k_choose_2", "plackett_luce")]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_a_margin_without_pairs_is_refused_by_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plackett_luce has no pairs"):
        tiny_config(tmp_path, "learner.reward_model={loss: plackett_luce, margin: small}")
    config = tiny_config(tmp_path, "learner.reward_model.loss=plackett_luce")
    assert config.learner.reward_model.loss == "plackett_luce"
