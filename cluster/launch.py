"""The composition root: builds every part of a run from its configuration and plays the rounds."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors import worker as rollout_worker
from cluster import placement, preflight, run_directory
from cluster.evaluation import write_json
from cluster.learner_group import LearnerGroup
from cluster.placement import Placement
from cluster.pool import Handle
from cluster.progress import Progress
from cluster.prompts import encode_prompts
from cluster.rollout_pool import RolloutPool
from cluster.rounds import play
from cluster.run_directory import RunDirectory
from cluster.schedule import RunState
from cluster.scoring_pool import ScoringPool
from cluster.stages import RunStages
from cluster.tracking import LinesFile, Sinks, TensorBoard, Terminal, evaluation_table, metrics_lines, samples_lines
from configs.data import SourceConfig
from configs.run import RunConfig
from learner import worker as learner_worker
from protocol import datasets, tokens
from protocol.errors import UserError
from protocol.messages import Prompt
from reward_service import worker as scoring_worker

_LOG = logging.getLogger(__name__)


def train(config: RunConfig, console: Console, *, verbose: bool = False) -> RunDirectory:
    """Run a configuration to its end, from wherever its run directory stands.

    Args:
        config: The validated configuration.
        console: Where progress goes.
        verbose: Whether the workers' own logs are shown too.

    Returns:
        The run's directory.

    Raises:
        UserError: If something about the configuration, the data or the cluster is wrong.
        RuntimeError: If the run failed; what it has committed can be resumed.
    """
    directory = run_directory.claim(config)
    lock = run_directory.lock(directory)
    try:
        if directory.finished.exists():
            console.print(f"{directory.root} is finished; nothing to do")
        else:
            _run(config, directory, console, verbose=verbose)
        show_result(directory, console)
        return directory
    except UserError:
        # A mistake leaves nothing behind that would stand in the way of the corrected run.
        run_directory.discard_untouched(directory)
        raise
    finally:
        os.close(lock)


def _run(config: RunConfig, directory: RunDirectory, console: Console, *, verbose: bool) -> None:
    progress = Progress(console)
    if not directory.policy(0).exists():
        preflight.check(config)
    connect(config, verbose=verbose)
    try:
        plans = placement.plan(config)
        placement.check(plans, placement.available_resources())
        groups = Placement(plans, deadline_s=config.cluster.deadlines.placement_s)
        builder = Builder(config, directory, groups)
        stages = RunStages(
            config,
            directory,
            learner=builder.learner(),
            open_sinks=lambda done: _sinks(config, directory, console, done=done),
            open_pools=builder.pools,
            read_prompts=lambda: read_prompts(config, directory),
            progress=progress,
        )
        try:
            state = play(stages, config, stages.resume(), announce=progress.announce)
            _finish(directory, state)
        finally:
            stages.close()
            groups.remove()
    finally:
        ray.shutdown()


def connect(config: RunConfig, *, verbose: bool) -> None:
    """Join the configured cluster, the one this process runs in, or a new one on this machine alone."""
    level = logging.WARNING if verbose else logging.ERROR
    quiet: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address:
        ray.init(address=address, **quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # "local" starts one; without it Ray would join whatever cluster it finds traces of on this machine.
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    # Ray puts handlers of its own in place that end the process; the run would leave workers and files behind.
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Builder:
    """Makes the workers of a run, each in its place."""

    def __init__(self, config: RunConfig, directory: RunDirectory, groups: Placement) -> None:
        self._config = config
        self._directory = directory
        self._groups = groups
        self._nodes: dict[str, str] = {}

    def learner(self) -> LearnerGroup:
        """Start the learner's ranks."""
        config = self._config
        remote = learner_worker.remote_class()
        environment = {"env_vars": learner_worker.environment(config)}

        def make(rank: int, name: str) -> Handle:
            options = self._groups.options("learner", rank)
            return remote.options(**options, runtime_env=environment).remote(
                rank=rank, world_size=config.learner.workers, config=config, run_directory=self._directory.root
            )

        group = LearnerGroup(config, make=make)
        self._nodes |= group.started()
        return group

    def pools(self) -> tuple[RolloutPool, ScoringPool]:
        """Start the rollout and scoring workers and wait until they have loaded their models."""
        config = self._config
        rollouts = RolloutPool(
            config.rollout,
            config.cluster.deadlines,
            make=self._rollout,
            replacements=config.cluster.worker_replacements,
        )
        scoring = ScoringPool(
            config.scoring,
            config.cluster.deadlines,
            make_reward=self._reward,
            make_reference=self._reference,
            replacements=config.cluster.worker_replacements,
        )
        self._nodes |= rollouts.started() | scoring.started()
        write_json(self._directory.workers, self._nodes)
        return rollouts, scoring

    def _rollout(self, index: int, name: str) -> Handle:
        config = self._config
        environment = rollout_worker.environment(config.rollout, config.cluster.backend)
        return (
            rollout_worker.remote_class()
            .options(**self._groups.options("rollout", index), runtime_env={"env_vars": environment})
            .remote(
                name=name,
                model_path=str(self._directory.policy(0)),
                config=config.rollout,
                backend=config.cluster.backend,
                policy_version=0,
            )
        )

    def _reward(self, index: int, name: str) -> Handle:
        config = self._config
        return (
            scoring_worker.reward_worker_class()
            .options(
                **self._groups.options("scoring", index),
                runtime_env={"env_vars": scoring_worker.environment(config)},
            )
            .remote(
                config=config,
                name=name,
                policy=self._directory.policy(0),
                trained=self._directory.reward_model(0),
                incidents=self._directory.incidents,
            )
        )

    def _reference(self, index: int, name: str) -> Handle:
        config = self._config
        reference = config.models.reference
        path = self._directory.policy(0) if reference == "sft" else reference
        return (
            scoring_worker.reference_worker_class()
            .options(
                **self._groups.options("scoring", config.scoring.workers + index),
                runtime_env={"env_vars": scoring_worker.environment(config)},
            )
            .remote(config=config, name=name, path=path)
        )


