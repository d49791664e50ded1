"""How responses are sampled, and by how many workers."""

from typing import Any, Literal, Self, cast

from pydantic import model_validator

from configs.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Section,
    Temperature,
)


class RolloutConfig(Section):
    """Rollout workers: each one owns a vLLM engine."""

    workers: PositiveInt = 1
    min_workers: PositiveInt = 1
    """With fewer the run stops: workers whose nodes are gone, and for which the cluster has no room, are gone on
    without as long as so many are left, and no more are let go by `rondo workers drain` or a node that is drained."""
    max_workers: PositiveInt | None = None
    """Where a growing cluster has room, workers join, one at a time, until there are so many; by default as many as
    `workers`, with which the run starts: those that were gone on without come back."""
    tensor_parallel: PositiveInt = 1
    """Accelerators an engine spans (1 on a CPU)."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that Ray reserves for a worker; workers that take turns may share a core."""
    threads_per_worker: PositiveInt = 1
    """Threads of the numerical libraries in one worker (CPU backend)."""

    source: Literal["policy", "data"] = "policy"
    """Where the responses come from that the policy learns from: it samples them, or (`data`, offline learning) they
    are those of `data.responses`, `responses_per_iteration` at a time. Rollout workers sample for evaluation and
    collection in either case."""
    responses_per_iteration: PositiveInt = 64
    """Responses that one iteration samples, whatever the algorithm; so many divided by `samples_per_prompt` prompts
    are drawn."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt. Where it is not given, the algorithm decides: 4 where it compares the responses to a
    prompt with each other (`dpo`, `rft`, and `advantage` = `rloo` or `grpo`), or else 1."""
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 128

    decoding: Literal["sample", "greedy"] = "sample"
    temperature: Temperature = 1.0
    top_p: PositiveFraction = 1.0
    top_k: NonNegativeInt = 0
    """Keep only so many of the likeliest tokens; 0 keeps all."""
    truncated_sampling: Literal["refuse", "allow"] = "refuse"
    """Training on top-p, top-k or greedy samples gives tokens of zero behaviour probability to the learner's policy;
    say `allow` to do it all the same. Evaluation samples in the same way."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_concurrent_sequences: PositiveInt = 128
    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of one worker (CPU backend)."""
    gpu_memory_fraction: PositiveFraction = 0.85
    """Share of each accelerator's memory that an engine may take (CUDA backend)."""
    enforce_eager: bool = True

    weight_transfer: Literal["object_store", "collective"] = "object_store"
    """How published weights travel: through Ray's object store, or by a broadcast from the learner's first rank to all
    ranks of all engines (gloo on a CPU, NCCL on CUDA). Whoever misses a broadcast loads from the object store. The NCCL
    branch has never run on a GPU (docs/adr/0006)."""
    publish: Literal["merged", "adapter"] = "merged"
    """What is sent of a policy that is trained with `models.policy.train.lora`: all its weights, the adapter added to
    them; or the adapter alone, which engines that hold the base (`policies/v000`) add to it with vLLM's LoRA support.
    The adapter is sent faster and sampled with more slowly (docs/adapters.md)."""
    logprob_gap_bound: NonNegativeFloat = 1e-3
    """Largest allowed gap, in nats, between the engine's and the learner's log-prob of the canary's tokens after a
    publish. bfloat16 needs about 0.1."""

    @model_validator(mode="after")
    def _workers_in_order(self) -> Self:
        if not self.min_workers <= self.workers <= (self.max_workers or self.workers):
            raise ValueError(
                f"rollout.min_workers = {self.min_workers}, rollout.workers = {self.workers} and rollout.max_workers = "
                f"{self.max_workers} must not fall"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _counts_responses(cls, values: Any) -> Any:
        # The nearest key would be taken for the same number, which is another where a prompt has several samples.
        if isinstance(values, dict) and "prompts_per_iteration" in values:
            raise ValueError(
                "prompts_per_iteration follows from others: set responses_per_iteration, which is prompts times "
                "samples_per_prompt"
            )
        return cast(object, values)

    @property
    def prompts_per_iteration(self) -> int:
        """Prompts that one iteration draws."""
        return self.responses_per_iteration // self.samples_per_prompt

    @property
    def truncates_distribution(self) -> bool:
        """Whether sampling gives some tokens probability zero."""
        return self.decoding == "greedy" or self.top_p < 1.0 or self.top_k > 0

    @model_validator(mode="after")
    def _truncation_is_meant(self) -> Self:
        if self.truncates_distribution and self.truncated_sampling == "refuse":
            raise ValueError(
                "top_p < 1, top_k > 0 and greedy decoding sample from a truncated distribution, so tokens that the "
                "learner's policy can produce have behaviour probability zero and importance ratios are biased; use "
                "temperature alone, or set rollout.truncated_sampling=allow"
            )
        return self
