"""What a run has left in its directory, read for its report: as much as is there, and what could not be read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cluster import lineage
from cluster.lineage import Artefact
from cluster.run_directory import RunDirectory
from cluster.schedule import RunState
from configs.run import RunConfig
from protocol import metrics as names
from reward_service.ladder_records import Drift, Ladder
from reward_service.preferences.records import LabeledTask, Task
from reward_service.preferences.store import PreferenceStore

_MODEL_REPORT = "reward_model_report.json"
_MAX_POINTS = 300
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One iteration, or the mean of several neighbours in a very long run."""

    place: float
    """Counted over all rounds, from 1."""
    round: int
    iteration: int
    """The last one in it, in its round, from 1."""
    num_iterations: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFiles:
    """What one round has left."""

    number: int
    report: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    refresh: Mapping[str, Any] | None
    calibrations: Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A version's responses to the held-out prompts, by their lengths."""

    version: str
    tokens: tuple[int, ...]
    truncated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The ladder with what the run concluded from it."""

    ladder: Ladder
    best: str
    judge: str
    drift: tuple[Drift, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run."""

    directory: RunDirectory
    config: RunConfig
    state: RunState | None
    finished: bool
    moments: tuple[Moment, ...]
    seconds: float
    """Of all iterations together."""
    num_iterations: int
    rounds: tuple[RoundFiles, ...]
    evaluation: Mapping[str, Any] | None
    standing: Standing | None
    reward_models: Mapping[str, Mapping[str, Any]]
    """Directory name (`v000`, `v000_heldout`) -> its report."""
    lengths: tuple[Lengths, ...]
    samples: tuple[Mapping[str, Any], ...]
    """Lines of samples.jsonl."""
    artefacts: tuple[Artefact, ...]
    incidents: Mapping[str, Any]
    """File name -> its record; None for what is no JSON."""
    tasks: tuple[Task, ...]
    labeled: tuple[LabeledTask, ...]
    unreadable: tuple[str, ...] = field(default=())

    def series(self, name: str) -> list[Moment]:
        """Return the moments at which a metric is there and finite."""
        return [moment for moment in self.moments if math.isfinite(moment.metrics.get(name, math.nan))]


def read_record(directory: RunDirectory, config: RunConfig, store: PreferenceStore | None) -> Record:
    """Read a run, finished or not."""
    reader = _Reader(directory.root)
    lines = [line for line in reader.lines(directory.metrics) if names.COUNTER_ROUND in line]
    state = reader.parsed(directory.state, RunState.from_json)
    finished = directory.finished.exists()
    return Record(
        directory=directory,
        config=config,
        state=reader.parsed(directory.finished, RunState.from_json) if finished else state,
        finished=finished,
        moments=_moments(lines),
        seconds=sum(line.get(names.TIME_ITERATION, 0.0) for line in lines),
        num_iterations=len(lines),
        rounds=tuple(_round(reader, directory, number) for number in range(1, config.rounds.count + 1)),
        evaluation=reader.json(directory.evaluation),
        standing=reader.parsed(directory.ladder, _standing),
        reward_models=_reward_models(reader, directory),
        lengths=_lengths(reader, directory),
        samples=tuple(reader.lines(directory.samples)),
        artefacts=tuple(reader.parsed(directory.lineage, lineage.parsed) or ()),
        incidents=_incidents(reader, directory.incidents),
        tasks=() if store is None else tuple(store.tasks()),
        labeled=() if store is None else tuple(store.labeled()),
        unreadable=tuple(reader.problems),
    )


