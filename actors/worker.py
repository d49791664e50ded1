"""The Ray process of one rollout worker.

Sampling and loading share one thread, so weights never change under a response; `status` has a concurrency group of its
own and answers meanwhile. The worker never restarts itself: the pool owns replacement. When the engine breaks, whoever
asked is told with the traceback, and the worker refuses all work from then on; the pool ends the process.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import psutil
import ray

from actors.environment import Backend, environment
from actors.errors import EngineFailedError, StaleWeightsError, WeightMismatchError
from configs.models import LoraConfig
from configs.rollout import RolloutConfig
from protocol.messages import Rollout, RolloutMeta, RolloutRequest
from protocol.weights import ByteArray, Canary, Rendezvous, VersionProof, WeightManifest

__all__ = ["CONTROL_GROUP", "RolloutWorker", "WorkerStatus", "environment", "remote_class"]

CONTROL_GROUP = "control"
WorkerState = Literal["idle", "serving", "publishing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What a rollout worker is doing."""

    name: str
    policy_version: int | None
    """The version that it can prove; None while it cannot prove any."""
    state: WorkerState
    pid: int
    node_id: str
    resident_bytes: int
    engine_steps: int
    """Steps that the engine has made since it was built; a worker whose count stands still gets nowhere."""


class RolloutWorker:
    """One vLLM engine and the version of the policy that it can prove."""

    def __init__(
        self,
        *,
        name: str,
        model_path: str,
        config: RolloutConfig,
        backend: Backend,
        policy_version: int | None,
        adapter: LoraConfig | None = None,
    ) -> None:
        """Build the engine.

        Args:
            name: What rollouts and proofs are signed with.
            model_path: A Hugging Face directory or hub id with weights and tokenizer.
            config: Sampling, sizes and threads.
            backend: Where to compute.
            policy_version: The version that the directory holds; None if nothing may be sampled before a `load`.
            adapter: As VLLMEngine has it.
        """
        # vLLM takes seconds to import, and the driver imports this module to describe the actor.
        from actors.engine import VLLMEngine

        self._name = name
        self._config = config
        self._engine = VLLMEngine(model_path, config, backend=backend, adapter=adapter)
        self._policy_version = policy_version
        self._state: WorkerState = "idle"
        self._failure: str | None = None
        """What broke the engine."""

    def generate(
        self, requests: Sequence[RolloutRequest], *, policy_version: int
    ) -> Iterator[tuple[Rollout, ...] | tuple[RolloutMeta, ...]]:
        """Sample responses; yield what a step finished, then its description, at once.

        Args:
            requests: In key order.
            policy_version: The version that must sample them.

        Yields:
            Tuples of Rollouts and of RolloutMetas in turn.

        Raises:
            StaleWeightsError: If this worker cannot prove that it holds that version.
            ValueError: If a request does not fit the context.
            InvalidRolloutError: If the engine returned something that must not be trained on.
            EngineFailedError: If the engine breaks or is broken.
        """
        self._require_engine()
        if policy_version != self._policy_version:
            raise StaleWeightsError(f"{self._name} was asked for policy version {policy_version} but {self._held()}")
        self._state = "serving"
        try:
            for finished in self._engine.generate(requests, policy_version=policy_version, worker=self._name):
                # The payload first: whoever has read a description can rely on what it describes.
                yield finished
                yield tuple(RolloutMeta.of(rollout) for rollout in finished)
        except EngineFailedError as error:
            raise self._broken(error) from error
        finally:
            self._state = "idle"

    def load(self, manifest: WeightManifest, buckets: Sequence[Any], *, timeout_s: float = 600.0) -> VersionProof:
        """Load a published version from the object store and prove it.

        Until the proof is complete the worker can prove nothing, so that after any error it refuses to sample.

        Args:
            manifest: What was published.
            buckets: An object reference a bucket.
            timeout_s: How long to wait for any one bucket.

        Returns:
            The proof. The canary's gap is reported; the pool judges it.

        Raises:
            WeightMismatchError: If a bucket or the loaded parameters are not what the manifest says.
            ray.exceptions.GetTimeoutError: If a bucket did not come.
            EngineFailedError: If the engine breaks or is broken.
        """
        if len(buckets) != len(manifest.bucket_digests):
            self._policy_version = None
            raise WeightMismatchError(f"{len(manifest.bucket_digests)} buckets were published, {len(buckets)} came")

        def fetch(bucket: int) -> ByteArray:
            return ray.get(buckets[bucket], timeout=timeout_s)

        return self._replaced(manifest, lambda: self._engine.load(manifest, fetch))

    def join(
        self, manifest: WeightManifest, rendezvous: Rendezvous, *, first_receiver: int, timeout_s: float
    ) -> VersionProof:
        """Load a published version by broadcast and prove it, as `load` does.

        Args:
            manifest: What was announced.
            rendezvous: Where to join.
            first_receiver: The number of this engine's first rank among all receivers.
            timeout_s: How long the broadcast may take.

        Returns:
            The proof.

        Raises:
            BroadcastError: If the broadcast did not reach this worker.
            WeightMismatchError: As `load`.
            EngineFailedError: Likewise.
        """
        address = ray.util.get_node_ip_address()
        return self._replaced(
            manifest,
            lambda: self._engine.receive(
                manifest, rendezvous, first_receiver=first_receiver, address=address, timeout_s=timeout_s
            ),
        )

    def _replaced(self, manifest: WeightManifest, replace: Callable[[], None]) -> VersionProof:
        self._require_engine()
        started = perf_counter()
        self._policy_version = None
        self._state = "publishing"
        try:
            replace()
            loaded = self._check_loaded(manifest)
            gap = self._canary_gap(manifest.canary)
        except EngineFailedError as error:
            raise self._broken(error) from error
        finally:
            self._state = "idle"
        self._policy_version = manifest.policy_version
        return VersionProof(
            worker=self._name,
            policy_version=manifest.policy_version,
            fingerprint=manifest.fingerprint,
            loaded_checksum=loaded,
            canary_gap_max=gap,
            seconds=perf_counter() - started,
        )

    @ray.method(concurrency_group=CONTROL_GROUP)
    def status(self) -> WorkerStatus:
        """Say what this worker is doing, also while it is doing it."""
        return WorkerStatus(
            name=self._name,
            policy_version=self._policy_version,
            state=self._state,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            resident_bytes=psutil.Process().memory_info().rss,
            engine_steps=self._engine.steps,
        )

    def _check_loaded(self, manifest: WeightManifest) -> int:
        loaded = self._engine.checksum()
        if loaded != manifest.loaded_checksum:
            dtypes = ", ".join(sorted({slot.spec.dtype for slot in manifest.slots}))
            raise WeightMismatchError(
                f"{self._name} loaded version {manifest.policy_version} but its parameters sum to {loaded:#018x}, the "
                f"learner's to {manifest.loaded_checksum:#018x}; likely a tensor is missing, or the learner sent "
                f"{dtypes} to an engine of {self._config.dtype}"
            )
        return loaded

    def _canary_gap(self, canary: Canary) -> float:
        held = self._engine.canary_logprobs(canary.token_ids)
        gaps = [abs(ours - theirs) for ours, theirs in zip(held, canary.logprobs, strict=True)]
        # NaN compares as neither above nor below any bound; infinity is above every one.
        return max(gaps) if all(gap == gap for gap in gaps) else float("inf")

    def _held(self) -> str:
        return "can prove none" if self._policy_version is None else f"holds {self._policy_version}"

    def _broken(self, error: EngineFailedError) -> EngineFailedError:
        """Take note that the engine is broken. What vLLM raised may not survive pickling; its text does."""
        self._policy_version = None
        self._failure = f"{error}\n{''.join(traceback.format_exception(error))}"
        return EngineFailedError(f"the engine of {self._name} failed: {self._failure}")

    def _require_engine(self) -> None:
        if self._failure is not None:
            raise EngineFailedError(f"{self._name} has no engine any more: {self._failure}")


def remote_class() -> Any:
    """Wrap the worker for Ray: `remote_class().options(...).remote(...)`, with `environment()` in its runtime_env."""
    remote: Any = ray.remote  # Ray's own annotations do not know concurrency_groups
    return remote(concurrency_groups={CONTROL_GROUP: 1}, max_restarts=0, max_task_retries=0)(RolloutWorker)
