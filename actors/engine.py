"""The vLLM engine of one rollout worker, in its own process.

What is chosen here, and why:

- Nothing depends on timing or on other requests: every request has its own seed, prefix caching is off on a CPU (a hit
  would depend on what was sampled before), scheduling is synchronous. Requests are added in the order given.
- No prompt is split over steps on a CPU: vLLM cannot rewind a seeded CPU generator after a partial prompt and dies.
- Log-probs are of the processed distribution, the one that was sampled.
- The model's own `generation_config.json` is not read: nothing changes the sampling but the run's configuration.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast, get_args

from vllm.config import VllmConfig, WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from actors import weight_receiver
from actors.environment import Backend, environment
from actors.errors import EngineFailedError
from actors.sampling import EngineOutput, SamplingPlan, check_requests, context_tokens, plan_sampling, to_rollout
from configs.models import LoraConfig
from configs.rollout import RolloutConfig
from protocol.messages import Rollout, RolloutRequest
from protocol.weights import ByteArray, Rendezvous, WeightManifest

_GIB = 2**30
# Prompt tokens that one step may take in on a CPU; a longer context raises it.
_STEP_TOKENS = 4096
# vLLM wants a path; nothing lies there, so an adapter that is not in memory is an error.
_ADAPTER = LoRARequest("adapter", weight_receiver.ADAPTER_ID, "/in/memory/only")


class VLLMEngine:
    """A policy that samples responses, and whose weights can be replaced and proved."""

    def __init__(
        self, model_path: str, config: RolloutConfig, *, backend: Backend = "cpu", adapter: LoraConfig | None = None
    ) -> None:
        """Load a policy.

        Args:
            model_path: A Hugging Face directory or hub id, with its tokenizer.
            config: Sampling, sizes and threads.
            backend: Where to compute.
            adapter: What `load` brings, with the names of its layers: an adapter of this shape, for the policy that is
                loaded here and stays. None: it brings all weights.

        Raises:
            RuntimeError: If the process was started without `environment(config, backend)`.
            ValueError: If the tokenizer has no EOS token.
        """
        _check_environment(config, backend)
        self._config = config
        self._engine = _build(model_path, config, backend, adapter)
        self._takes_adapters = adapter is not None
        self._adapter: LoRARequest | None = None
        """What requests are sampled with; None as long as that is the policy which was loaded at the start."""
        self._num_added = 0
        self._failed = False
        self.steps = 0
        """Steps made since the engine was built."""
        eos = self._engine.get_tokenizer().eos_token_id
        if not isinstance(eos, int):
            raise ValueError(f"the tokenizer of {model_path} has no EOS token, so no response could end")
        self.eos_token_id: int = eos
        # What vLLM's kernels cannot compute (heads of 16 dimensions on a CPU, say) shows in the first step only.
        self.canary_logprobs([eos, eos])

    def generate(
        self, requests: Sequence[RolloutRequest], *, policy_version: int, worker: str
    ) -> Iterator[tuple[Rollout, ...]]:
        """Yield rollouts the moment they are finished: those of one step together.

        Args:
            requests: In key order; each has its own seed, so its tokens do not depend on the others.
            policy_version: The version that the caller has proved.
            worker: The name to sign with.

        Yields:
            The rollouts, in the order in which they finish.

        Raises:
            ValueError: If a request does not fit, before anything is sampled.
            InvalidRolloutError: If the engine returned something that must not be trained on.
            EngineFailedError: If the engine failed.
        """
        check_requests(self._config, requests)
        pending: dict[str, RolloutRequest] = {}
        try:
            for request in requests:
                plan = plan_sampling(self._config, request, eos_token_id=self.eos_token_id)
                pending[self._add(request.prompt.token_ids.tolist(), _sampling_params(plan))] = request
            while pending:
                finished = tuple(
                    to_rollout(
                        pending.pop(request_id),
                        _engine_output(output.outputs[0]),
                        eos_token_id=self.eos_token_id,
                        policy_version=policy_version,
                        worker=worker,
                    )
                    for request_id, output in self._step()
                )
                if finished:
                    yield finished
        finally:
            # Somebody may have stopped listening; what is left must not be in the next batch's steps.
            if pending and not self._failed:
                self._engine.abort_request(list(pending))

    def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Compute the log-probs, at temperature 1, of the tokens after the first given those before them.

        Raises:
            RuntimeError: If responses are being sampled.
            EngineFailedError: If the engine failed.
        """
        if self._engine.has_unfinished_requests():
            raise RuntimeError("the canary would swallow the responses that are being sampled")
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._add(list(token_ids), params)
        while True:
            for _, output in self._step():
                return list(cast(FlatLogprobs, output.prompt_logprobs).logprobs)

    def load(self, manifest: WeightManifest, fetch: Callable[[int], ByteArray]) -> None:
        """Replace the weights, one bucket at a time.

        After an error the engine can be loaded again, but holds weights of no version until then.

        Args:
            manifest: What to load.
            fetch: Returns the bytes of bucket i. No bucket is kept while the next one is fetched.

        Raises:
            WeightMismatchError: If a bucket's bytes are not those that were published.
        """
        self._replace(manifest, fetch)

    def receive(
        self, manifest: WeightManifest, rendezvous: Rendezvous, *, first_receiver: int, address: str, timeout_s: float
    ) -> None:
        """Replace the weights by a broadcast that every rank of this engine joins.

        After an error the engine can be loaded again, but holds weights of no version until then.

        Args:
            manifest: What comes.
            rendezvous: Where to join.
            first_receiver: The number of this engine's first rank among all receivers.
            address: Of this node.
            timeout_s: How long the broadcast may take.

        Raises:
            BroadcastError: If it did not reach this engine.
            WeightMismatchError: If a bucket's bytes are not those that were published.
        """
        invitation = {
            "rendezvous": rendezvous,
            "first_receiver": first_receiver,
            "address": address,
            "timeout_s": timeout_s,
        }
        try:
            self._engine.collective_rpc("init_weight_transfer_engine", args=(invitation,))
            self._replace(manifest, lambda bucket: None)
        finally:
            self._engine.collective_rpc("shutdown_weight_transfer_engine")

    def _replace(self, manifest: WeightManifest, fetch: Callable[[int], ByteArray | None]) -> None:
        if self._takes_adapters:
            self._adapter = _ADAPTER  # also after an error: without it nothing can be sampled then
        self._engine.collective_rpc("start_weight_update")
        try:
            for bucket, num_bytes in enumerate(manifest.bucket_bytes):
                update = {
                    "slots": [slot for slot in manifest.slots if slot.bucket == bucket],
                    "digest": manifest.bucket_digests[bucket],
                    "num_bytes": num_bytes,
                    "buffer": fetch(bucket),
                }
                self._engine.collective_rpc("update_weights", args=(update,))
            self._engine.collective_rpc("finish_weight_update")
            if self._takes_adapters:
                self._engine.collective_rpc(weight_receiver.put_on_adapter)
        except BaseException:
            self._engine.collective_rpc(weight_receiver.abandon_update)
            raise
        self._engine.reset_prefix_cache()

    def checksum(self) -> int:
        """Sum the bit patterns of the parameters and the adapter that are computed with, each storage once."""
        return sum(self._engine.collective_rpc(weight_receiver.parameter_checksum)) % 2**64

    def _add(self, token_ids: list[int], params: SamplingParams) -> str:
        self._num_added += 1
        request_id = str(self._num_added)
        self._engine.add_request(request_id, tokens_input(token_ids), params, lora_request=self._adapter)
        return request_id

    def _step(self) -> list[tuple[str, RequestOutput]]:
        try:
            outputs = self._engine.step()
            self.steps += 1
        except Exception as error:
            # In process, vLLM raises what broke rather than EngineDeadError; either way its state is lost.
            self._failed = True
            raise EngineFailedError(f"vLLM failed in a step: {type(error).__name__}: {error}") from error
        return [(output.request_id, output) for output in outputs if isinstance(output, RequestOutput)]


