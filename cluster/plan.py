"""What a run would do, worked out before anything starts: batch arithmetic and placement."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from configs.load import config_hash
from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from configs.selection import SelectionBase


def batch_arithmetic(config: RunConfig) -> dict[str, int]:
    """Work out how an iteration's responses are cut up, from the whole batch down to one rank."""
    rollout, algorithm, learner = config.rollout, config.algorithm, config.learner
    responses = rollout.responses_per_iteration
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    minibatches = config.minibatches_per_epoch
    iterations = sum(config.rounds.of(number).iterations for number in range(1, config.rounds.count + 1))
    # Ties, responses that are dropped and a memory that is not full yet leave fewer to learn from.
    varies = isinstance(algorithm, SelectionBase) or algorithm.truncated_value == "drop"
    most = " (at most)" if varies else ""
    return {
        "prompts an iteration": rollout.prompts_per_iteration,
        "samples a prompt": rollout.samples_per_prompt,
        "responses an iteration": responses,
        "responses a rollout worker (at most)": -(-responses // rollout.workers),
        "scoring groups": -(-responses // config.scoring.group_responses),
        "responses a minibatch": algorithm.minibatch_responses,
        "responses a minibatch and rank (about)": -(-algorithm.minibatch_responses // learner.workers),
        "longest sequence in tokens": longest,
        "sequences a micro-batch (at least)": learner.micro_batch_tokens // longest,
        "minibatches an epoch": minibatches,
        "epochs": algorithm.num_epochs,
        f"optimiser steps an iteration{most}": minibatches * algorithm.num_epochs,
        "rounds": config.rounds.count,
        "iterations in all": iterations,
        f"optimiser steps in all{most}": minibatches * algorithm.num_epochs * iterations,
    }


def placement_rows(config: RunConfig) -> list[tuple[str, int, str, str]]:
    """List role, workers, what each asks for, and the strategy.

    `cluster.placement.plan` turns the same numbers into placement groups; this one needs no Ray.
    """
    cuda = config.cluster.backend == "cuda"
    rollout, scoring, learner, places = config.rollout, config.scoring, config.learner, config.cluster.placement
    rows = (
        ("rollout", rollout.workers, rollout.cpus_per_worker, float(rollout.tensor_parallel), places.rollout),
        ("reward", scoring.workers, scoring.cpus_per_worker, scoring.gpus_per_worker, places.scoring),
        ("reference", scoring.reference_workers, scoring.cpus_per_worker, scoring.gpus_per_worker, places.scoring),
        ("learner", learner.workers, learner.cpus_per_worker, 1.0, places.learner),
    )
    return [
        (
            role,
            workers,
            " + ".join(
                [f"{cpus:g} CPU"]
                + ([f"{gpus:g} GPU"] if cuda and gpus else [])
                + [f"{amount:g} {name}" for name, amount in place.resources.items()]
            ),
            place.strategy,
        )
        for role, workers, cpus, gpus, place in rows
    ]


def render(config: RunConfig) -> RenderableType:
    """Lay the plan out for a terminal."""
    rewards = ", ".join(
        f"{r.weight:g} x {r.name} ({r.path if isinstance(r, ModelRewardConfig) else r.kind})"
        for r in config.scoring.rewards
    )
    given = config.data.responses
    head = Text(
        f"run {config.run.name}, config {config_hash(config)}, algorithm {config.algorithm.name}, "
        f"seed {config.run.seed}, ZeRO-{config.learner.zero_stage} {config.learner.precision}\n"
        f"rewards ({config.scoring.combine.kind}): {rewards}"
        + ("" if given is None else f"\nresponses: none are sampled to learn from; those of {given.source} are")
    )
    arithmetic = Table(title="Batch arithmetic", title_justify="left", show_header=False)
    arithmetic.add_column()
    arithmetic.add_column(justify="right")
    for name, value in batch_arithmetic(config).items():
        arithmetic.add_row(name, f"{value:,}")
    placement = Table("role", "workers", "each asks for", "strategy", title="Placement", title_justify="left")
    for role, workers, asks, strategy in placement_rows(config):
        placement.add_row(role, str(workers), asks, strategy)
    return Group(head, arithmetic, placement)
