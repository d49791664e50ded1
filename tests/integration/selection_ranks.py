"""What each rank process of test_selection_ranks does: DPO and RFT under DeepSpeed, on the same data as any other rank.

python -m tests.integration.selection_ranks RANK WORLD_SIZE PORT_FILE OUTPUT_DIRECTORY
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from configs.algorithm import DPOConfig, RFTConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.distributed import LOOPBACK, init_distributed, listen
from learner.engine import DeepSpeedEngine
from learner.experience import PassSettings
from learner.selection_update import SelectionSettings, SelectionUpdater
from learner.training import TrainingEngine
from tests.learner_batches import tiny_policy
from tests.selection_batches import sampled, with_scores

HIDDEN = 128
"""Wide enough that ZeRO 3 really shards: smaller matrices stay whole on every rank."""
RATE = OptimizerConfig(learning_rate=3e-4)
PASSES = PassSettings(temperature=0.8, token_budget=70, layout="sorted", pad_id=0)
ALGORITHMS = {
    # Five pairs, three to a step at most: ranks get a different number of them, and some micro-batches are empty.
    "dpo": DPOConfig(minibatch_responses=6, num_epochs=2, dpo_beta=0.3),
    "rft": RFTConfig(minibatch_responses=5, num_epochs=2, memory_responses=4),
}
STAGES = (0, 3)


def updates(policy: TrainingEngine, name: str) -> dict[str, Any]:
    """Learn from three batches; in each, one of six prompts ties."""
    settings = SelectionSettings(algorithm=ALGORITHMS[name], passes=PASSES, run_seed=5)
    updater = SelectionUpdater(policy=policy, settings=settings)
    metrics = []
    for iteration in range(3):
        batch = sampled(seed=iteration, iteration=iteration)
        scores = [scored.score for scored in batch.rollouts]
        scores[6:9] = [1.0] * 3
        metrics.append(dict(updater.update(with_scores(batch, scores)).metrics))
    found = policy.gather(list(policy.parameter_shapes()))
    return {"metrics": metrics, "weights": torch.cat([tensor.flatten().float().clone() for tensor in found.values()])}


def main() -> None:
    """Do everything and write what was found."""
    rank, world_size, port_file, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    listener: socket.socket | None = None
    if rank == 0:
        listener = listen(LOOPBACK)
        staging = port_file.with_suffix(".tmp")
        staging.write_text(str(listener.getsockname()[1]))
        staging.rename(port_file)
    deadline = time.monotonic() + 60
    while not port_file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 has not written its port within 60 s")
        time.sleep(0.05)
    port = int(port_file.read_text())
    context = init_distributed(
        rank=rank, world_size=world_size, address=LOOPBACK, port=port, listener=listener, timeout_s=60
    )
    findings: dict[tuple[str, int], Any] = {}
    for name in ALGORITHMS:
        for stage in STAGES:
            config = LearnerConfig(zero_stage=stage)
            policy = DeepSpeedEngine(
                tiny_policy(hidden=HIDDEN), name="policy", optimizer=RATE, settings=config, context=context
            )
            findings[name, stage] = updates(policy, name)
            policy.close()
    torch.save(findings, directory / f"findings-{world_size}-{rank}.pt")


if __name__ == "__main__":
    main()
