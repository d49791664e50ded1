"""Metric sinks: metrics.jsonl (the source of truth), TensorBoard, and the terminal or plain lines of a job."""

import io
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.scoring import HELDOUT
from protocol import metrics as names
from protocol.errors import UserError
from protocol.files import RecordFile, keep_lines, writing
from protocol.messages import IterationReport, SampleText

_LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """A consumer of iteration reports."""

    def write(self, report: IterationReport) -> None:
        """Record one iteration."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class LinesFile:
    """A file of one JSON object an iteration, on disk before the next iteration begins."""

    def __init__(self, path: Path, *, keep: int, lines: Callable[[IterationReport], Mapping[str, Any]]) -> None:
        """Open the file; what is beyond the first `keep` lines belongs to iterations that a resume repeats."""
        self._lines = lines
        cut = keep_lines(path, keep)
        if cut:
            _LOG.warning("%s: %d lines after the checkpoint are taken off", path, cut)
        self._file = RecordFile(path)

    def write(self, report: IterationReport) -> None:
        """Append one line and see it to the disk, or leave the file as it is."""
        self._file.append(f"{json.dumps(self._lines(report))}\n".encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read what a LinesFile wrote; a last line that a full disk or a power cut left half is none.

    Args:
        path: The file; need not exist.

    Raises:
        UserError: If another line is damaged.
    """
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"broken JSON ({error})", where=f"{path}, line {number}", next_step="restore the file from a copy"
            ) from None
    return found


def round_lines(path: Path, *, round: int, iterations: int) -> list[dict[str, Any]]:
    """Read the metrics of a round's first iterations: those that a resume does not repeat."""
    return [
        metrics
        for metrics in read_lines(path)
        if metrics[names.COUNTER_ROUND] == round and metrics[names.COUNTER_ITERATION] < iterations
    ]


def standing_iterations(path: Path, *, round: int, iteration: int) -> int:
    """Count the lines of metrics.jsonl that stand where a run goes on at this iteration of this round."""
    places = [(metrics[names.COUNTER_ROUND], metrics[names.COUNTER_ITERATION]) for metrics in read_lines(path)]
    return sum(place < (round, iteration) for place in places)


def metrics_lines(report: IterationReport) -> dict[str, float]:
    """Lay out an iteration for metrics.jsonl: flat, in the order of names."""
    return {name: report.metrics[name] for name in sorted(report.metrics)}


def samples_lines(report: IterationReport) -> dict[str, Any]:
    """Lay out an iteration's decoded responses for samples.jsonl."""
    samples = [{**asdict(sample), "key": str(sample.key)} for sample in report.samples]
    return {"policy_version": report.policy_version, "samples": samples}