def _check_environment(config: RolloutConfig, backend: Backend) -> None:
    wanted = environment(config, backend)
    wrong = sorted(name for name, value in wanted.items() if os.environ.get(name) != value)
    if wrong:
        raise RuntimeError(f"start this process with actors.environment.environment(...); not set: {', '.join(wrong)}")
    # It would override the configured size, and it counts whole GiB only.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def _build(model_path: str, config: RolloutConfig, backend: Backend, adapter: LoraConfig | None) -> LLMEngine:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        args = _engine_args(model_path, config, backend, {} if adapter is None else _adapter_args(adapter))
        vllm_config = args.create_engine_config()
        if backend == "cpu":
            vllm_config.cache_config.kv_cache_memory_bytes = _cache_bytes(vllm_config, config)
        return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)


def _cache_bytes(vllm_config: VllmConfig, config: RolloutConfig) -> int:
    """Bound the KV cache by what can ever be in use: vLLM touches all of it at once, so it counts as resident."""
    model, block = vllm_config.model_config, vllm_config.cache_config.block_size
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    layers = model.get_num_layers(vllm_config.parallel_config)
    token_bytes = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
    # vLLM keeps one block for itself.
    blocks = config.max_concurrent_sequences * math.ceil(context_tokens(config) / block) + 1
    return min(int(config.kv_cache_gib * _GIB), blocks * block * token_bytes)