class _Reader:
    """Reads files that may be missing, and remembers those that cannot be understood."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.problems: list[str] = []

    def guarded(self, path: Path, read: Callable[[], _Result]) -> _Result | None:
        """Read a file; one that is missing or cannot be understood is None, and the latter is said in the report."""
        if not path.exists():
            return None
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            name = path.relative_to(self._root)
            self.problems.append(f"{name} cannot be read ({type(error).__name__}: {error})")
            return None

    def json(self, path: Path) -> Any:
        """Read a JSON file."""
        return self.guarded(path, lambda: json.loads(path.read_text(encoding="utf-8")))

    def parsed(self, path: Path, parse: Callable[[Any], _Result]) -> _Result | None:
        """Read a JSON file into a record."""
        return self.guarded(path, lambda: parse(json.loads(path.read_text(encoding="utf-8"))))

    def lines(self, path: Path) -> list[dict[str, Any]]:
        """Read JSON lines; a last one without an end is still being written."""
        text = self.guarded(path, lambda: path.read_text(encoding="utf-8")) or ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return self.guarded(path, lambda: [json.loads(line) for line in whole]) or []


def _moments(lines: Sequence[Mapping[str, float]]) -> tuple[Moment, ...]:
    """Number the iterations over all rounds; neighbours of a round become one where there are too many to draw."""
    numbers = sorted({int(line[names.COUNTER_ROUND]) for line in lines})
    size = max(1, math.ceil(len(lines) / _MAX_POINTS))
    moments: list[Moment] = []
    place = 0
    for number in numbers:
        own = [line for line in lines if int(line[names.COUNTER_ROUND]) == number]
        for start in range(0, len(own), size):
            group = own[start : start + size]
            moments.append(_moment(group, number, place=place + start + (len(group) + 1) / 2))
        place += len(own)
    return tuple(moments)


def _moment(group: Sequence[Mapping[str, float]], number: int, *, place: float) -> Moment:
    keys = {key for line in group for key, value in line.items() if isinstance(value, int | float)}
    means = {key: math.fsum(line.get(key, math.nan) for line in group) / len(group) for key in keys}
    last = int(group[-1][names.COUNTER_ITERATION]) + 1
    return Moment(place=place, round=number, iteration=last, num_iterations=len(group), metrics=means)


def _round(reader: _Reader, directory: RunDirectory, number: int) -> RoundFiles:
    return RoundFiles(
        number=number,
        report=reader.json(directory.round_report(number)),
        evaluation=reader.json(directory.round(number) / "evaluation.json"),
        refresh=reader.json(directory.refreshed(number)),
        calibrations=reader.json(directory.calibrations(number)),
    )


def _standing(values: Mapping[str, Any]) -> Standing:
    own = {"best", "judge", "drift"}
    return Standing(
        ladder=Ladder.from_json({name: value for name, value in values.items() if name not in own}),
        best=str(values["best"]),
        judge=str(values["judge"]),
        drift=tuple(Drift(**{**drift, "ci": tuple(drift["ci"])}) for drift in values["drift"]),
    )


def _reward_models(reader: _Reader, directory: RunDirectory) -> dict[str, Mapping[str, Any]]:
    paths = sorted(directory.reward_model(0).parent.glob(f"v*/{_MODEL_REPORT}"))
    found = {path.parent.name: reader.json(path) for path in paths}
    return {name: report for name, report in found.items() if isinstance(report, dict) and "heldout" in report}


def _lengths(reader: _Reader, directory: RunDirectory) -> tuple[Lengths, ...]:
    found: list[Lengths] = []
    for path in sorted(directory.evaluation_of(0).parent.glob("v[0-9]*.jsonl")):
        rows = [row for row in reader.lines(path) if "response_ids" in row]
        if rows:
            tokens = tuple(len(row["response_ids"]) for row in rows)
            truncated = sum(row.get("finish_reason") == "length" for row in rows)
            found.append(Lengths(version=path.stem, tokens=tokens, truncated=truncated))
    return tuple(found)


def _incidents(reader: _Reader, root: Path) -> dict[str, Any]:
    """Read the incidents, oldest first; data files that lie beside a record of the same name belong to it."""
    paths = sorted(root.glob("*"), key=lambda path: (path.stat().st_mtime, path.name)) if root.is_dir() else []
    told = {path.stem for path in paths if path.suffix == ".json"}
    return {
        path.name: reader.json(path) if path.suffix == ".json" else None
        for path in paths
        if path.is_file() and (path.suffix == ".json" or path.stem not in told)
    }
