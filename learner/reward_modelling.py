"""Reward modelling: a score for responses, learnt from comparisons of them.

All pairs of one prompt are one element of a step, so that a prompt with many pairs counts no more than one with few, a
completion runs through the network once however many pairs it is in, and no prompt is on both sides of the split.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.learner import RewardModelLoss
from configs.load import config_hash
from configs.run import RunConfig
from learner import adapters
from learner.comparison_task import ComparisonTask
from learner.comparisons import Comparisons, ComparisonSource, RewardModelJob, read_comparisons, split
from learner.export import export_reward_model, padding_id
from learner.models import Precision, ScalarModel, load_scalar, scalar_from_policy
from learner.supervised_loop import (
    Report,
    StageContext,
    check_ranks_agree,
    context_tokens,
    layout_of,
    own_groups,
    run_steps,
    stage_seed,
)
from learner.training import TrainingEngine
from learner.validation import paired_gain, validation_report
from protocol.tokens import load_tokenizer

_ALGORITHMS: Mapping[RewardModelLoss, str] = {
    "pairwise": "Bradley-Terry, mean over pairs",
    "k_choose_2": "Bradley-Terry on pairs",
    "plackett_luce": "Plackett-Luce on rankings",
}


def train_reward_model(
    config: RunConfig, context: StageContext, *, job: RewardModelJob, report: Report
) -> dict[str, Any]:
    """Train a reward model and write it; all ranks call this.

    Args:
        config: The run's configuration.
        context: This rank's place.
        job: What to train on, where to start and where to write.
        report: Takes progress.

    Returns:
        The validation report on held-out prompts: all sources together, each source, and, where there is an incumbent,
        the gain over it.

    Raises:
        UserError: If data or model cannot be used.
    """
    settings = config.learner.reward_model
    tokenizer = load_tokenizer(job.policy)
    model = _initial_model(config, job)
    elements, reading = read_comparisons(
        config, tokenizer, job.sources, context_tokens=context_tokens(model), beat=context.beat
    )
    train, heldout = split(elements, job, fraction=settings.heldout_fraction, seed=config.run.seed)
    steps = _steps(config, elements, train, job=job)
    layout = layout_of(model, config.learner)
    engine = context.make_engine(model, optimizer=settings.optimizer, name="reward model", total_steps=len(steps))
    check_ranks_agree(engine, (sequence for element in elements for sequence in element.sequences))
    task = ComparisonTask(
        elements,
        centering=settings.centering,
        pad_id=padding_id(tokenizer),
        layout=layout,
        device=context.device,
        objective=settings.loss,
    )
    figures = run_steps(engine, task, steps, settings=config.learner, report=report)
    scores = _scores(engine, task, heldout, config=config)
    summary: dict[str, Any] = {
        "round": job.round,
        "trained_on": job.half,
        "num_train_prompts": len(train),
        "num_train_pairs": sum(len(elements[index].better) for index in train),
        "num_dropped": reading.num_dropped,
        "num_steps": len(steps),
        "train_loss": figures["loss"],
        "sources": _sources(elements, job.sources, train),
        "heldout": _judged(scores, task, heldout),
        "heldout_by_source": {
            source.name: _judged(scores, task, heldout, source=source.name)
            for source in job.sources
            if any(elements[i].pairs(source.name) for i in heldout)
        },
    }
    if job.incumbent is not None:
        summary["gate"] = _gate(config, context, job, task=task, heldout=heldout, scores=scores)
    card = _card(config, job, data=reading.summary(), summary=summary)
    export_reward_model(engine, tokenizer, job.output, card=card, report=summary)
    engine.close()
    return summary


def _initial_model(config: RunConfig, job: RewardModelJob) -> ScalarModel:
    settings, precision = config.models.reward, config.learner.precision
    model = _untouched_model(job, init=settings.init, precision=precision, seed=config.run.seed)
    seed = stage_seed(config.run.seed, "reward model adapter")
    adapters.choose(model, settings.train, seed=seed, where="models.reward.train")
    return model


def _untouched_model(job: RewardModelJob, *, init: str, precision: Precision, seed: int) -> ScalarModel:
    if job.start is not None:
        return load_scalar(job.start, precision=precision)
    if init == "sft":
        return scalar_from_policy(job.policy, seed=stage_seed(seed, "score head"), precision=precision)
    return load_scalar(init, precision=precision)


def _steps(
    config: RunConfig, elements: Sequence[Comparisons], train: Sequence[int], *, job: RewardModelJob
) -> list[list[int]]:
    """Plan the steps of all epochs: whole prompts, up to `batch_pairs` pairs a step."""
    settings = config.learner.reward_model
    steps: list[list[int]] = []
    for epoch in range(settings.num_epochs):
        order = np.random.default_rng(
            stage_seed(config.run.seed, "reward model", job.round, job.half, epoch)
        ).permutation(len(train))
        steps += _filled([train[place] for place in order], elements, size=settings.batch_pairs)
    return steps


def _filled(order: Sequence[int], elements: Sequence[Comparisons], *, size: int) -> Iterator[list[int]]:
    step: list[int] = []
    num_pairs = 0
    for index in order:
        if step and num_pairs + len(elements[index].better) > size:
            yield step
            step, num_pairs = [], 0
        step.append(index)
        num_pairs += len(elements[index].better)
    yield step


def _scores(
    engine: TrainingEngine, task: ComparisonTask, heldout: Sequence[int], *, config: RunConfig
) -> dict[int, NDArray[np.float64]]:
    """Score every completion of the held-out prompts, on all ranks.

    Returns:
        Element -> [K] scores.
    """
    starts = np.cumsum([0, *(len(task.elements[index].sequences) for index in heldout)])
    start_of = dict(zip(heldout, starts.tolist(), strict=False))
    scores = torch.zeros(int(starts[-1]), dtype=torch.float64, device=engine.context.device)
    for group in own_groups(engine, task, heldout, settings=config.learner):
        found = task.scores(engine.evaluate, group).double()
        taken = 0
        for index in group:
            num = len(task.elements[index].sequences)
            scores[start_of[index] : start_of[index] + num] = found[taken : taken + num]
            taken += num
    everything: NDArray[np.float64] = engine.all_reduce_sum(scores).cpu().numpy()
    return {index: everything[start : start + len(task.elements[index].sequences)] for index, start in start_of.items()}


def _judged(
    scores: Mapping[int, NDArray[np.float64]],
    task: ComparisonTask,
    indices: Sequence[int],
    *,
    source: str | None = None,
) -> dict[str, Any]:
    """Judge the scores of some held-out prompts by their pairs, or by those from one source and what they compare."""
    found: list[float] = []
    tokens: list[int] = []
    sides: list[int] = []
    judged = {index: pairs for index in indices if (pairs := task.elements[index].pairs(source))}
    for index, pairs in judged.items():
        places = sorted({side for pair in pairs for side in pair})
        start_of = {place: len(found) + number for number, place in enumerate(places)}
        sides += [start_of[side] for pair in pairs for side in pair]
        found += scores[index][places].tolist()
        tokens += [len(task.elements[index].sequences[place].response_ids) for place in places]
    return {"num_prompts": len(judged)} | validation_report(
        np.array(found),
        better=np.array(sides[::2]),
        worse=np.array(sides[1::2]),
        response_tokens=np.array(tokens),
    )


def _gate(
    config: RunConfig,
    context: StageContext,
    job: RewardModelJob,
    *,
    task: ComparisonTask,
    heldout: Sequence[int],
    scores: Mapping[int, NDArray[np.float64]],
) -> dict[str, Any]:
    """Judge the incumbent on the same held-out pairs, and say by how much the new model is better."""
    assert job.incumbent is not None
    settings = config.rounds.gate
    newest = job.sources[-1].name
    source = None if settings.pairs == "all" else newest
    judged = [index for index in heldout if task.elements[index].pairs(source)]
    if len(judged) < settings.min_prompts:
        return {
            "incumbent": job.incumbent.name,
            "pairs": settings.pairs,
            "passed": False,
            "num_prompts": len(judged),
            "why": f"{len(judged)} held-out prompts of {newest} are too few to tell (rounds.gate.min_prompts = "
            f"{settings.min_prompts}); collect more comparisons, or raise learner.reward_model.heldout_fraction",
        }
    model = load_scalar(job.incumbent, precision=config.learner.precision)
    optimizer = config.learner.reward_model.optimizer
    engine = context.make_engine(model, optimizer=optimizer, name="incumbent", total_steps=1)
    before = _scores(engine, task, judged, config=config)
    engine.close()
    gaps = [
        [
            (found[index][better] - found[index][worse])
            for index in judged
            for better, worse in task.elements[index].pairs(source)
        ]
        for found in (scores, before)
    ]
    return {"incumbent": job.incumbent.name, "pairs": settings.pairs} | paired_gain(
        np.array(gaps[0]),
        np.array(gaps[1]),
        prompts=np.array([number for number, index in enumerate(judged) for _ in task.elements[index].pairs(source)]),
        metric=settings.metric,
        confidence=settings.confidence,
        resamples=settings.bootstrap_resamples,
        seed=config.run.seed,
    )


def _sources(
    elements: Sequence[Comparisons], sources: Sequence[ComparisonSource], train: Sequence[int]
) -> dict[str, dict[str, float]]:
    trained_on = [elements[index] for index in train]
    return {
        source.name: {
            "weight": source.weight,
            "num_train_prompts": sum(source.name in element.sources for element in trained_on),
            "num_train_pairs": sum(element.sources.count(source.name) for element in trained_on),
        }
        for source in sources
    }


def _card(config: RunConfig, job: RewardModelJob, *, data: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    init = f"policy {job.policy.name}" if config.models.reward.init == "sft" else config.models.reward.init
    heldout = {name: value for name, value in summary["heldout"].items() if isinstance(value, int | float)}
    sections = ("heldout", "heldout_by_source", "sources", "gate")
    return {
        "run": config.run.name,
        "version": job.output.name,
        "base": init if job.start is None else f"reward model {job.start.name}",
        "data": data,
        "algorithm": _ALGORITHMS[config.learner.reward_model.loss],
        "config": config_hash(config),
        "training": {name: value for name, value in summary.items() if name not in sections},
        "held-out prompts": heldout,
    }