def _engine_args(model_path: str, config: RolloutConfig, backend: Backend, adapter_args: dict[str, Any]) -> EngineArgs:
    context = context_tokens(config)
    transfer = weight_receiver.BUCKETS
    return EngineArgs(
        model=model_path,
        dtype=config.dtype,
        seed=0,
        max_model_len=context,
        max_num_seqs=config.max_concurrent_sequences,
        enforce_eager=config.enforce_eager or backend == "cpu",
        tensor_parallel_size=config.tensor_parallel,
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        async_scheduling=False,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        worker_extension_cls=f"{weight_receiver.__name__}.{weight_receiver.WorkerExtension.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=transfer),
        use_tqdm_on_load=False,
        **(_cpu_args(context) if backend == "cpu" else _cuda_args(config)),
        **adapter_args,
    )


def _adapter_args(adapter: LoraConfig) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_loras": 1,
        # vLLM knows some ranks only, and fills a smaller one up with zeros.
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= adapter.rank),
        # Without names it would adapt the head as well, and compute the canary's prompt wrongly.
        "lora_target_modules": list(adapter.target_modules or ()),
    }


def _cpu_args(context: int) -> dict[str, Any]:
    return {
        "quantization": weight_receiver.VISIBLE_WEIGHTS,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_STEP_TOKENS, context),
    }


def _cuda_args(config: RolloutConfig) -> dict[str, Any]:
    return {"gpu_memory_utilization": config.gpu_memory_fraction, "enable_prefix_caching": True}


def _sampling_params(plan: SamplingPlan) -> SamplingParams:
    return SamplingParams(
        temperature=plan.temperature,
        top_p=plan.top_p,
        top_k=plan.top_k,
        seed=plan.seed,
        max_tokens=plan.max_tokens,
        stop_token_ids=list(plan.stop_token_ids),
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _engine_output(output: CompletionOutput) -> EngineOutput:
    return EngineOutput(
        token_ids=list(output.token_ids),
        # With logprobs=0 there is one entry a position: the sampled token's.
        logprobs=cast(FlatLogprobs, output.logprobs).logprobs,
        finish_reason=output.finish_reason,
    )
