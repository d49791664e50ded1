"""Labelers that live on the run's own workers: a judge on its engines, a reward model with its scorers."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from protocol.tokens import load_tokenizer
from tests.integration.test_rounds import overrides, store
from tests.rondo_process import rondo

ANSWER = "VERDICT: A"


def write_parrot(source: Path, output: Path) -> None:
    """Make a model that answers ANSWER to everything: each token's embedding points at the token that follows it."""
    tokenizer: Any = load_tokenizer(source)
    config = AutoConfig.from_pretrained(source)
    config.max_position_embeddings = 4096
    config.tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_config(config)
    chain = [*tokenizer.encode(ANSWER, add_special_tokens=False), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain)
    assert len(chain) < config.hidden_size
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1.0
        for place, (token, following) in enumerate(pairwise(chain), start=1):
            model.model.embed_tokens.weight[token] = torch.eye(config.hidden_size)[place]
            model.lm_head.weight[following, place] = 1.0
        model.lm_head.weight[chain[0], 0] = 1.0
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_reward_model_labels_and_a_judge_ranks_on_the_workers_of_the_run(tmp_path: Path) -> None:
    made = rondo("train", "quickstart", *overrides(tmp_path / "first", "rounds.count=1"))
    assert made.returncode == 0, made.stderr + made.stdout
    first = tmp_path / "first" / "rounds"
    write_parrot(first / "policies" / "v000", tmp_path / "judge")

    done = rondo(
        "train",
        "quickstart",
        *overrides(tmp_path, "rounds.count=1", 'rounds.overrides={"1": {}}'),
        f"rounds.labeler={{kind: reward_model, path: {first / 'reward_models' / 'v000'}}}",
        f"rounds.evaluation.labeler={{kind: judge, model: {tmp_path / 'judge'}, max_answer_tokens: 16}}",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    run = tmp_path / "rounds"
    with store(run) as preferences:
        training = preferences.labels(purpose="training")
        judged = preferences.labels(purpose="evaluation")
        tasks = {task.task_id: task for task in preferences.tasks()}
    assert {label.labeler_kind for label in training} == {"reward_model"}
    assert {label.outcome.verdict for label in training} <= {"preference", "tie"}
    assert any(label.outcome.verdict == "preference" for label in training)
    # It says A whichever comes first, and so contradicts itself when the order is swapped: that is a tie, and a flip.
    assert len(judged) == sum(task.purpose == "evaluation" for task in tasks.values())
    assert {(label.labeler_kind, label.outcome.verdict) for label in judged} == {("judge", "tie")}
    ratings = json.loads((run / "ladder.json").read_text())["ratings"]
    assert {round(rating["elo"]) for rating in ratings} == {0}
