"""One iteration of learning from a choice among each prompt's responses: DPO, and rejection-sampling fine-tuning.

It stands beside `learner.update`, with the same surface. What is learned depends on the batch, the settings, the seed
and, for RFT, on what was chosen before: not on padding, micro-batches, ranks or ZeRO.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from configs.learner import BatchGuardsConfig
from configs.selection import DPOConfig, RFTConfig, SelectionConfig
from learner import selection
from learner.batch import even_minibatches, shuffle_seed
from learner.experience import Opinions, PassSettings, ResponseBatch, evaluate, flatten
from learner.ops import kl
from learner.sample_memory import Remembered, SampleMemory
from learner.selection_steps import ImitationObjective, Objective, PairObjective, SelectionSteps
from learner.training import TrainingEngine
from learner.trust import gap_metrics, require_trust
from learner.update_metrics import mismatch_metrics, sampling_metrics, selection_metrics
from protocol import metrics as names
from protocol.messages import ScoredBatch, UpdateReport


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSettings:
    """Everything that an update depends on besides the batch and the memory."""

    algorithm: SelectionConfig
    passes: PassSettings
    run_seed: int
    guards: BatchGuardsConfig | None = None
    """None where the log-probs of engine and learner are of different distributions."""


class SelectionUpdater:
    """Learns from scored batches with a policy engine alone.

    Args:
        policy: Over a PolicyModel.
        settings: What to do.
    """

    critic: TrainingEngine | None = None
    controller: kl.KLController | None = None
    reward_kl_beta = 0.0

    def __init__(self, *, policy: TrainingEngine, settings: SelectionSettings) -> None:
        self.policy = policy
        self.settings = settings
        self.computed: Mapping[str, list[Tensor]] = {}
        """What has been computed from the last batch: name -> one vector a response; for whoever keeps that batch."""
        self.memory: SampleMemory | None = None
        if isinstance(settings.algorithm, RFTConfig):
            self.memory = SampleMemory()

    @property
    def engines(self) -> dict[str, TrainingEngine]:
        """The engines by name, as a checkpoint keeps them."""
        return {"policy": self.policy}

    def update(self, batch: ScoredBatch) -> UpdateReport:
        """Learn from a batch. All ranks call this with the same batch.

        Args:
            batch: In key order.

        Returns:
            What happened, the same on all ranks. A batch without a pair makes no step.

        Raises:
            NonFiniteError: If a score or log-prob is not finite, naming the rollout; a loss or gradient, unless it is
                skipped; or a parameter, after the last step.
            UntrustedBatchError: If the log-probs show that another policy has sampled the batch.
        """
        settings = self.settings
        self.computed = {}
        responses = flatten(batch, device=self.policy.context.device)
        opinions = evaluate(responses, policy=self.policy, critic=None, settings=settings.passes)
        self.computed = {"old_logprobs": responses.split(opinions.old_logprobs)}
        metrics = gap_metrics(responses, opinions.old_logprobs)
        if settings.guards is not None:
            require_trust(responses, opinions.old_logprobs, found=metrics, guards=settings.guards)
        old, ref = responses.padded(opinions.old_logprobs), responses.padded(responses.ref_logprobs)
        metrics |= sampling_metrics(responses, opinions, kl_nats=kl.kl_per_sequence(old, ref, mask=responses.mask).nats)
        metrics |= mismatch_metrics(
            responses, opinions.old_logprobs, correction=None, policy_version=batch.policy_version
        )

        objective, chosen = self._choose(batch, responses, opinions)
        steps = self._learn(batch, objective)
        self.policy.require_finite_parameters()
        if self.memory is not None:
            self.memory.add(chosen.remembered)
            metrics[names.RFT_MEMORY] = float(len(self.memory))
        return UpdateReport(
            metrics=metrics | chosen.metrics | selection_metrics(steps.log),
            num_steps=steps.log.num_applied,
            num_skipped_steps=steps.log.num_skipped,
            kl_nats_per_sequence=dict(zip(responses.keys, kl.k1(old, ref).sum(dim=1).tolist(), strict=True)),
        )

    def _choose(self, batch: ScoredBatch, responses: ResponseBatch, opinions: Opinions) -> tuple[Objective, "_Choice"]:
        """Choose what is learned from a batch."""
        ranking = selection.ranked(batch, run_seed=self.settings.run_seed)
        match self.settings.algorithm:
            case DPOConfig() as algorithm:
                pairs = selection.best_against_worst(batch, ranking)
                metrics = {
                    names.DPO_PAIRS: float(len(pairs.chosen)),
                    names.DPO_TIED: float(pairs.num_tied),
                    names.DPO_IDENTICAL: float(pairs.num_identical),
                }
                objective = PairObjective(responses, opinions.old_logprobs, pairs, settings=algorithm)
                return objective, _Choice(metrics=metrics)
            case RFTConfig() as algorithm:
                places = [place for order in ranking for place in order[: algorithm.kept_per_prompt]]
                best = [Remembered.of(batch.rollouts[place]) for place in places]
                recalled = self._recalled(batch, best, num=algorithm.memory_responses)
                metrics = {
                    names.RFT_CHOSEN: float(len(best)),
                    names.RFT_CHOSEN_SCORE: math.fsum(sample.score for sample in best) / len(best),
                    names.RFT_TIED: float(selection.num_tied_for_best(batch, ranking)),
                    names.RFT_RECALLED: float(len(recalled)),
                }
                objective = ImitationObjective([sample.sequence for sample in (*best, *recalled)])
                return objective, _Choice(metrics=metrics, remembered=tuple(best))

    def _recalled(self, batch: ScoredBatch, best: Sequence[Remembered], *, num: int) -> list[Remembered]:
        """Choose what is learned once more; a response that this very batch has sampled again counts once."""
        assert self.memory is not None
        seed = shuffle_seed(self.settings.run_seed, batch.round, batch.iteration, self.settings.algorithm.num_epochs)
        return self.memory.draw(num, seed=seed, without={sample.identity for sample in best})

    def _learn(self, batch: ScoredBatch, objective: Objective) -> SelectionSteps:
        """Take all steps of an update."""
        algorithm = self.settings.algorithm
        steps = SelectionSteps(self.policy, objective, settings=self.settings.passes)
        most = algorithm.minibatch_responses // algorithm.responses_together
        for epoch in range(algorithm.num_epochs):
            seed = shuffle_seed(self.settings.run_seed, batch.round, batch.iteration, epoch)
            for indices in even_minibatches(len(objective.units), most=most, seed=seed):
                steps.take(indices)
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What was chosen of a batch: in numbers, and what of it is remembered."""

    metrics: dict[str, float]
    remembered: tuple[Remembered, ...] = ()
