"""The frozen reference policy: the log-probs of sampled tokens, by the definition that the learner uses."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from protocol.errors import UserError
from protocol.logprobs import logprobs_in_chunks
from protocol.messages import FloatArray, IntArray
from reward_service.batching import inverse_permutation, pad_right, plan_micro_batches

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ReferenceModel:
    """A causal language model that is read and never trained.

    Args:
        path: A Hugging Face directory or hub id with safetensors weights.
        temperature: The temperature at which the policy is sampled.
        dtype: What the trunk computes in; log-probs are float32 in any case.
        device: A torch device.
        micro_batch_tokens: Budget of one forward pass, padding included.

    Raises:
        UserError: If it cannot be loaded as a causal language model.
    """

    def __init__(
        self,
        path: str,
        *,
        temperature: float,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        micro_batch_tokens: int = 4096,
    ) -> None:
        self.path = path
        self._temperature = temperature
        self._budget_tokens = micro_batch_tokens
        self._device = torch.device(device)
        model = _load_language_model(path, dtype=_DTYPES[dtype])
        self._model: Any = model.to(self._device).eval().requires_grad_(False)

    def logprobs(self, prompts: Sequence[IntArray], responses: Sequence[IntArray]) -> tuple[FloatArray, ...]:
        """Compute the log-probs of response tokens under the reference.

            log softmax(logits(x, y_<t) / temperature)[y_t]

        Args:
            prompts: B arrays of prompt token ids.
            responses: B arrays of sampled token ids, EOS included where it was sampled.

        Returns:
            For each response [T] log-probs, float32.
        """
        sequences = [np.concatenate(pair).astype(np.int32) for pair in zip(prompts, responses, strict=True)]
        plan = plan_micro_batches([len(ids) for ids in sequences], budget_tokens=self._budget_tokens)
        results: list[FloatArray] = []
        for indices in plan:
            lengths = [(len(prompts[index]), len(responses[index])) for index in indices]
            results += self._forward([sequences[index] for index in indices], lengths)
        return tuple(results[place] for place in inverse_permutation(plan))

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[IntArray], lengths: Sequence[tuple[int, int]]) -> list[FloatArray]:
        """Run one micro-batch; `lengths` are (prompt, response) tokens of each sequence."""
        input_ids = torch.from_numpy(pad_right(sequences)).to(self._device)
        hidden = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        width = input_ids.shape[1]
        targets = torch.from_numpy(
            np.concatenate([row * width + np.arange(p, p + t) for row, (p, t) in enumerate(lengths)])
        ).to(self._device)
        # The token at a position is predicted one position before it; the head runs on those positions only.
        head: nn.Module = self._model.get_output_embeddings()
        flat = logprobs_in_chunks(
            hidden[targets - 1], head, input_ids.flatten()[targets], temperature=self._temperature
        )
        return np.split(flat.cpu().numpy(), np.cumsum([t for _, t in lengths])[:-1])


def _load_language_model(path: str, *, dtype: torch.dtype) -> Any:
    where = f"reference {path}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be loaded: {error}",
            where=where,
            cause="it is no directory or hub id of a language model with config.json and safetensors weights",
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:
        raise UserError(f"weights are missing: {', '.join(sorted(loading['missing_keys'])[:5])}", where=where)
    _check_head(model.eval(), where=where)
    return model


@torch.inference_mode()
def _check_head(model: Any, *, where: str) -> None:
    # Some architectures cap or scale their logits after the head; the head alone would be wrong without any sign.
    ids = torch.arange(4)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not torch.allclose(logits, ours, rtol=1e-2, atol=1e-3):
        raise UserError(
            f"the logits of {type(model).__name__} are not its head's output",
            where=where,
            cause="the architecture caps or scales its logits",
            next_step="use an architecture whose logits are linear in the last hidden state",
        )
