"""Refreshing the reward model: a new one on all comparisons so far, a held-out one, and the gate from old to new."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import lineage
from cluster.collection import Collection
from cluster.crew import Crew
from cluster.learner_group import Progress
from cluster.lineage import Artefact
from cluster.run_directory import RunDirectory
from cluster.schedule import RunState
from configs.data import SourceConfig
from configs.load import config_hash
from configs.run import RunConfig
from learner.comparisons import BASE, ComparisonSource, Half, RewardModelJob
from protocol.files import write_json

_LOG = logging.getLogger(__name__)
REPORT = "reward_model_report.json"


class Refresh:
    """The reward models of a run.

    Args:
        config: The run's configuration.
        directory: Of the run.
        crew: Who trains.
        collection: Knows the rounds' comparisons.
        progress: Shows the figures of a running stage.
        say: Takes lines for people.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        crew: Crew,
        collection: Collection,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._crew = crew
        self._collection = collection
        self._progress = progress
        self._say = say

    def refresh(self, state: RunState) -> int | None:
        """Train this round's reward models, and decide which one scores.

        Args:
            state: Where the run stands.

        Returns:
            The version of the reward model that scores in this round; None if the run trains none.
        """
        if not self._config.trains_reward_model:
            return None
        path = self._directory.refreshed(state.round)
        if path.exists():
            return int(json.loads(path.read_text())["reward_version"])
        sources = self._sources(state)
        newest = self._collection.comparisons(state.round)
        if state.reward_version is not None and (newest is None or not self._config.rounds.refresh):
            return self._decide(path, state.reward_version, "nothing new to learn from")
        self._crew.finish_rl()
        version = state.round - 1
        main = self._trained(state, sources, half="train" if self._has_heldout else "all", version=version)
        if self._has_heldout:
            self._trained(state, sources, half="heldout", version=version)
        return self._decide(path, *self._gate(state, main, version=version))

    def heldout(self, version: int) -> Path | None:
        """Return the held-out reward model that belongs to one that scores."""
        return self._directory.heldout_reward_model(version) if self._has_heldout else None

    @property
    def _has_heldout(self) -> bool:
        return self._config.rounds.heldout_share > 0

    def _sources(self, state: RunState) -> tuple[ComparisonSource, ...]:
        """List what there is to learn from, newest last."""
        mixture = self._config.rounds.of(state.round).mixture
        sources: list[ComparisonSource] = []
        if self._config.data.preferences is not None:
            sources.append(ComparisonSource(name=BASE, data=self._config.data.preferences, weight=mixture.base))
        for number in range(1, state.round + 1):
            path = self._collection.comparisons(number)
            if path is not None:
                weight = mixture.newest if number == state.round else mixture.earlier
                data = SourceConfig(source=str(path))
                sources.append(ComparisonSource(name=f"round {number}", data=data, weight=weight))
        return tuple(sources)

    def _trained(
        self, state: RunState, sources: tuple[ComparisonSource, ...], *, half: Half, version: int
    ) -> dict[str, Any]:
        """Train a reward model, or keep the one that is there; return its report."""
        config, directory = self._config, self._directory
        path = directory.heldout_reward_model if half == "heldout" else directory.reward_model
        warm = config.rounds.of(state.round).reward_start == "warm" and state.reward_version is not None
        start = path(state.reward_version) if warm and state.reward_version is not None else None
        output = path(version)
        if output.exists():
            _LOG.info("keeping the reward model in %s", output)
        else:
            judged_beside = half != "heldout" and config.rounds.gate.enabled and state.reward_version is not None
            job = RewardModelJob(
                policy=directory.policy(0),
                output=output,
                sources=sources,
                round=state.round,
                start=start,
                half=half,
                heldout_share=config.rounds.heldout_share,
                incumbent=directory.reward_model(state.reward_version)
                if judged_beside and state.reward_version is not None
                else None,
            )
            self._crew.learner.train_reward_model(job, progress=self._progress)
        report: dict[str, Any] = json.loads((output / REPORT).read_text())
        self._note(state, output, sources, start=start, report=report)
        return report

    def _gate(self, state: RunState, report: dict[str, Any], *, version: int) -> tuple[int, str]:
        """Let the new model score only where it is better on held-out pairs; say so either way."""
        gate = report.get("gate")
        if state.reward_version is None or gate is None:
            return version, "the first reward model" if state.reward_version is None else "the gate is off"
        figures = _spell(gate)
        if gate["passed"]:
            return version, figures
        _LOG.warning("round %d: the new reward model is NOT used, the old one stays: %s", state.round, figures)
        return state.reward_version, f"the old reward model stays: {figures}"

    def _decide(self, path: Path, version: int, why: str) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"reward_version": version, "why": why})
        self._say(f"reward model v{version:03d} scores: {why}")
        return version

    def _note(
        self,
        state: RunState,
        output: Path,
        sources: tuple[ComparisonSource, ...],
        *,
        start: Path | None,
        report: dict[str, Any],
    ) -> None:
        root = self._directory.root
        begun = self._directory.policy(0) if start is None else start
        own = [Path(source.data.source) for source in sources if source.name != BASE]
        data = {
            "sources": report["sources"],
            "trained_on": report["trained_on"],
            "held-out accuracy": report["heldout"]["accuracy"],
        }
        lineage.note(
            self._directory.lineage,
            Artefact(
                name=str(output.relative_to(root)),
                kind="reward_model",
                round=state.round,
                config=config_hash(self._config),
                parents=(str(begun.relative_to(root)), *(str(path.relative_to(root)) for path in own)),
                data=data,
            ),
        )


def _spell(gate: dict[str, Any]) -> str:
    """Put the gate's findings into a line."""
    if "why" in gate:  # it could not tell
        return gate["why"]
    return (
        f"gain in {gate['metric']} over {gate['incumbent']} on {gate['num_pairs']} held-out pairs: "
        f"{gate['gain']:+.4f} [{gate['ci_low']:+.4f}, {gate['ci_high']:+.4f}]; accuracy "
        f"{gate['old']['accuracy']:.3f} -> {gate['new']['accuracy']:.3f}"
    )
