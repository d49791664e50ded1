"""The floors under an iteration: each stage's bare work, on the same sequences, with the same threads, alone.

    python -m benchmarks.floors RUN_DIRECTORY --threads 2 --last 5

prints one JSON object, seconds an iteration: `generate` (vLLM's own LLM.generate, made to sample the same lengths), the
forward passes `score`, `reference`, `critic` and `old_logprobs`, and the forward and backward passes of `policy_update`
and `critic_update` for every epoch. No optimiser, no Ray, no transfer.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any


def main() -> None:
    """Measure one floor, or each one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--last", type=int, default=5, help="how many of the last iterations to measure on")
    parser.add_argument("--stage", choices=["generate", "passes"], required=True)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads))
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    rows = [rows_of(path) for path in sorted((options.run / "rollouts").glob("*.parquet"))[-options.last :]]
    if options.stage == "generate":
        print(json.dumps({"generate": generate(options.run, rows, threads=options.threads)}))
    else:
        print(json.dumps(passes(options.run, rows, threads=options.threads)))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Read an iteration's prompts and responses."""
    from pyarrow import parquet

    return parquet.read_table(path, columns=["prompt_ids", "response_ids"]).to_pylist()


def generate(run: Path, iterations: list[list[dict[str, Any]]], *, threads: int) -> float:
    """Time vLLM's own generate on the same prompts and response lengths."""
    from actors.environment import environment
    from configs.load import load

    config = load(run / "config.yaml").rollout.model_copy(update={"threads_per_worker": threads})
    os.environ.update(environment(config, "cpu"))
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    engine = LLM(
        model=str(run / "policies" / "v000"),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=config.max_concurrent_sequences,
        max_model_len=config.max_prompt_tokens + config.max_response_tokens,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
    )

    def sample(rows: list[dict[str, Any]]) -> None:
        prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
        params = [
            SamplingParams(
                temperature=1.0, seed=number, logprobs=0, ignore_eos=True, detokenize=False,
                min_tokens=len(row["response_ids"]), max_tokens=len(row["response_ids"]),
            )
            for number, row in enumerate(rows)
        ]  # fmt: skip
        engine.generate(prompts, params, use_tqdm=False)  # pyright: ignore[reportArgumentType]

    sample(iterations[0])
    return _seconds(lambda: [sample(rows) for rows in iterations]) / len(iterations)


def passes(run: Path, iterations: list[list[dict[str, Any]]], *, threads: int) -> dict[str, float]:
    """Time the bare forward and backward passes."""
    import numpy as np
    import torch

    from configs.load import load
    from learner.batch import MicroBatch, TokenSequence, collate, micro_batches, minibatches
    from learner.models import load_policy, load_scalar

    torch.set_num_threads(threads)
    config = load(run / "config.yaml")
    policy = load_policy(run / "policies" / "v000", precision="fp32")
    scalar = load_scalar(run / "reward_models" / "v000", precision="fp32")
    sequences = [
        [TokenSequence(np.array(row["prompt_ids"]), np.array(row["response_ids"])) for row in rows]
        for rows in iterations
    ]

    def cut(chosen: list[TokenSequence]) -> Iterator[MicroBatch]:
        lengths = [sequence.num_tokens for sequence in chosen]
        for group in micro_batches(lengths, token_budget=config.learner.micro_batch_tokens, layout="sorted"):
            yield collate([chosen[i] for i in group], pad_id=0, layout="sorted")

    whole = [batch for chosen in sequences for batch in cut(chosen)]
    parts = [
        batch
        for chosen in sequences
        for epoch in range(config.algorithm.num_epochs)
        for indices in minibatches(len(chosen), size=config.algorithm.minibatch_responses, seed=epoch)
        for batch in cut([chosen[i] for i in indices])
    ]

    def ask_policy(m: MicroBatch) -> torch.Tensor:
        return policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)[0]

    def ask_scalar(m: MicroBatch) -> torch.Tensor:
        return scalar(m.input_ids, m.position_ids, m.predict_index)

    def forward(ask: Callable[[MicroBatch], torch.Tensor]) -> None:
        with torch.no_grad():
            for batch in whole:
                ask(batch)

    def update(ask: Callable[[MicroBatch], torch.Tensor], network: torch.nn.Module) -> None:
        for batch in parts:
            ask(batch).sum().backward()
            network.zero_grad(set_to_none=False)

    forward(ask_policy)
    update(ask_policy, policy)
    update(ask_scalar, scalar)
    num = len(iterations)
    return {
        "score": _seconds(lambda: forward(ask_scalar)) / num,
        "reference": _seconds(lambda: forward(ask_policy)) / num,
        "critic": _seconds(lambda: forward(ask_scalar)) / num,
        "old_logprobs": _seconds(lambda: forward(ask_policy)) / num,
        "policy_update": _seconds(lambda: update(ask_policy, policy)) / num,
        "critic_update": _seconds(lambda: update(ask_scalar, scalar)) / num,
    }


def _seconds(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


if __name__ == "__main__":
    main()
