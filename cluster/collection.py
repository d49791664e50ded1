"""Putting responses before labelers: what is compared, who judges it, and what a reward model learns from it."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import lineage, schedule
from cluster.attention import attention_checks
from cluster.crew import Crew
from cluster.lineage import Artefact
from cluster.prompts import PromptStream
from cluster.run_directory import RunDirectory
from cluster.schedule import COLLECTION, RunState
from cluster.waiting import wait_for_people
from configs.labels import AutomaticLabelerConfig, JudgeConfig, LabelerConfig, PeopleConfig
from configs.load import config_hash
from configs.run import RunConfig
from protocol.errors import UserError
from protocol.files import write_text
from protocol.messages import Prompt, Rollout
from protocol.tokens import decode
from reward_service.ladder import Ladder
from reward_service.preferences.exchange import training_rows
from reward_service.preferences.labeling_protocol import Labeler, label_chunks
from reward_service.preferences.outbound import num_pairs
from reward_service.preferences.records import Candidate, LabeledTask, Purpose, Task
from reward_service.preferences.selection import form_tasks
from reward_service.preferences.store import PreferenceStore

_LOG = logging.getLogger(__name__)
_CHUNK = 256
_LARGE_CHUNK = 4096
_SPARE = 1.15
"""More prompts are sampled than tasks are wanted, because some responses turn out to be the same."""

MakeLabeler = Callable[[AutomaticLabelerConfig], Labeler]


class Collection:
    """The tasks and labels of a run.

    Args:
        config: The run's configuration.
        directory: Of the run.
        crew: Who samples.
        store: Where tasks and labels are kept.
        make_labeler: Makes a labeler that is not a person.
        say: Takes lines for people.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        crew: Crew,
        store: PreferenceStore,
        make_labeler: MakeLabeler,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._crew = crew
        self._store = store
        self._make_labeler = make_labeler
        self._say = say

    def collect(self, state: RunState, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        """Sample responses and make this round's tasks of them, all in one transaction; or keep those that are there.

        Args:
            state: Where the run stands.
            prompts: The training prompts.
            tokenizer: Decodes the responses.
        """
        plan = self._config.rounds.of(state.round).collect
        if plan.comparisons == 0 or any(map(_is_collected, self._store.tasks(round=state.round, purpose="training"))):
            return
        wanted = min(len(prompts), round(plan.comparisons * _SPARE) + 1)
        chosen = PromptStream(prompts, seed=self._config.run.seed + 1_000_003 * state.round).take(wanted)
        candidates = self._candidates(chosen, state, tokenizer)
        tasks, report = form_tasks(
            candidates,
            prompts={prompt.prompt_id: prompt.source for prompt in chosen},
            num_tasks=plan.comparisons,
            responses_per_task=plan.responses_per_task,
            round=state.round,
            purpose="training",
            seed=self._config.run.seed,
            pair_variance=self._pair_variance(),
        )
        if not tasks:
            raise UserError(
                f"round {state.round}: no task could be formed of {sum(map(len, candidates.values()))} responses",
                where="rounds.collect",
                cause=str(report),
                next_step="raise rounds.collect.samples_per_prompt or the temperatures",
            )
        self._say(f"round {state.round}: {len(tasks)} tasks for labelers ({report})")
        metadata = {prompt.prompt_id: dict(prompt.metadata) for prompt in chosen}
        owned = [replace(task, metadata=metadata[task.prompt_id]) for task in tasks]
        labeler = self._config.rounds.of(state.round).labeler
        if isinstance(labeler, PeopleConfig):
            owned = [replace(task, overlap=labeler.overlap) for task in owned]
            owned += attention_checks(labeler, round=state.round, seed=self._config.run.seed)
        self._store.add_tasks(owned)

    def label(self, labeler: LabelerConfig | None, *, round: int, purpose: Purpose) -> None:
        """Have all tasks of a round labelled, by whoever the configuration names."""
        tasks = self._store.tasks(round=round, purpose=purpose)
        if not tasks or labeler is None:
            return
        if isinstance(labeler, PeopleConfig):
            self._wait(labeler, round=round, purpose=purpose)
            return
        labels = self._store.labels(round=round, purpose=purpose)
        judged = {label.task_id for label in labels if label.outcome.verdict != "invalid"}
        left = [task for task in tasks if task.task_id not in judged]  # nobody is asked twice
        if not left:
            return
        # The run's own engines are started for each chunk.
        size = _LARGE_CHUNK if isinstance(labeler, JudgeConfig) and labeler.url is None else _CHUNK
        chunks = label_chunks(self._make_labeler(labeler), left, now=time.time, chunk_tasks=size, num_tasks=len(tasks))
        for chunk in chunks:
            self._store.record_all(chunk, now=time.time())

    def comparisons(self, round: int) -> Path | None:
        """Freeze a round's labelled comparisons in a file, once, for reward models to train on.

        Returns:
            The file, or None if the round collected nothing.
        """
        path = self._directory.comparisons(round)
        if not path.exists():
            labeled = self._store.labeled(round=round, purpose="training")
            if not labeled:
                return None
            rows = list(training_rows(labeled, source=f"round {round}"))
            if not rows:
                raise UserError(
                    f"round {round}: none of {len(labeled)} labelled tasks says which response is better",
                    where=str(self._directory.preferences),
                    next_step="`rondo label stats RUN` shows what was said",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            counts = {"tasks": len(rows), "pairs": sum(map(num_pairs, rows)), "sha256": lineage.sha256(text.encode())}
            self._note(path, labeled, counts, round=round)  # first: a file that is there is not noted again
            write_text(path, text)
        return path

    def _wait(self, people: PeopleConfig, *, round: int, purpose: Purpose) -> None:
        self._crew.release()
        what = f"round {round}, {purpose} comparisons"
        begun = self._directory.round(round) / f"waiting-{purpose}.json"
        begun.parent.mkdir(parents=True, exist_ok=True)
        wait_for_people(
            lambda: self._store.progress(round=round, purpose=purpose),
            people,
            takeable=lambda: self._store.num_takeable(round=round, purpose=purpose),
            what=what,
            begun=begun,
            say=self._say,
        )
        # What is said from now on would come too late; nobody should be asked for it.
        self._store.close_open(round=round, purpose=purpose)
        if purpose == "training":
            self._store.close_open(round=round, purpose="check")

    def _candidates(self, prompts: Sequence[Prompt], state: RunState, tokenizer: Any) -> dict[str, list[Candidate]]:
        """Have every collecting policy respond to the prompts; a prompt's samples are shared out among them."""
        plan = self._config.rounds.of(state.round).collect
        candidates: dict[str, list[Candidate]] = {prompt.prompt_id: [] for prompt in prompts}
        versions = list(dict.fromkeys(schedule.named_version(name, state) for name in plan.policies))
        for number, version in enumerate(versions):
            temperatures = _turned(plan.temperatures, number)
            samples = len(range(number, plan.samples_per_prompt, len(versions)))
            for rollout in self._sampled(prompts, state, number=number, version=version, samples=samples):
                if rollout.finish_reason == "stop":  # one that was cut off is charged for that elsewhere
                    candidate = _candidate(rollout, tokenizer, version=version, temperatures=temperatures)
                    candidates[rollout.key.prompt_id].append(candidate)
        return candidates

    def _sampled(
        self, prompts: Sequence[Prompt], state: RunState, *, number: int, version: int, samples: int
    ) -> list[Rollout]:
        """Sample with one policy. The keys say which of the collecting policies it is, so that no two are the same."""
        rollouts = self._crew.sampling(version)
        requests = schedule.requests(
            prompts,
            self._config,
            round=state.round,
            iteration=COLLECTION - number,
            samples=samples,
            temperatures=_turned(self._config.rounds.of(state.round).collect.temperatures, number),
        )
        finished = {f.meta.key: f for f in rollouts.generate(requests, policy_version=version)}
        return rollouts.fetch([finished[request.key] for request in requests])

    def _pair_variance(self) -> dict[frozenset[str], float] | None:
        """Read off the ladder how much is known of each pair of policies."""
        if not self._directory.ladder.exists():
            return None
        found = Ladder.from_json(json.loads(self._directory.ladder.read_text()))
        return {frozenset((pair.version, pair.over)): pair.lead.se_elo**2 for pair in found.pairs}

    def _note(self, path: Path, labeled: Sequence[LabeledTask], counts: Mapping[str, Any], *, round: int) -> None:
        policies = {candidate.policy for entry in labeled for candidate in entry.task.candidates}
        lineage.note(
            self._directory.lineage,
            Artefact(
                name=str(path.relative_to(self._directory.root)),
                kind="comparisons",
                round=round,
                config=config_hash(self._config),
                parents=tuple(f"policies/{policy}" for policy in sorted(policies)),
                data=counts,
            ),
        )


def _candidate(rollout: Rollout, tokenizer: Any, *, version: int, temperatures: Sequence[float]) -> Candidate:
    return Candidate(
        candidate_id=str(rollout.key),
        text=decode(tokenizer, rollout.response_ids.tolist()),
        policy=f"v{version:03d}",
        policy_version=version,
        sampling={"temperature": temperatures[rollout.key.sample % len(temperatures)]},
        finish_reason=rollout.finish_reason,
        token_ids=tuple(rollout.response_ids.tolist()),
    )


def _turned(temperatures: Sequence[float], number: int) -> Sequence[float]:
    """Begin another policy's responses with another temperature, so that each policy gets all of them."""
    start = number % len(temperatures)
    return [*temperatures[start:], *temperatures[:start]]


def _is_collected(task: Task) -> bool:
    """Whether a task was made of this run's responses, and not brought in from elsewhere."""
    return all(candidate.policy_version is not None for candidate in task.candidates)