class TensorBoard:
    """TensorBoard scalars. Its own writer would write from a thread, where nobody hears that the disk is full."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._summary = Summary
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        name = (
            f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        )
        self._file = RecordFile(directory / name)
        self._append(file_version="brain.Event:2")

    def write(self, report: IterationReport) -> None:
        """Write every metric as a scalar."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in report.metrics.items()]
        self._append(step=report.policy_version, summary=self._summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(framed.getvalue())


class Terminal:
    """One line an iteration, with a few decoded samples under it."""

    def __init__(self, console: Console, *, num_iterations: Mapping[int, int], samples_period: int) -> None:
        """Begin to print.

        Args:
            console: Where to.
            num_iterations: Round -> its iterations.
            samples_period: Samples are printed every so many iterations.
        """
        self._console = console
        self._num_iterations = num_iterations
        self._period = samples_period

    def write(self, report: IterationReport) -> None:
        """Print one iteration."""
        num_iterations = self._num_iterations[report.round]
        self._console.print(Text(line(report, num_iterations=num_iterations)))
        done = report.iteration + 1
        if done % self._period == 0 or done in (1, num_iterations):
            for sample in report.samples:
                self._console.print(sample_text(sample))

    def close(self) -> None:
        """Have nothing to finish."""


_HELDOUT = names.SCORE_PREFIX + HELDOUT


def line(report: IterationReport, *, num_iterations: int) -> str:
    """Put an iteration into one line."""
    m = report.metrics
    gold = m.get(names.GOLD_PREFIX + "gold")
    parts = [
        f"iteration {report.iteration + 1:>{len(str(num_iterations))}}/{num_iterations}",
        f"score {m[names.OBJECTIVE_SCORE]:+.3f}",
        *([f"held-out {m[_HELDOUT]:+.3f}"] if _HELDOUT in m else []),
        *([] if gold is None else [f"gold {gold:+.3f}"]),
        f"KL {m[names.OBJECTIVE_KL]:.2f}",
        f"tokens {m[names.ROLLOUT_TOKENS_MEAN]:.1f}",
        f"{m[names.TIME_ITERATION]:.2f} s",
        f"(generate {m[names.TIME_GENERATE]:.2f}, score {m[names.TIME_SCORE]:.2f}, learn {m[names.TIME_LEARN]:.2f}, "
        f"publish {m[names.TIME_PUBLISH]:.3f})",
    ]
    return "  ".join(parts)


def sample_text(sample: SampleText) -> Text:
    """Lay out one decoded response. It is text from a model: shown as it is, never read as markup."""
    numbers = f"score {sample.score:+.2f}  KL {sample.kl_nats:.2f}  reward {sample.reward:+.2f}"
    return Text.assemble(
        ("    > ", "dim"),
        (_visible(sample.prompt), "cyan"),
        ("\n      ", ""),
        _visible(sample.response),
        (f"\n      {numbers}", "dim"),
    )


def _visible(text: str) -> str:
    """Keep a model's text on one line and free of control characters."""
    return "".join(ch if ch.isprintable() else " " for ch in text).strip()


def evaluation_table(result: Mapping[str, Any]) -> Table:
    """Lay out evaluation.json: gold, score, KL, length and win rate, before and after."""
    table = Table(title=f"Before and after, on {result['num_prompts']} held-out prompts")
    for header, justify in (("", "left"), ("SFT", "right"), ("after RL", "right"), ("change", "right")):
        table.add_column(header, justify=justify)  # pyright: ignore[reportArgumentType]
    before, after = result["before"], result["after"]
    rows = [(key.removesuffix("_mean").replace("_", " "), key) for key in before if key not in _NOT_ROWS]
    for label, key in rows:
        table.add_row(
            _LABELS.get(key, label), f"{before[key]:.3f}", f"{after[key]:.3f}", f"{after[key] - before[key]:+.3f}"
        )
    low, high = after["win_rate_ci95"]
    table.add_row("win rate against SFT", "0.500", f"{after['win_rate']:.3f}", f"95% [{low:.3f}, {high:.3f}]")
    return table


_NOT_ROWS = ("policy_version", "win_rate", "win_rate_ci95", "kl_k1_sem")
_LABELS = {
    "kl_k1_per_sequence": "KL to SFT (nats a sequence)",
    "response_tokens_mean": "response length (tokens)",
    "score_mean": "score (reward model, in SFT standard deviations)",
    "gold_mean": "gold score",
}


def ladder_table(result: Mapping[str, Any]) -> Table:
    """Lay out ladder.json: every version's rating with its interval, best first."""
    table = Table(title=f"Ladder: Elo over {result['anchor']} (SFT), 95% intervals, judged by {result['judge']}")
    for header in ("version", "Elo", "interval", "comparisons"):
        table.add_column(header, justify="left" if header == "version" else "right")
    for rating in result["ratings"]:
        low, high = rating["ci"]
        star = " *" if rating["version"] == result["best"] else ""
        table.add_row(
            rating["version"] + star,
            f"{rating['elo']:+.0f}",
            "anchor" if rating["version"] == result["anchor"] else f"[{low:+.0f}, {high:+.0f}]",
            str(rating["num_comparisons"]),
        )
    table.caption = "* the best so far"
    return table


def wins_table(result: Mapping[str, Any]) -> Table:
    """Lay out how often each version won against each other."""
    table = Table(title="Who won how often (a tie counts half)")
    for header in ("version", "over", "win rate", "interval", "wins", "ties", "losses"):
        table.add_column(header, justify="left" if header in ("version", "over") else "right")
    for pair in result["pairs"]:
        if pair["num_comparisons"]:
            low, high = pair["win_rate_ci"]
            counts = (str(pair[name]) for name in ("wins", "ties", "losses"))
            table.add_row(pair["version"], pair["over"], f"{pair['win_rate']:.3f}", f"[{low:.3f}, {high:.3f}]", *counts)
    return table


class Sinks:
    """All sinks of a run, closed together."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks: Sequence[Sink] = tuple(sinks)

    def write(self, report: IterationReport) -> None:
        """Record one iteration everywhere."""
        for sink in self._sinks:
            sink.write(report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for sink in self._sinks:
            sink.close()
