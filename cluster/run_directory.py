"""A run's directory: where everything of a run lies, and whose it is."""

import fcntl
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster.resizing import way_on
from cluster.schedule import RunState
from configs.load import ConfigError, config_hash, dump, load
from configs.run import RunConfig
from protocol.errors import StorageError, UserError
from protocol.files import make_directory, read_json, write_text

_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One flat JSON object an iteration."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """A few decoded responses of each iteration, one JSON object an iteration."""
        return self.root / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    @property
    def rollouts(self) -> Path:
        """One Parquet file an iteration."""
        return self.root / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints."""
        return self.root / "checkpoints"

    @property
    def incidents(self) -> Path:
        """What went wrong, one JSON record each."""
        return self.root / "incidents"

    @property
    def evaluation(self) -> Path:
        """The evaluation before and after."""
        return self.root / "evaluation.json"

    def evaluation_of(self, version: int) -> Path:
        """A policy version's responses to the held-out prompts."""
        return self.root / "evaluations" / f"v{version:03d}.jsonl"

    @property
    def reference_samples(self) -> Path:
        """The anchor responses, which fix the zero and the unit of every reward."""
        return self.root / "evaluations" / "reference.jsonl"

    @property
    def preferences(self) -> Path:
        """Tasks and labels."""
        return self.root / "preferences.db"

    @property
    def state(self) -> Path:
        """Which phase the run is in."""
        return self.root / "state.json"

    @property
    def ladder(self) -> Path:
        """The ratings of the policy versions."""
        return self.root / "ladder.json"

    @property
    def lineage(self) -> Path:
        """What every artefact was made from."""
        return self.root / "lineage.json"

    @property
    def report(self) -> Path:
        """The run for people to read."""
        return self.root / "report.html"

    def round(self, number: int) -> Path:
        """What belongs to one round."""
        return self.root / "rounds" / f"r{number:03d}"

    def comparisons(self, number: int) -> Path:
        """The comparisons of a round, as its reward model was trained on them."""
        return self.round(number) / "comparisons.jsonl"

    def calibrations(self, number: int) -> Path:
        """The zero and the unit of every reward in a round."""
        return self.round(number) / "calibrations.json"

    def refreshed(self, number: int) -> Path:
        """What a round's refresh found, and which reward model scores."""
        return self.round(number) / "refresh.json"

    def round_report(self, number: int) -> Path:
        """What a round did and where it ended."""
        return self.round(number) / "round.json"

    @property
    def run_id(self) -> Path:
        """The run's own id, which its checkpoints name."""
        return self.root / "run_id"

    @property
    def workers(self) -> Path:
        """Which node each worker is on."""
        return self.root / "workers.json"

    @property
    def leaving(self) -> Path:
        """A file for every rollout worker that shall leave."""
        return self.root / "leaving"

    @property
    def finished(self) -> Path:
        """Written when everything is done."""
        return self.root / "finished.json"

    def policy(self, version: int) -> Path:
        """A policy version as a Hugging Face directory."""
        return self.root / "policies" / f"v{version:03d}"

    def reward_model(self, version: int) -> Path:
        """A reward model as a Hugging Face directory."""
        return self.root / "reward_models" / f"v{version:03d}"

    def heldout_reward_model(self, version: int) -> Path:
        """The reward model of the other half of the comparisons."""
        return self.root / "reward_models" / f"v{version:03d}_heldout"


def claim(config: RunConfig) -> RunDirectory:
    """Create a run's directory, or take up an existing one of the same configuration.

    Raises:
        UserError: If the directory holds a run of another configuration, is in use, cannot be written, or would
            vanish with the job.
    """
    root = (Path(config.run.dir) / config.run.name).absolute()
    _refuse_vanishing(config, root)
    directory = RunDirectory(root)
    if directory.config.exists():
        check_same(directory, config)
    try:
        make_directory(root)
        if not directory.config.exists():
            write_text(directory.config, f"# config {config_hash(config)}\n{dump(config)}")
    except (OSError, StorageError) as error:
        raise UserError(
            f"cannot write the run directory: {error}",
            where=str(root),
            next_step="choose another one with run.dir=PATH",
        ) from None
    return directory


