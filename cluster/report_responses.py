"""A report's sections on what the policies say: lengths by version, and answers side by side."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from cluster.report_charts import Axis, HistogramRow, histogram_rows
from cluster.report_parts import (
    Cell,
    Exchange,
    Figure,
    Response,
    Section,
    Table,
    clipped,
    number,
    percent,
    spread,
    turns,
)
from cluster.report_record import Lengths, Record
from reward_service.preferences.records import Label, Task

_MAX_VERSIONS = 8
_SIDE_BY_SIDE = 4
_NUM_PROMPTS = 8
_MAX_CHARS = 20_000
_NUM_BINS = 32


def lengths_section(record: Record) -> Section:
    """Show the distribution of response lengths of each version."""
    title, anchor = "Response lengths", "lengths"
    if not record.lengths:
        return Section(anchor=anchor, title=title, prose=("Distributions appear here with the first evaluation.",))
    shown = spread(record.lengths, _MAX_VERSIONS)
    longest = max(max(entry.tokens) for entry in record.lengths)
    x = Axis.over([0.0, float(longest + 1)], "response tokens", include=(0.0, float(longest + 1)))
    rows = [
        HistogramRow(
            label=entry.version,
            counts=_binned(entry.tokens, longest),
            middle=median(entry.tokens),
            style=0 if place == 0 else 1,
        )
        for place, entry in enumerate(shown)
    ]
    said = "; ".join(f"{entry.version} median {median(entry.tokens):g}" for entry in shown)
    figure = Figure(
        title="Lengths on the held-out prompts",
        svg=histogram_rows(rows, x=x, alternative=f"Histograms of response lengths in tokens: {said}."),
        note="The stroke is the median.",
        wide=True,
    )
    table = Table(
        caption="Response tokens on the held-out prompts",
        columns=("version", "responses", "10%", "median", "90%", "longest", "cut off"),
        rows=tuple(_lengths_row(entry) for entry in record.lengths),
    )
    return Section(anchor=anchor, title=title, figures=(figure,), tables=(table,))


def samples_section(record: Record) -> Section:
    """Show what the versions answer to the same prompts, or else what was sampled while training."""
    title, anchor = "The same prompts, answered by each version", "samples"
    exchanges = _evaluated(record)
    if exchanges:
        prose = (
            "Prompts evenly chosen from those that were compared for the ladder, not picked for effect. Answers are as "
            "they were sampled; signs in ⟨⟩ stand for characters that cannot be seen.",
        )
        return Section(anchor=anchor, title=title, prose=prose, exchanges=exchanges)
    exchanges = _while_training(record)
    if exchanges:
        prose = (
            "The preference store holds no answers of several versions to one prompt (yet). These were sampled in the "
            "first and in the latest iteration, to different prompts.",
        )
        return Section(anchor=anchor, title="Answers sampled while training", prose=prose, exchanges=exchanges)
    prose = ("Answers of several versions to the same prompts appear here after the first evaluation.",)
    return Section(anchor=anchor, title=title, prose=prose)


def _binned(tokens: Sequence[int], longest: int) -> tuple[int, ...]:
    bins = min(_NUM_BINS, longest + 1)
    counts = [0] * bins
    for length in tokens:
        counts[length * bins // (longest + 1)] += 1
    return tuple(counts)


def _lengths_row(entry: Lengths) -> tuple[str | Cell, ...]:
    ordered = sorted(entry.tokens)

    def at(share: float) -> str:
        return str(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

    middle = number(median(ordered), 0)
    cut_off = percent(entry.truncated / len(ordered), 1)
    return (entry.version, f"{len(ordered):,}", at(0.1), middle, at(0.9), str(ordered[-1]), cut_off)


def _evaluated(record: Record) -> tuple[Exchange, ...]:
    """Put the answers of the ladder's tasks side by side, by prompt."""
    by_prompt: defaultdict[str, list[Task]] = defaultdict(list)
    for task in record.tasks:
        if task.purpose == "evaluation":
            by_prompt[task.prompt_id].append(task)
    labels = {entry.task.task_id: entry.labels for entry in record.labeled}
    num_policies = {
        prompt_id: len({c.policy for task in tasks for c in task.candidates}) for prompt_id, tasks in by_prompt.items()
    }
    most = max(num_policies.values(), default=0)
    rich = sorted(prompt_id for prompt_id, count in num_policies.items() if count == most)
    return tuple(_exchange(by_prompt[prompt_id], labels) for prompt_id in spread(rich, _NUM_PROMPTS))


def _exchange(tasks: Sequence[Task], labels: Mapping[str, Sequence[Label]]) -> Exchange:
    texts = {candidate.policy: candidate.text for task in tasks for candidate in task.candidates}
    chosen = spread(sorted(texts), _SIDE_BY_SIDE)
    return Exchange(
        prompt=turns(tasks[0].prompt, _MAX_CHARS),
        responses=tuple(
            Response(
                policy=clipped(policy, 80),
                text=clipped(texts[policy], _MAX_CHARS),
                verdict=_verdict(policy, tasks, labels),
            )
            for policy in chosen
        ),
    )


def _verdict(policy: str, tasks: Sequence[Task], labels: Mapping[str, Sequence[Label]]) -> str:
    """Say how a policy's answer fared against each other one."""
    said: defaultdict[str, list[str]] = defaultdict(list)
    for task in tasks:
        for other in {candidate.policy for candidate in task.candidates} - {policy}:
            for label in labels.get(task.task_id, ()):
                own = {candidate.candidate_id for candidate in task.candidates if candidate.policy == policy}
                match label.outcome.verdict:
                    case "tie" | "both_bad":
                        said[other].append("tied with")
                    case "preference" if own and label.outcome.winner is not None:
                        said[other].append("beat" if label.outcome.winner in own else "lost to")
                    case _:
                        continue
    return ", ".join(_against(other, said[other]) for other in sorted(said))


def _against(other: str, said: Sequence[str]) -> str:
    if len(set(said)) == 1:
        return f"{said[0]} {other}"
    counts = [f"{said.count(words)} {short}" for words, short in _SHORT.items() if words in said]
    return f"{' and '.join(counts)} against {other}"


_SHORT = {"beat": "won", "tied with": "tied", "lost to": "lost"}


def _while_training(record: Record) -> tuple[Exchange, ...]:
    chosen = spread(record.samples, 2)
    return tuple(
        _sampled(sample, version=line.get("policy_version", 0))
        for line in chosen
        for sample in line.get("samples", [])[:3]
    )


def _sampled(sample: Mapping[str, Any], *, version: int) -> Exchange:
    figures = f"score {number(sample.get('score'))}, KL {number(sample.get('kl_nats'))}"
    # An iteration publishes the version after the one that sampled.
    text = clipped(str(sample.get("response", "")), _MAX_CHARS)
    response = Response(policy=f"v{max(0, version - 1):03d}", text=text, verdict=figures)
    return Exchange(prompt=turns(str(sample.get("prompt", "")), _MAX_CHARS), responses=(response,))
