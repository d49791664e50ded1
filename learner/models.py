"""The networks that are trained: a policy, and a scalar model that serves as critic and as reward model.

Both run the trunk over whole rows, and the head only where a number is wanted. Dropout is off in both.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from configs.models import ScratchModelConfig
from learner.batch import Layout
from protocol.errors import UserError
from protocol.logprobs import logprobs_and_entropy, logprobs_in_chunks

Precision = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainedModel(nn.Module):
    """What policy and scalar model have in common: a Hugging Face network, whose trunk and head run apart."""

    def __init__(self, network: PreTrainedModel, head: Any) -> None:
        super().__init__()
        # Typed as Any: what a network's attributes are depends on its architecture.
        self.network: Any = network
        # In a tuple, so that the head is registered once, inside the network.
        self._head = (head,)

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits or scores."""
        return self._head[0]

    @property
    def layout(self) -> Layout:
        """The layout that suits this network's attention: packed where attention takes variable lengths."""
        return "packed" if "flash" in (self.network.config._attn_implementation or "") else "sorted"

    def hidden(self, input_ids: Tensor, position_ids: Tensor, index: Tensor) -> Tensor:
        """Run the trunk and pick positions.

        Args:
            input_ids: [R, L] token ids.
            position_ids: [R, L] positions, starting from zero where a sequence begins.
            index: [N] flat positions.

        Returns:
            [N, D] final hidden states.
        """
        # Called through `base_model` and not through the network, so that no logits of other rows are computed.
        output = self.network.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        states = output.last_hidden_state
        return states.reshape(-1, states.shape[-1]).index_select(0, index)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the layers' inputs for the backward pass and compute the rest again."""
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class PolicyModel(TrainedModel):
    """A causal language model that gives the log-probs of chosen tokens."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__(network, network.get_output_embeddings())

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        predict_index: Tensor,
        target_ids: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the log-probs of tokens.

        Args:
            input_ids: [R, L] token ids.
            position_ids: [R, L] positions.
            predict_index: [N] flat positions whose next tokens are asked for.
            target_ids: [N] these next tokens.
            temperature: The sampling temperature.
            with_entropy: Compute the entropies too.

        Returns:
            [N] log-probs in fp32, and [N] entropies in nats or None.
        """
        hidden = self.hidden(input_ids, position_ids, predict_index)
        if with_entropy:
            return logprobs_and_entropy(hidden, self.head, target_ids, temperature=temperature)
        return logprobs_in_chunks(hidden, self.head, target_ids, temperature=temperature), None


class ScalarModel(TrainedModel):
    """A network that gives one number a position: critic (at every state) and reward model (at the end).

    Args:
        network: With a linear head `score` of one output.
        offset: What is added to the head's output. Heads have no bias of their own.
    """

    def __init__(self, network: PreTrainedModel, *, offset: float = 0.0) -> None:
        super().__init__(network, network.score)
        self.offset = offset

    def forward(self, input_ids: Tensor, position_ids: Tensor, select_index: Tensor) -> Tensor:
        """Compute scores.

        Args:
            input_ids: [R, L] token ids.
            position_ids: [R, L] positions.
            select_index: [N] flat positions.

        Returns:
            [N] scores, fp32.
        """
        return self.head(self.hidden(input_ids, position_ids, select_index)).squeeze(-1).float() + self.offset


