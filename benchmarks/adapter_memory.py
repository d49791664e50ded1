"""The learner's peak memory with adapters and without: policy and critic of about 30 million parameters each.

    python -m benchmarks.adapter_memory

prints one JSON object: by how many MiB the resident memory of a fresh process grows at most while a rank loads the two
networks, learns two iterations, publishes and saves; in full training, with adapters of rank 16, and their ratio.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_OVERRIDES = (
    "models.critic.init=policy",
    "algorithm.name=ppo",
    "learner.micro_batch_tokens=128",
    "learner.guards={logprob_gap_mean_nats: null, ratio_p999: null, ess_fraction: null}",  # no engine sampled this
    "learner.bucket_mib=8",
)
_ADAPTERS = ("models.policy.train.lora.rank=16", "models.critic.train.lora.rank=16")


def main() -> None:
    """Measure both ways of training, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", choices=["full", "adapters"], help="measure this one in this process")
    parser.add_argument("--policy", type=Path, help="the policy to start from")
    options = parser.parse_args()
    if options.train is not None:
        print(json.dumps(learn(options.policy, adapted=options.train == "adapters")))
        return
    with tempfile.TemporaryDirectory() as directory:
        policy = Path(directory) / "policies" / "v000"
        num_parameters = write_policy(policy)
        found = {train: in_a_fresh_process(train, policy) for train in ("full", "adapters")}
    ratio = found["adapters"]["peak_mib"] / found["full"]["peak_mib"]
    print(json.dumps({"parameters_each": num_parameters, **found, "ratio": round(ratio, 3)}, indent=2))


def in_a_fresh_process(train: str, policy: Path) -> dict[str, float]:
    """Run `learn` in a process of its own."""
    from configs.load import load
    from learner.worker import environment

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.adapter_memory"]
    done = subprocess.run(
        [*command, "--train", train, "--policy", str(policy)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment(load("quickstart"))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=600,
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_policy(directory: Path) -> int:
    """Write a random policy and return how many parameters it has."""
    from configs.models import ScratchModelConfig
    from learner.export import write_policy
    from learner.models import new_policy
    from tests.tiny import tiny_tokenizer

    scratch = ScratchModelConfig(
        vocab_size=4096, hidden_size=512, mlp_size=1376, num_layers=9, num_heads=8, num_kv_heads=4
    )
    tokenizer = tiny_tokenizer()
    policy = new_policy(scratch, tokenizer, seed=0)
    write_policy(policy, tokenizer, directory, card={})
    return sum(parameter.numel() for parameter in policy.parameters())


def learn(policy: Path, *, adapted: bool) -> dict[str, float]:
    """Let a rank do what it does in a round, and measure how far this process grows."""
    from learner.rank import Rank
    from tests.learner_batches import single_rank
    from tests.tiny_run import tiny_config

    directory = policy.parents[1]
    config = tiny_config(directory, *_OVERRIDES, *(_ADAPTERS if adapted else ()))
    rank = Rank(single_rank(), config=config, run_directory=directory / "run")
    # From here on the kernel counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    rank.start_rl(policy=policy, reward_model=None, iterations=2)
    started = _status_mib("VmRSS") - before
    rank.policy_version = 3
    for iteration in range(2):
        rank.update([group()], round=1, iteration=iteration)
    for _ in rank.publish(3):
        continue
    checkpoint = directory / f"checkpoint-{adapted}"
    checkpoint.mkdir()
    rank.save(checkpoint)
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {
        "started_mib": round(started, 1),
        "peak_mib": round(_status_mib("VmHWM") - before, 1),
        "checkpoint_mib": round(written / 2**20, 1),
    }


def group() -> Any:
    """Make a group of scored rollouts of version 3."""
    import numpy as np

    from protocol.messages import ReferenceLogprobs, RewardScores
    from tests.learner_batches import scored_batch

    scored = scored_batch(16).rollouts
    keys = tuple(item.rollout.key for item in scored)
    scores = np.array([item.score for item in scored], dtype=np.float32)
    return (
        tuple(item.rollout for item in scored),
        RewardScores(keys=keys, scores=scores, components={}, gold={}, busy_s=0.0),
        ReferenceLogprobs(keys=keys, logprobs=tuple(item.ref_logprobs for item in scored)),
    )


def _status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
