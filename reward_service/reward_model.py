"""A reward model: one calibrated number for a prompt and a response, read at the last token."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from protocol.errors import UserError
from protocol.messages import FloatArray, IntArray
from reward_service.batching import inverse_permutation, pad_right, plan_micro_batches
from reward_service.scoring import Calibration

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RewardModel:
    """A sequence classifier with one label over the policy's tokens.

    Args:
        path: A Hugging Face directory or hub id with safetensors weights.
        dtype: What the trunk computes in; scores are float32 in any case.
        device: A torch device.
        micro_batch_tokens: Budget of one forward pass, padding included.

    Raises:
        UserError: If it cannot be loaded, or is not a sequence classifier with one label.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        micro_batch_tokens: int = 4096,
    ) -> None:
        self.path = path
        self._budget_tokens = micro_batch_tokens
        self._device = torch.device(device)
        model = _load_classifier(path, dtype=_DTYPES[dtype])
        self._model: Any = model.to(self._device).eval().requires_grad_(False)
        self.calibration = stored_calibration(self._model.config, path=path)

    def raw_scores(self, sequences: Sequence[IntArray]) -> FloatArray:
        """Score sequences without calibration.

            s = w . h_last

        Args:
            sequences: B arrays of token ids, prompt and response, EOS included where it was sampled.

        Returns:
            [B] raw scores, float32.
        """
        plan = plan_micro_batches([len(ids) for ids in sequences], budget_tokens=self._budget_tokens)
        parts = [self._forward([sequences[index] for index in indices]) for indices in plan]
        return np.concatenate(parts)[inverse_permutation(plan)] if parts else np.empty(0, np.float32)

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[IntArray]) -> FloatArray:
        input_ids = torch.from_numpy(pad_right(sequences)).to(self._device)
        hidden = self._model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        last = torch.tensor([len(ids) - 1 for ids in sequences], device=self._device)
        rows = torch.arange(len(sequences), device=self._device)
        return self._model.score(hidden[rows, last]).float().squeeze(-1).cpu().numpy()


def stored_calibration(config: PreTrainedConfig, *, path: str) -> Calibration | None:
    """Read the calibration constants of a reward model from its config.json.

    Args:
        config: The model's configuration.
        path: Where it is from, for the error.

    Returns:
        Gain and bias, or None if the model has not been calibrated.

    Raises:
        UserError: If there are constants, but not usable ones.
    """
    stored = getattr(config, "rondo_calibration", None)
    if stored is None:
        return None
    gain, bias = stored.get("gain"), stored.get("bias")
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in (gain, bias)) or gain <= 0:
        raise UserError(
            f"rondo_calibration holds gain {gain} and bias {bias}",
            where=f"{path}/config.json",
            next_step="remove rondo_calibration, so that the model is calibrated again",
        )
    return Calibration(gain=float(gain), bias=float(bias))


def _load_classifier(path: str, *, dtype: torch.dtype) -> Any:
    where = f"reward model {path}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _check_is_reward_model(config, where=where)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the model cannot be loaded: {error}",
            where=where,
            cause="it is no directory or hub id of a model with config.json and safetensors weights",
        ) from error
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers fills these with random numbers and only warns.
        raise UserError(f"weights are missing: {', '.join(sorted(loading['missing_keys'])[:5])}", where=where)
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(
            f"{type(model).__name__} has no `score` head",
            where=where,
            cause="only decoder-only (causal) classifiers can read a response at its last token",
        )
    return model


def _check_is_reward_model(config: PreTrainedConfig, *, where: str) -> None:
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"its architecture is {', '.join(architectures) or 'unknown'}, not a sequence classifier",
            where=where,
            cause="a language model was named where a reward model is needed",
        )
    if config.num_labels != 1:
        raise UserError(f"it has {config.num_labels} labels; a reward model has one", where=where)
