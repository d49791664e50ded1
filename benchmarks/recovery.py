"""What the loss of a rollout worker costs: its start-up and one publish, and nothing to the workers beside it?

    python -m benchmarks.recovery --json results.json

Two real engines with random weights sample a batch. Undisturbed first; then one of them is killed after a quarter of
that time: when was the loss noticed, when did the replacement serve (after its proof of the current version), and how
fast did the other engine sample meanwhile? Start-up (of two engines at once) and publish are measured in the same run.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from transformers import LlamaForCausalLM

from actors import worker as rollout_worker
from cluster import schedule
from cluster.pool import status_fields
from cluster.rollout_pool import RolloutPool
from configs.cluster import DeadlinesConfig
from configs.rollout import RolloutConfig
from protocol.messages import Prompt, RolloutKey, RolloutRequest
from protocol.roles import Finished, Publication
from tests.tiny import tiny_llama, tiny_publication

CONFIG = RolloutConfig(workers=2, max_prompt_tokens=32, max_response_tokens=256, max_concurrent_sequences=16)
SURVIVOR, VICTIM = 0, 1
_LOOK_S = 0.02


def main() -> None:
    """Measure, print, and say whether recovery cost less than its parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_llama(Path(folder), hidden=256, layers=8)
        result = measure(model, requests=make_requests(options.responses))
    ray.shutdown()
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def measure(model: Path, *, requests: list[RolloutRequest]) -> dict[str, Any]:
    """Run the batch undisturbed and with a loss."""
    lost_at: list[float] = []
    pool = made(model, report=lambda incident: lost_at.append(time.monotonic()))
    begun = time.monotonic()
    pool.started()
    startup_s = time.monotonic() - begun
    network = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    manifest, buckets = tiny_publication(network, policy_version=1)
    publication = Publication(manifest=manifest, buckets=tuple(ray.put(bucket) for bucket in buckets))
    begun = time.monotonic()
    pool.load(publication)
    publish_s = time.monotonic() - begun

    usual = sampled(pool, requests)
    quarter_s = max(at for at, _ in usual) / 4
    killed: list[float] = []
    serving: list[float] = []
    watching = threading.Thread(target=lambda: serving.append(serves_again(pool)))

    def kill() -> None:
        killed.append(time.monotonic())
        ray.kill(pool.members[VICTIM].handle, no_restart=True)
        watching.start()

    begun = time.monotonic()
    disturbed = sampled(pool, requests, after_s=quarter_s, do=kill)
    watching.join()
    mine = place_of(requests)
    pool.stop()
    window = (killed[0] - begun, serving[0] - begun)
    speeds = [rate([one for one in run if mine[one[1].meta.key] == SURVIVOR], window) for run in (usual, disturbed)]
    return {
        "startup_of_two_workers_s": startup_s,
        "publish_s": publish_s,
        "batch_s": max(at for at, _ in usual),
        "batch_with_loss_s": max(at for at, _ in disturbed),
        "noticed_s": lost_at[0] - killed[0],
        "replacement_serves_s": serving[0] - killed[0],
        "survivor_tokens_per_s": speeds[1],
        "survivor_tokens_per_s_undisturbed": speeds[0],
        "same_tokens": tokens(usual) == tokens(disturbed),
    }


def made(model: Path, *, report: Callable[[Any], None]) -> RolloutPool:
    """Start two engines."""
    environment = {"env_vars": rollout_worker.environment(CONFIG, "cpu")}

    def make(index: int, name: str) -> Any:
        remote = rollout_worker.remote_class().options(num_cpus=0.5, runtime_env=environment)
        return remote.remote(name=name, model_path=str(model), config=CONFIG, backend="cpu", policy_version=0)

    return RolloutPool(CONFIG, DeadlinesConfig(), make=make, replacements=1, report=report)


def serves_again(pool: RolloutPool) -> float:
    """Wait until a replacement is there and has been given work, which it is after its proof; say when."""
    lost = pool.members[VICTIM].name
    while (member := pool.members[VICTIM]).name == lost:
        time.sleep(_LOOK_S)
    while status_fields(ray.get(member.handle.status.remote(), timeout=120))["state"] != "serving":
        time.sleep(_LOOK_S)
    return time.monotonic()


def make_requests(count: int) -> list[RolloutRequest]:
    """Make requests whose responses end at different lengths, so that they arrive one by one."""
    prompt = Prompt(prompt_id="p", token_ids=np.array([5, 6, 7], dtype=np.int32), text="p")
    keys = [RolloutKey(1, 0, "p", sample) for sample in range(count)]
    return [
        RolloutRequest(
            key=key, prompt=prompt, seed=key.seed(0), max_response_tokens=192 + key.sample % 64, temperature=1.0
        )
        for key in keys
    ]


def sampled(
    pool: RolloutPool, requests: list[RolloutRequest], *, after_s: float = 0.0, do: Callable[[], None] | None = None
) -> list[tuple[float, Finished]]:
    """Sample a batch; return each response with the time of its arrival, and do something once on the way."""
    begun, found = time.monotonic(), []
    for finished in pool.generate(requests, policy_version=1):
        now = time.monotonic() - begun
        found.append((now, finished))
        if do is not None and now >= after_s:
            do()
            do = None
    return found


def place_of(requests: list[RolloutRequest]) -> dict[RolloutKey, int]:
    """Say which place of the pool each request is dealt to."""
    shares = schedule.shares(len(requests), workers=CONFIG.workers)
    return {requests[i].key: place for place, share in enumerate(shares) for i in share}


def rate(arrived: list[tuple[float, Finished]], window: tuple[float, float]) -> float:
    """Compute response tokens per second from the first arrival in a window to the last."""
    inside = [(at, f.meta.response_tokens) for at, f in arrived if window[0] <= at <= window[1]]
    seconds = inside[-1][0] - inside[0][0]
    return sum(count for _, count in inside[1:]) / seconds


def tokens(arrived: list[tuple[float, Finished]]) -> dict[RolloutKey, list[int]]:
    """Bring the sampled tokens here."""
    return {
        f.meta.key: ray.get(f.payload.step)[f.payload.place].response_ids.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        for _, f in arrived
    }


if __name__ == "__main__":
    main()
