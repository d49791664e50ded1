"""How the networks are trained: ranks, ZeRO, precision, optimisers, and the supervised stages."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
)

Beta = Annotated[float, Field(ge=0, lt=1)]
RewardModelLoss = Literal["pairwise", "k_choose_2", "plackett_luce"]
MarginKind = Literal["none", "given", "small", "large"]


class OptimizerConfig(Section):
    """AdamW and its schedule, counted in optimiser steps."""

    learning_rate: PositiveFloat = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_fraction: Fraction = 0.1
    """Share of the learning rate that is left at the end of a linear or cosine schedule."""


class SFTConfig(Section):
    """Supervised fine-tuning on demonstrations; the loss counts response tokens only."""

    batch_sequences: PositiveInt = 48
    num_steps: PositiveInt | None = None
    """Optimiser steps; without it, `num_epochs` decides."""
    num_epochs: PositiveInt = 1
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, schedule="cosine")


class RewardModelTrainingConfig(Section):
    """Reward modelling on comparisons: pairs and rankings."""

    loss: RewardModelLoss = "k_choose_2"
    """`k_choose_2`: mean over all pairs of a prompt, then over prompts. `pairwise`: mean over pairs, so that a ranking
    of K counts K(K-1)/2 times. `plackett_luce`: each ranking as a whole; it sums K - 1 terms, so that the learning
    rate wants tuning anew. A prompt's pairs stay together whatever the loss, and tied completions make none."""
    margin: MarginKind = "none"
    """By how much the better score should lead. `none`: scores stay log-odds of being preferred. `given`: by the number
    in the data (a label's strength, 1 to 3), 0 where there is none. `large` and `small`: strengths of 0 to 3 as 0, 1,
    2, 3 and as 0, 1/3, 2/3, 1 (Llama 2, table 27); any other number in the data is an error. Margins stretch scores,
    and large ones split them in two, which is hard on RL."""
    batch_pairs: PositiveInt = 32
    num_epochs: PositiveInt = 1
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts (never of the pairs) kept for the validation report."""
    centering: NonNegativeFloat = 0.0
    """Coefficient of the squared sum of a pair's scores."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6, schedule="cosine")

    @model_validator(mode="after")
    def _margins_are_between_two(self) -> Self:
        if self.loss == "plackett_luce" and self.margin != "none":
            raise ValueError(
                f"margin = {self.margin} says by how much one response leads another, but loss = plackett_luce has no "
                "pairs to apply it to: set margin to none, or loss to k_choose_2"
            )
        return self


class BatchGuardsConfig(Section):
    """When a batch is refused before anything is learned from it: the rollout workers' log-probs against the learner's.

    They are not compared where sampling truncates the distribution (rollout.truncated_sampling).
    """

    logprob_gap_mean_nats: PositiveFloat | None = 0.1
    """Largest mean gap of a token's log-prob; bfloat16 makes about 0.01."""
    ratio_p999: Annotated[float, Field(gt=1)] | None = 10.0
    """Largest 99.9th percentile of the importance weights, learner over rollout worker."""
    ess_fraction: PositiveFraction | None = 0.5
    """Smallest effective sample size, as a share of the tokens."""


class LearnerConfig(Section):
    """The learner: a group of ranks under DeepSpeed ZeRO."""

    workers: PositiveInt = 1
    """Ranks; on CUDA one accelerator each."""
    cpus_per_worker: PositiveFloat = 1.0
    threads_per_worker: PositiveInt = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch_tokens: PositiveInt = 4096
    """Tokens of one forward and backward pass, prompt included."""
    packing: Literal["auto", "packed", "sorted"] = "auto"
    """`packed`: sequences end to end, without padding; `sorted`: padded micro-batches of similar lengths. `auto` packs
    where variable-length attention exists (CUDA) and sorts elsewhere."""
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    max_grad_norm: PositiveFloat = 1.0
    policy_optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6)
    sft: SFTConfig = SFTConfig()
    reward_model: RewardModelTrainingConfig = RewardModelTrainingConfig()
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do about numbers that are not finite; the batch is saved in any case. `stop`: end the run. `skip`: leave
    the step out whose loss or gradient it is; anything else stops. `rollback`: all ranks go back to the last
    checkpoint, as after a rank's loss and bounded by cluster.learner_restarts, also where a batch is refused by
    `guards`. That helps against a fault that passes, of a machine or of one rollout worker. Where nothing has changed
    the same iteration meets the same batch again, so a second rollback of one iteration stops the run with the
    cause."""
    max_consecutive_skips: NonNegativeInt = 3
    """More skipped steps in a row stop the run."""
    max_skips_per_round: NonNegativeInt = 20
    """More skipped steps of one network in a round stop the run."""
    guards: BatchGuardsConfig = BatchGuardsConfig()
    bucket_mib: PositiveFloat = 256.0
    """Size of one bucket of published weights; bounds the extra memory of a publish."""
