"""Labelers that need the run's own workers: a judge in the rollout workers' places, a reward model with the scorers."""

from collections.abc import Sequence

import numpy as np

from cluster.crew import Crew
from cluster.schedule import JUDGING
from configs.labels import AutomaticLabelerConfig, JudgeConfig, RewardModelLabelerConfig
from configs.run import RunConfig
from protocol import tokens
from protocol.messages import FloatArray, Prompt, RolloutKey, RolloutRequest
from protocol.records import Text
from protocol.tokens import Message
from reward_service.preferences.completion import CompletionFailure
from reward_service.preferences.labelers import make_labeler
from reward_service.preferences.labeling_protocol import Labeler

_MAX_QUESTION_TOKENS = 8192


def labeler_of(config: RunConfig, crew: Crew, labeler: AutomaticLabelerConfig) -> Labeler:
    """Make a labeler that is not a person, over the run's own workers where it needs any.

    Args:
        config: The run's configuration.
        crew: The workers.
        labeler: Who labels.

    Returns:
        The labeler.

    Raises:
        UserError: If what it needs cannot be loaded.
    """
    seed = config.run.seed
    match labeler:
        case RewardModelLabelerConfig():

            def score_texts(prompts: Sequence[Text], responses: Sequence[str]) -> FloatArray:
                return crew.scoring.score_texts(labeler.path, prompts, responses)

            return make_labeler(labeler, run_seed=seed, score_texts=score_texts)
        case JudgeConfig(url=None):
            return make_labeler(labeler, run_seed=seed, complete=WorkersCompleter(config, crew, labeler))
        case _:
            return make_labeler(labeler, run_seed=seed)


class WorkersCompleter:
    """A judge on the run's own engines, greedy; the rollout workers make room for it and come back afterwards.

    Args:
        config: The run's configuration.
        crew: The workers.
        judge: The model and the length of its answers.
    """

    def __init__(self, config: RunConfig, crew: Crew, judge: JudgeConfig) -> None:
        self._crew = crew
        self._judge = judge
        self._tokenizer = tokens.load_tokenizer(judge.model)
        room = min(_MAX_QUESTION_TOKENS, tokens.context_tokens(judge.model) - judge.max_answer_tokens)
        self._rollout = config.rollout.model_copy(
            update={
                "max_prompt_tokens": room,
                "max_response_tokens": judge.max_answer_tokens,
                "decoding": "greedy",
                "truncated_sampling": "allow",
            }
        )

    def complete(self, prompts: Sequence[Sequence[Message]], *, max_tokens: int) -> list[str | CompletionFailure]:
        """Answer every question; one that is too long for the model has no answer."""
        encoded = [tokens.encode_prompt(self._tokenizer, list(prompt)) for prompt in prompts]
        requests: list[RolloutRequest] = []
        for number, ids in enumerate(encoded):
            if len(ids) <= self._rollout.max_prompt_tokens:
                name = f"{number:06d}"
                prompt = Prompt(prompt_id=name, token_ids=np.array(ids, np.int32), text="")
                key = RolloutKey(round=0, iteration=JUDGING, prompt_id=name, sample=0)
                requests.append(
                    RolloutRequest(key=key, prompt=prompt, seed=0, max_response_tokens=max_tokens, temperature=1.0)
                )
        answers: list[str | CompletionFailure] = [
            CompletionFailure(
                reason=f"too long: a question of {len(ids)} tokens, the judge takes {self._rollout.max_prompt_tokens}"
            )
            for ids in encoded
        ]
        with self._crew.judging(self._judge.model, self._rollout) as pool:
            for rollout in pool.fetch(list(pool.generate(requests, policy_version=0))):
                text = tokens.decode(self._tokenizer, rollout.response_ids.tolist())
                answers[int(rollout.key.prompt_id)] = text
        return answers
