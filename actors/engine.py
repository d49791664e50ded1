"""The vLLM engine of one rollout worker, in its own process.

What is chosen here, and why:

- Nothing depends on timing or on other requests: every request has its own seed, prefix caching is off on a CPU (a hit
  would depend on what was sampled before), scheduling is synchronous. Requests are added in the order given.
- No prompt is split over steps on a CPU: vLLM cannot rewind a seeded CPU generator after a partial prompt and dies.
- Log-probs are of the processed distribution, the one that was sampled.
- The model's own `generation_config.json` is not read: nothing changes the sampling but the run's configuration.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.config import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from actors import weight_receiver
from actors.environment import Backend, environment
from actors.errors import EngineFailedError
from actors.sampling import EngineOutput, SamplingPlan, check_requests, context_tokens, plan_sampling, to_rollout
from configs.rollout import RolloutConfig
from protocol.messages import Rollout, RolloutRequest
from protocol.weights import ByteArray, WeightManifest

_GIB = 2**30
# Prompt tokens that one step may take in on a CPU; a longer context raises it.
_STEP_TOKENS = 4096


class VLLMEngine:
    """A policy that samples responses, and whose weights can be replaced and proved."""

    def __init__(self, model_path: str, config: RolloutConfig, *, backend: Backend = "cpu") -> None:
        """Load a policy.

        Args:
            model_path: A Hugging Face directory or hub id, with its tokenizer.
            config: Sampling, sizes and threads.
            backend: Where to compute.

        Raises:
            RuntimeError: If the process was started without `environment(config, backend)`.
            ValueError: If the tokenizer has no EOS token.
        """
        _check_environment(config, backend)
        weight_receiver.register()
        self._config = config
        self._engine = LLMEngine.from_engine_args(_engine_args(model_path, config, backend))
        eos = self._engine.get_tokenizer().eos_token_id
        if not isinstance(eos, int):
            raise ValueError(f"the tokenizer of {model_path} has no EOS token, so no response could end")
        self.eos_token_id: int = eos

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int, worker: str) -> Iterator[Rollout]:
        """Yield each rollout the moment it is finished.

        Args:
            requests: In key order; each has its own seed, so its tokens do not depend on the others.
            policy_version: The version that the caller has proved.
            worker: The name to sign with.

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
                for internal_id, output in self._step():
                    yield to_rollout(
                        pending.pop(internal_id),
                        _engine_output(output),
                        eos_token_id=self.eos_token_id,
                        policy_version=policy_version,
                        worker=worker,
                    )
        finally:
            # Somebody may have stopped listening; what is left must not be in the next batch's steps.
            self._engine.abort_request(list(pending), internal=True)

    def canary_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Compute the log-probs, at temperature 1, of the tokens after the first given those before them."""
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
            for _, output in self._step_outputs():
                assert isinstance(output.prompt_logprobs, FlatLogprobs)
                return list(output.prompt_logprobs.logprobs)

    def checksum(self) -> int:
        """Sum the bit patterns of the parameters that are computed with, each storage once."""
        return sum(self._engine.collective_rpc(weight_receiver.parameter_checksum)) % 2**64