def check_same(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        UserError: Naming the first values that differ.
    """
    try:
        differing = differences(directory.config, config)
    except ConfigError as error:
        raise UserError(f"the configuration of the run that is there cannot be read: {error}") from None
    if differing:
        another = way_on(directory.root, config, differing) or "give the new run another name with run.name=NAME"
        raise UserError(
            f"the directory holds a run with another configuration: {'; '.join(differing[:4])}",
            where=str(directory.root),
            next_step=f"{another}, or continue the old one with `rondo resume {directory.root}`",
        )


def differences(stored: Path, config: RunConfig) -> list[str]:
    """Compare a stored configuration with one in use, both as this version understands them.

    Args:
        stored: A configuration file.
        config: The configuration in use.

    Returns:
        The values that differ; none if the two have one hash. Where the run is kept does not count.

    Raises:
        ConfigError: If the stored one cannot be read.
    """
    earlier = load(stored)
    if config_hash(earlier) == config_hash(config):
        return []
    unplaced = {"run": {"dir"}}
    return _differences(
        earlier.model_dump(mode="json", exclude=unplaced), config.model_dump(mode="json", exclude=unplaced)
    )


def discard_untouched(directory: RunDirectory) -> None:
    """Remove a run's directory if nothing has been done in it."""
    if {path.name for path in directory.root.iterdir()} <= {directory.config.name, _LOCK, directory.run_id.name}:
        shutil.rmtree(directory.root)


def lock(directory: RunDirectory) -> int:
    """Keep a second driver out of the directory for as long as this process lives.

    Returns:
        The lock's file descriptor; closing it, or dying, releases the lock.

    Raises:
        UserError: If another driver holds it.
    """
    descriptor = os.open(directory.root / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(
            "another process is running this run",
            where=str(directory.root),
            next_step="wait for it or stop it; `rondo status` shows how far it is",
        ) from None
    return descriptor


def is_running(directory: RunDirectory) -> bool:
    """Say whether a driver holds the directory's lock."""
    path = directory.root / _LOCK
    return path.is_file() and _is_held(path)


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _refuse_vanishing(config: RunConfig, root: Path) -> None:
    """A Ray job runs in a temporary copy of the working directory, which goes when the job ends."""
    in_copy = "runtime_resources" in Path.cwd().parts
    if in_copy and root.is_relative_to(Path.cwd()):
        raise UserError(
            f"run.dir = {config.run.dir} lies in the job's temporary copy of the working directory and would be lost",
            where="run.dir",
            next_step="pass an absolute path on storage that all nodes share: run.dir=/shared/runs",
        )


def _differences(old: object, new: object, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]


def run_id(directory: RunDirectory) -> str:
    """Return the run's own id, made when it is first asked for."""
    if not directory.run_id.exists():
        write_text(directory.run_id, uuid.uuid4().hex)
    return directory.run_id.read_text()


def state_of(directory: RunDirectory) -> RunState:
    """Read which phase the run has reached; one that has reached none is at its beginning.

    Raises:
        UserError: If the file is damaged.
    """
    if not directory.state.exists():
        return RunState()
    step = f"restore it from a copy, or remove it (`rm {directory.state}`): the newest checkpoint says as much"
    return read_json(directory.state, RunState.from_json, next_step=f"{step}, and what was done since is kept")


def store_url(config: RunConfig, directory: RunDirectory) -> str:
    """Say where tasks and labels are kept.

    Raises:
        UserError: If the environment variable that should say so is not set.
    """
    name = config.rounds.store_env
    if name is None:
        return f"sqlite:///{directory.preferences}"
    if not os.environ.get(name):
        raise UserError(
            f"the environment variable {name} is not set",
            where="rounds.store_env",
            next_step=f"export {name}=postgresql+psycopg://USER@HOST/DATABASE",
        )
    return os.environ[name]
