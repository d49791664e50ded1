"""Batches with several responses to each prompt, for the methods that choose among them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.learner import BatchGuardsConfig, LearnerConfig, OptimizerConfig
from configs.selection import SelectionConfig
from learner.experience import PassSettings
from learner.selection_update import SelectionSettings, SelectionUpdater
from protocol.messages import ScoredBatch, ScoredRollout
from tests.learner_batches import scored_batch, tiny_policy
from tests.plain_engine import RecordingEngine


def make_updater(
    algorithm: SelectionConfig,
    *,
    token_budget: int = 256,
    layout: Any = "sorted",
    pad_id: int = 0,
    temperature: float = 1.0,
    guards: BatchGuardsConfig | None = None,
    settings: LearnerConfig | None = None,
) -> SelectionUpdater:
    """Build an updater over the tiny policy and plain PyTorch."""
    rate = OptimizerConfig(learning_rate=1e-3)
    return SelectionUpdater(
        policy=RecordingEngine(tiny_policy(), optimizer=rate, settings=settings or LearnerConfig(), name="policy"),
        settings=SelectionSettings(
            algorithm=algorithm,
            passes=PassSettings(temperature=temperature, token_budget=token_budget, layout=layout, pad_id=pad_id),
            run_seed=0,
            guards=guards,
        ),
    )


def sampled(
    num_prompts: int = 6, *, samples: int = 3, seed: int = 0, round: int = 1, iteration: int = 0
) -> ScoredBatch:
    """Draw several responses to each prompt; the prompts of every batch are the same, and the responses are not."""
    drawn = scored_batch(num_prompts * samples, seed=seed, iteration=iteration)
    prompts = [scored.rollout.prompt for scored in scored_batch(num_prompts, seed=99).rollouts]
    rollouts: list[ScoredRollout] = []
    for number, scored in enumerate(drawn.rollouts):
        prompt = prompts[number // samples]
        key = scored.rollout.key._replace(round=round, prompt_id=prompt.prompt_id, sample=number % samples)
        rollouts.append(replace(scored, rollout=replace(scored.rollout, key=key, prompt=prompt)))
    return replace(drawn, round=round, rollouts=tuple(rollouts))


def with_scores(batch: ScoredBatch, scores: list[float]) -> ScoredBatch:
    """Give the responses these scores."""
    pairs = zip(batch.rollouts, scores, strict=True)
    return replace(batch, rollouts=tuple(replace(scored, score=score) for scored, score in pairs))


def with_same_response(batch: ScoredBatch, places: list[int]) -> ScoredBatch:
    """Let the responses at these places be that of the first."""
    first, rollouts = batch.rollouts[places[0]], list(batch.rollouts)
    for place in places[1:]:
        rollout = replace(first.rollout, key=rollouts[place].rollout.key)
        rollouts[place] = replace(rollouts[place], rollout=rollout, ref_logprobs=first.ref_logprobs)
    return replace(batch, rollouts=tuple(rollouts))


def plain_logprobs(network: Any, prompt_ids: np.ndarray, response_ids: np.ndarray, temperature: float = 1.0) -> Tensor:
    """Compute the log-probs of a response by a plain forward of its sequence alone."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, response_ids])).long()
    every = torch.log_softmax(network(input_ids=ids[None]).logits[0] / temperature, dim=-1)[:-1]
    return every.gather(-1, ids[1:, None])[len(prompt_ids) - 1 :, 0]


def at_the_reference(batch: ScoredBatch, *, temperature: float = 1.0) -> ScoredBatch:
    """Let the policy be the reference, and the one that sampled."""
    network, rollouts = tiny_policy().network, []
    for scored in batch.rollouts:
        rollout = scored.rollout
        with torch.no_grad():
            own = plain_logprobs(network, rollout.prompt.token_ids, rollout.response_ids, temperature).numpy()
        rollouts.append(replace(scored, rollout=replace(rollout, behavior_logprobs=own), ref_logprobs=own))
    return replace(batch, rollouts=tuple(rollouts))
