"""The top of a report: the run in plain sentences and a few figures, for somebody who was not there."""

from collections.abc import Mapping
from typing import Any

from cluster.report_parts import Fact, Section, duration, interval, listed, number, percent, plural, signed
from cluster.report_record import Record
from cluster.schedule import Phase
from configs.addresses import without_passwords
from configs.data import SourceConfig
from configs.labels import JudgeConfig, LabelerConfig, PeopleConfig, RewardModelLabelerConfig
from configs.scoring import ModelRewardConfig
from protocol import metrics as names
from reward_service.preferences.labeling_report import num_comparisons

_PHASES = {
    Phase.SFT: "training the supervised policy",
    Phase.COLLECT: "collecting comparisons",
    Phase.LABEL: "having comparisons labelled",
    Phase.REFRESH: "training the reward model",
    Phase.CALIBRATE: "fixing the unit of the scores",
    Phase.BASELINE: "sampling the supervised policy's answers",
    Phase.OPTIMISE: "optimising the policy",
    Phase.EVALUATE: "evaluating the policy",
    Phase.RANK: "placing the policy on the ladder",
    Phase.DONE: "done",
}


def summary_section(record: Record) -> Section:
    """Say what was trained, from what, whether it got better and by how much, and what went wrong."""
    went_wrong = problems(record)
    prose = [_trained(record), _learnt_from(record), *_outcome(record), *_position(record)]
    if not went_wrong:
        so_far = "" if record.finished else " so far"
        prose.append(
            f"Nothing went wrong{so_far} that the run knows of: no guard raised an alarm, no new reward model was "
            "turned down, and no incident was recorded."
        )
    return Section(anchor="summary", title="Summary", prose=tuple(prose), alarms=tuple(went_wrong))


def status(record: Record) -> str:
    """Say how far the run is."""
    if record.finished:
        return "Finished."
    if record.state is None:
        begun = record.moments or record.artefacts
        return (
            "Not finished." if begun else "Nothing has been recorded yet; the sections below fill as the run goes on."
        )
    state = record.state
    total = record.config.rounds.count
    where = f"Not finished: round {state.round} of {total}, {_PHASES[state.phase]}"
    if state.phase is Phase.OPTIMISE:
        done = max((m.iteration for m in record.moments if m.round == state.round), default=state.iteration)
        where += f" ({done} of {record.config.rounds.of(state.round).iterations} iterations)"
    return f"{where}. What is missing below comes as the run goes on."


def facts(record: Record) -> tuple[Fact, ...]:
    """Choose the headline figures."""
    found: list[Fact] = []
    evaluation = record.evaluation
    if evaluation is not None:
        before, after = evaluation["before"], evaluation["after"]
        found.append(
            Fact(
                name="win rate against SFT",
                value=percent(after["win_rate"]),
                note=f"{interval(after['win_rate_ci95'], percent)}, {plural(evaluation['num_prompts'], 'prompt')}",
            )
        )
        name, key = ("gold score", "gold_mean") if "gold_mean" in after else ("score", "score_mean")
        found.append(
            Fact(
                name=name, value=signed(after[key] - before[key]), note=f"{signed(before[key])} → {signed(after[key])}"
            )
        )
    if record.standing is not None:
        best = record.standing.ladder.rating(record.standing.best)
        note = "the anchor" if best.version == record.standing.ladder.anchor else interval(best.ci, _elo)
        found.append(Fact(name=f"Elo of the best, {best.version}", value=_elo(best.elo), note=note))
    if evaluation is not None:
        after = evaluation["after"]
        kl, sem = after["kl_k1_per_sequence"], after.get("kl_k1_sem")
        note = "nats a response" if sem is None else f"± {number(1.96 * sem, 2)} nats a response"
        found.append(Fact(name="KL from the reference", value=number(kl, 1), note=note))
        tokens = (before["response_tokens_mean"], after["response_tokens_mean"])
        note = f"{number(tokens[0], 1)} → {number(tokens[1], 1)} tokens"
        change = signed(100 * (tokens[1] / tokens[0] - 1), 0) + "%" if tokens[0] else "–"
        found.append(Fact(name="response length", value=change, note=note))
    if record.num_iterations:
        note = plural(record.num_iterations, "iteration")
        found.append(Fact(name="time of iterations", value=duration(record.seconds), note=note))
    return tuple(found)


def problems(record: Record) -> list[str]:
    """List what went wrong, each in a sentence."""
    found: list[str] = []
    for files in record.rounds:
        report, refresh = files.report or {}, files.refresh or {}
        if report.get("alarm"):
            found.append(
                f"Round {files.number} was stopped by a guard after {plural(report['iterations'], 'iteration')}: "
                f"{report['alarm']}."
            )
        if "stays" in str(refresh.get("why", "")):
            found.append(
                f"Round {files.number}'s new reward model did not pass its gate, so v{refresh['reward_version']:03d} "
                "went on scoring."
            )
        if report and report["best_version"] != report["policy_version"]:
            found.append(
                f"Round {files.number}'s policy v{report['policy_version']:03d} was not promoted: "
                f"v{report['best_version']:03d} stayed the best."
            )
    if record.state is not None and record.state.alarm and not record.finished:
        ended = any(files.report for files in record.rounds if files.number == record.state.round)
        if not ended:
            found.append(f"Round {record.state.round} was stopped by a guard: {record.state.alarm}.")
    if record.standing is not None:
        found += [
            f"The reward model promises more for {drift.version} than was measured: {_elo(drift.predicted_elo)} Elo "
            f"over {drift.over} against {_elo(drift.measured_elo)} ({interval(drift.ci, _elo)})."
            for drift in record.standing.drift
            if drift.alarm
        ]
    if record.incidents:
        found.append(f"{plural(len(record.incidents), 'incident')} recorded; see Incidents and alarms.")
    return found + [f"{problem[:1].upper()}{problem[1:]}." for problem in record.unreadable]


