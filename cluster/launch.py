"""The composition root: builds every part of a run from its configuration and plays the rounds."""

import json
import logging
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from cluster import placement, preflight, run_directory
from cluster.builder import Builder
from cluster.collection import Collection
from cluster.crew import Crew
from cluster.evaluation import Evaluation
from cluster.faults import Fault, Injector
from cluster.incident_log import IncidentLog
from cluster.judging import labeler_of
from cluster.progress import Progress
from cluster.prompt_source import Prompts
from cluster.ranking import Ranking
from cluster.refresh import Refresh
from cluster.report import write_report
from cluster.rounds import play
from cluster.run_directory import RunDirectory, store_url
from cluster.schedule import RunState
from cluster.stages import Parts, RunStages
from cluster.stopping import SIGNALS, STOPPING, Stopped
from cluster.supervision import first_line
from cluster.tracking import (
    LinesFile,
    Sinks,
    TensorBoard,
    Terminal,
    evaluation_table,
    ladder_table,
    metrics_lines,
    samples_lines,
)
from configs.run import RunConfig
from protocol import tokens
from protocol.errors import StorageError, UserError
from protocol.files import write_json, writing
from reward_service.preferences.store import PreferenceStore

_LOG = logging.getLogger(__name__)


def train(
    config: RunConfig,
    console: Console,
    *,
    verbose: bool = False,
    faults: Sequence[Fault] = (),
    trust_checkpoint: bool = False,
) -> RunDirectory:
    """Run a configuration to its end, from wherever its run directory stands.

    Args:
        config: The validated configuration.
        console: Where progress goes.
        verbose: Whether the workers' own logs are shown too.
        faults: What shall go wrong, for tests of what becomes of it.
        trust_checkpoint: Whether it may go on from a checkpoint that is not known to be its own.

    Returns:
        The run's directory.

    Raises:
        UserError: If something about the configuration, the data or the cluster is wrong.
        StorageError: If a disk is full, read-only or broken; the same command goes on when it is in order.
        RuntimeError: If the run failed; what it has committed can be resumed.
    """
    directory = run_directory.claim(config)
    lock = run_directory.lock(directory)
    try:
        if directory.finished.exists():
            console.print(f"{directory.root} is finished; nothing to do")
        else:
            with writing(directory.root):
                _run(config, directory, console, verbose=verbose, faults=faults, trust_checkpoint=trust_checkpoint)
        show_result(directory, console)
        return directory
    except UserError:
        # A mistake leaves nothing behind that would stand in the way of the corrected run.
        run_directory.discard_untouched(directory)
        raise
    finally:
        os.close(lock)


def _run(
    config: RunConfig,
    directory: RunDirectory,
    console: Console,
    *,
    verbose: bool,
    faults: Sequence[Fault],
    trust_checkpoint: bool,
) -> None:
    progress = Progress(console, collects=lambda number: config.rounds.of(number).collect.comparisons > 0)
    if not directory.policy(0).exists():
        preflight.check(config)
    progress.say("starting Ray")
    connect(config, verbose=verbose)
    try:
        placement.check(placement.plan(config), placement.available_resources())
        with closing(PreferenceStore.open(store_url(config, directory))) as store:
            store.claim(run_directory.run_id(directory))
            stages = make_stages(config, directory, store, console, progress, trust_checkpoint=trust_checkpoint)
            injector = Injector(faults, crew=stages.crew, state=lambda: stages.incidents.state, say=progress.say)
            STOPPING.grace_s, STOPPING.waits = config.cluster.deadlines.grace_s, stages.in_hand
            try:
                with keeping_what_stands(stages.save):
                    injector.start()
                    state = play(stages, config, stages.resume(), announce=progress.announce)
                    _finish(directory, state)
                    write_report(directory, config, store)
            finally:
                injector.stop()
                stages.close()
    finally:
        ray.shutdown()