def read_prompts(config: RunConfig, directory: RunDirectory) -> tuple[list[Prompt], list[Prompt]]:
    """Read and encode the training and the held-out prompts."""
    tokenizer = tokens.load_tokenizer(directory.policy(0))
    train = _encoded(config.data.prompts, tokenizer, config, count=config.data.prompts.count)
    held_out = config.data.eval_prompts
    if held_out is None:
        return train, []
    return train, _encoded(held_out, tokenizer, config, count=preflight.evaluation_count(config))


def _encoded(source: SourceConfig, tokenizer: Any, config: RunConfig, *, count: int | None) -> list[Prompt]:
    records = datasets.read_prompts(source.source, split=source.split, seed=config.run.seed, count=count)
    prompts, report = encode_prompts(
        records, tokenizer, max_tokens=config.rollout.max_prompt_tokens, overlong=config.data.overlong_prompts
    )
    if report.num_dropped:
        _LOG.warning("%s: %s", source.source, report.summary())
    return prompts


def _sinks(config: RunConfig, directory: RunDirectory, console: Console, *, done: int) -> Sinks:
    sinks: list[Any] = [
        LinesFile(directory.metrics, keep=done, lines=metrics_lines),
        LinesFile(directory.samples, keep=done, lines=samples_lines),
        Terminal(console, num_iterations=config.rounds.iterations, samples_period=config.tracking.samples_shown_period),
    ]
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(directory.tensorboard))
    return Sinks(sinks)


def _finish(directory: RunDirectory, state: RunState) -> None:
    directory.finished.write_text(json.dumps(state.to_json()))


def show_result(directory: RunDirectory, console: Console) -> None:
    """Print the evaluation and where everything lies."""
    if directory.evaluation.exists():
        console.print(evaluation_table(json.loads(directory.evaluation.read_text())))
    for label, path in (
        ("policies", directory.root / "policies"),
        ("reward models", directory.root / "reward_models"),
        ("metrics", directory.metrics),
    ):
        if path.exists():
            console.print(f"{label}: {_short(path)}", highlight=False, markup=False)


def _short(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