def new_policy(scratch: ScratchModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PolicyModel:
    """Build a Llama-shaped policy with random weights.

    Args:
        scratch: Its sizes.
        tokenizer: Gives the special tokens' ids; its vocabulary must fit.
        seed: Of the weights.

    Returns:
        The policy, fp32.

    Raises:
        UserError: If the tokenizer has more tokens than the model.
    """
    if len(tokenizer) > scratch.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's {scratch.vocab_size}",
            where="models.policy.scratch.vocab_size",
            next_step="raise models.policy.scratch.vocab_size",
        )
    special: Any = tokenizer
    config = LlamaConfig(
        vocab_size=scratch.vocab_size,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.mlp_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_heads,
        num_key_value_heads=scratch.num_kv_heads,
        max_position_embeddings=scratch.context_tokens,
        tie_word_embeddings=scratch.tie_embeddings,
        bos_token_id=special.bos_token_id,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolicyModel(LlamaForCausalLM(config))


def load_policy(path: str | Path, *, precision: Precision) -> PolicyModel:
    """Load a policy.

    Args:
        path: A Hugging Face directory or hub id.
        precision: Of its parameters.

    Returns:
        The policy.

    Raises:
        UserError: If there is no such model, or if its logits are not its head's output (soft-capped or scaled).
    """
    network = AutoModelForCausalLM.from_pretrained(str(path), **_load_options(path, precision))
    policy = PolicyModel(network)
    _check_head(policy, path)
    return policy


def load_scalar(path: str | Path, *, precision: Precision) -> ScalarModel:
    """Load a reward model or a critic.

    Args:
        path: A Hugging Face directory or hub id of a sequence classifier with one label.
        precision: Of its parameters.

    Returns:
        The scalar model.

    Raises:
        UserError: If there is no such model, or if it has no head of one label.
    """
    network, info = AutoModelForSequenceClassification.from_pretrained(
        str(path), output_loading_info=True, **_load_options(path, precision, num_labels=1)
    )
    _check_score(network, path)
    if any(name.startswith("score.") for name in info["missing_keys"]):
        raise UserError(
            "the model has no score head",
            where=str(path),
            cause="it is a language model, not a reward model",
            next_step="name a sequence classifier with one label, or start from the policy",
        )
    return ScalarModel(network)


@torch.no_grad()
def load_critic(path: str | Path, *, precision: Precision) -> ScalarModel:
    """Load a reward model as a critic, which gives values in units of the calibrated score.

        value = gain * raw score + bias

    Args:
        path: A Hugging Face directory or hub id; without a stored calibration, gain is 1 and bias 0.
        precision: Of its parameters.

    Returns:
        The critic.

    Raises:
        UserError: As `load_scalar` does.
    """
    critic = load_scalar(path, precision=precision)
    calibration = getattr(critic.network.config, "rondo_calibration", None) or {"gain": 1.0, "bias": 0.0}
    for parameter in critic.network.score.parameters():
        parameter.mul_(calibration["gain"])
    critic.offset = calibration["bias"]
    return critic


def scalar_from_policy(path: str | Path, *, seed: int, precision: Precision = "fp32") -> ScalarModel:
    """Put a new score head on a policy's trunk (or on another scalar model's).

        head ~ N(0, 1 / sqrt(d + 1))

    Source: openai/lm-human-preferences, rewards.py (the reward model's head).

    Args:
        path: A Hugging Face directory or hub id.
        seed: Of the head.
        precision: Of the parameters.

    Returns:
        The scalar model.

    Raises:
        UserError: If there is no such model, or if its architecture has no sequence classifier with a `score` head.
    """
    network = AutoModelForSequenceClassification.from_pretrained(
        str(path), **_load_options(path, precision, num_labels=1)
    )
    _check_score(network, path)
    init_head(network.score, seed=seed)
    return ScalarModel(network)


@torch.no_grad()
def init_head(head: nn.Linear, *, seed: int) -> None:
    """Draw a score head's weights, the same for the same seed.

    Args:
        head: [d] -> [1]; changed in place.
        seed: Of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.zero_()


def _load_options(path: str | Path, precision: Precision, *, num_labels: int | None = None) -> dict[str, Any]:
    _check_directory(Path(path))
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    if num_labels is not None:
        config.num_labels = num_labels
    # Dropout would make the first ratio differ from one, and every log-prob a random number.
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    flash = torch.cuda.is_available() and precision == "bf16" and is_flash_attn_2_available()
    return {
        "config": config,
        "dtype": _DTYPES[precision],
        "attn_implementation": "flash_attention_2" if flash else "sdpa",
        # Never a pickle, and never code from the hub.
        "use_safetensors": True,
        "trust_remote_code": False,
    }


def _check_directory(path: Path) -> None:
    local = path.is_absolute() or len(path.parts) > 2 or path.exists()
    if not local:
        return  # a hub id, such as `meta-llama/Llama-3.2-1B`
    if not path.is_dir():
        raise UserError("no such model directory", where=str(path), next_step="check the path in the config")
    for pattern, meaning in (("config.json", "a config.json"), ("*.safetensors", "weights (*.safetensors)")):
        if not any(path.glob(pattern)):
            raise UserError(
                f"the model directory has no {meaning.removeprefix('a ')}",
                where=str(path),
                cause="the directory is not a Hugging Face model, or its export was interrupted",
                next_step=f"name a directory with {meaning}",
            )


def _check_score(network: PreTrainedModel, path: str | Path) -> None:
    head = getattr(network, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise UserError(
            f"{type(network).__name__} has no linear `score` head with one output",
            where=str(path),
            next_step="use a decoder-only architecture (Llama, Qwen, Mistral, ...) with one label",
        )


@torch.no_grad()
def _check_head(policy: PolicyModel, path: str | Path) -> None:
    # Some architectures cap or scale the logits after the head; leaving that out would be wrong without any sign.
    ids = torch.arange(4, device=policy.network.device)[None]
    logits = policy.network(input_ids=ids, use_cache=False).logits[0].float()
    ours = policy.head(policy.hidden(ids, ids, ids[0])).float()
    if not torch.allclose(logits, ours, rtol=1e-2, atol=1e-3):
        raise UserError(
            f"the logits of {type(policy.network).__name__} are not its head's output",
            where=str(path),
            cause="the architecture caps or scales its logits",
            next_step="use an architecture whose logits are linear in the last hidden state",
        )