@contextmanager
def keeping_what_stands(save: Callable[[], None]) -> Generator[None]:
    """Commit the last iteration of a run that ends early, whatever ends it; what prevents that never hides the cause.

    Args:
        save: Commits what stands, if the learner is exactly there.

    Raises:
        Stopped: If the run was asked to stop. A signal's exception may come out of a library's C code as another one.
        BaseException: Otherwise what ended it.
    """
    try:
        yield
    except StorageError:  # nor does the disk take this
        raise
    except BaseException as error:
        try:
            save()
        except Exception as failure:  # noqa: BLE001 - what ended the run is what must be told
            _LOG.warning("the last iteration could not be committed: %s", first_line(failure))
        if STOPPING.asked and not isinstance(error, Stopped):
            raise Stopped from error
        raise


def make_stages(
    config: RunConfig,
    directory: RunDirectory,
    store: PreferenceStore,
    console: Console,
    progress: Progress,
    *,
    trust_checkpoint: bool = False,
) -> RunStages:
    """Put a run together.

    Args:
        config: The run's configuration.
        directory: Of the run.
        store: Where tasks and labels are kept.
        console: Where progress goes.
        progress: Likewise.
        trust_checkpoint: As `train` has it.

    Returns:
        The stages; no worker is started before one is needed.
    """
    incidents = IncidentLog(directory.incidents, say=progress.say)
    crew = Crew(Builder(config, directory, report=incidents), directory)
    prompts = Prompts(config, directory)
    collection = Collection(
        config,
        directory,
        crew=crew,
        store=store,
        make_labeler=lambda labeler: labeler_of(config, crew, labeler),
        say=progress.say,
    )

    def make_ranking(evaluated: Callable[[int], Evaluation]) -> Ranking:
        return Ranking(
            config,
            directory,
            store=store,
            collection=collection,
            evaluated=evaluated,
            decode=lambda token_ids: tokens.decode(prompts.tokenizer(), list(token_ids)),
            say=progress.say,
        )

    parts = Parts(
        crew=crew,
        collection=collection,
        refresh=Refresh(config, directory, crew=crew, collection=collection, progress=progress, say=progress.say),
        prompts=prompts,
        make_ranking=make_ranking,
    )
    return RunStages(
        config,
        directory,
        parts,
        open_sinks=lambda done: _sinks(config, directory, console, done=done),
        progress=progress,
        incidents=incidents,
        trust_checkpoint=trust_checkpoint,
    )


def connect(config: RunConfig, *, verbose: bool) -> None:
    """Join the configured cluster, the one this process runs in, or a new one on this machine alone."""
    level = logging.WARNING if verbose else logging.ERROR
    quiet: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    if address:
        ray.init(address=address, **quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's log monitor holds two files open for each worker that has died, until it holds so many (by default 200).
        os.environ.setdefault("RAY_LOG_MONITOR_MAX_OPEN_FILES", "40")
        # "local" starts one; without it Ray would join whatever cluster it finds traces of on this machine.
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    # Ray puts handlers of its own in place that end the process; the run would leave workers and files behind.
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _sinks(config: RunConfig, directory: RunDirectory, console: Console, *, done: int) -> Sinks:
    sinks: list[Any] = [
        LinesFile(directory.metrics, keep=done, lines=metrics_lines),
        LinesFile(directory.samples, keep=done, lines=samples_lines),
        Terminal(
            console,
            num_iterations={r: config.rounds.of(r).iterations for r in range(1, config.rounds.count + 1)},
            samples_period=config.tracking.samples_shown_period,
        ),
    ]
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(directory.tensorboard))
    return Sinks(sinks)


def _finish(directory: RunDirectory, state: RunState) -> None:
    write_json(directory.finished, state.to_json())


def show_result(directory: RunDirectory, console: Console) -> None:
    """Print the evaluation and where everything lies."""
    if directory.evaluation.exists():
        console.print(evaluation_table(json.loads(directory.evaluation.read_text())))
    if directory.ladder.exists():
        console.print(ladder_table(json.loads(directory.ladder.read_text())))
    for label, path in (
        ("policies", directory.root / "policies"),
        ("reward models", directory.root / "reward_models"),
        ("metrics", directory.metrics),
        ("report", directory.report),
    ):
        if path.exists():
            console.print(f"{label}: {_short(path)}", highlight=False, markup=False)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