def _trained(record: Record) -> str:
    config = record.config
    policy, demonstrations = config.models.policy, config.data.demonstrations
    begun = "a small model with random weights" if policy.scratch is not None else f"{policy.path}"
    supervised = "" if demonstrations is None else f", taught by demonstrations ({_source(demonstrations)})"
    counts = sorted({config.rounds.of(number_).iterations for number_ in range(1, config.rounds.count + 1)})
    length = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    responses = plural(config.rollout.responses_per_iteration, "response")
    given = config.data.responses
    answers = f"to prompts from {_source(config.data.prompts)}" if given is None else f"of the set {_source(given)}"
    return (
        f"The policy began as {begun}{supervised}: that is v000, called SFT here. From it "
        f"{config.algorithm.name.upper()} optimises in {plural(config.rounds.count, 'round')} of {length} iterations, "
        f"each with {responses} {answers}."
    )


def _learnt_from(record: Record) -> str:
    config = record.config
    if not config.trains_reward_model:
        rewards = [
            f"{reward.name} ({reward.path})" if isinstance(reward, ModelRewardConfig) else reward.name
            for reward in config.scoring.rewards
        ]
        return f"Rewards come from {listed(rewards)}; the run trains no reward model of its own."
    sources = [] if config.data.preferences is None else [f"given preferences ({_source(config.data.preferences)})"]
    for number_ in range(1, config.rounds.count + 1):
        plan = config.rounds.of(number_)
        if plan.collect.comparisons and plan.labeler is not None:
            sources.append(f"{_collected(record, number_)} in round {number_} and judged by {_who(plan.labeler)}")
    refreshed = "is trained anew in every round that brings comparisons" if config.rounds.refresh else "is trained once"
    return f"The reward model {refreshed}; it learns from {listed(sources)}."


def _collected(record: Record, round: int) -> str:
    """Count the tasks that were formed of a round's responses, and the pairs in them; before that, those planned."""
    formed = [
        len(task.candidates)
        for task in record.tasks
        if (task.round, task.purpose) == (round, "training") and task.candidates[0].policy_version is not None
    ]
    if not formed:
        return f"{plural(record.config.rounds.of(round).collect.comparisons, 'task')} to be collected"
    return f"{plural(len(formed), 'task')} ({plural(sum(map(num_comparisons, formed)), 'pair')}) collected"


def _outcome(record: Record) -> list[str]:
    """Say whether the policy got better, by which judge, and by how much."""
    found: list[str] = []
    evaluation = record.evaluation
    if evaluation is not None:
        before, after = evaluation["before"], evaluation["after"]
        low, high = after["win_rate_ci95"]
        verdict = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not distinguishable from"
        sentence = (
            f"On {plural(evaluation['num_prompts'], 'held-out prompt')} v{after['policy_version']:03d} is {verdict} "
            f"SFT: it wins {percent(after['win_rate'])} of the time (95% interval {interval((low, high), percent)}), "
            "judged by "
        )
        if evaluation["judge"] == "gold":
            sentence += (
                f"the gold score, whose mean went from {signed(before['gold_mean'])} to {signed(after['gold_mean'])}."
            )
        else:
            sentence += "the same score that was optimised, which flatters it."
        found.append(sentence)
    if record.standing is not None:
        found.append(_ladder_sentence(record))
    if not found:
        found.append("Whether it got better is known after the first round's evaluation.")
    return found


def _ladder_sentence(record: Record) -> str:
    assert record.standing is not None
    ladder, best = record.standing.ladder, record.standing.best
    rating = ladder.rating(best)
    if best == ladder.anchor:
        return (
            f"On the ladder no version is ahead of SFT beyond doubt, so {best} stays the best of {len(ladder.ratings)}."
        )
    versions = ", ".join(
        f"{other.version} {_elo(other.elo)}" for other in ladder.ratings if other.version != ladder.anchor
    )
    return (
        f"On the ladder the best version is {best}, {_elo(rating.elo)} Elo over SFT "
        f"({percent(ladder.confidence)} interval {interval(rating.ci, _elo)}); all versions: {versions}."
    )


def _position(record: Record) -> list[str]:
    """Say where the last iteration stands, which is all that an unfinished round can say."""
    if not record.moments or record.finished:
        return []
    last: Mapping[str, Any] = record.moments[-1].metrics
    figures = [f"score {signed(last.get(names.OBJECTIVE_SCORE))}", f"KL {number(last.get(names.OBJECTIVE_KL))} nats"]
    moment = record.moments[-1]
    return [f"The last iteration ({moment.iteration} of round {moment.round}) had {listed(figures)}."]


def _source(source: SourceConfig) -> str:
    name = without_passwords(source.source)
    return name if source.count is None else f"{name}, {source.count:,} rows"


def _who(labeler: LabelerConfig) -> str:
    match labeler:
        case PeopleConfig():
            return "people"
        case JudgeConfig():
            return f"the judge {labeler.model}"
        case RewardModelLabelerConfig():
            return f"the reward model {labeler.path}"
        case _:
            return "simulated labelers"


def _elo(value: float) -> str:
    return signed(value, 0)
