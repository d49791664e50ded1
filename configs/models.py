"""Which networks a run starts from."""

from typing import Self

from pydantic import model_validator

from configs.base import Location, PositiveInt, Section

_MIN_HEAD_SIZE = 32


class ScratchModelConfig(Section):
    """A Llama-shaped policy initialised at random, with a tokenizer trained on the demonstrations."""

    vocab_size: PositiveInt = 512
    hidden_size: PositiveInt = 128
    mlp_size: PositiveInt = 344
    num_layers: PositiveInt = 3
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    context_tokens: PositiveInt = 256
    tie_embeddings: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must divide hidden_size, and num_kv_heads must divide num_heads")
        if self.hidden_size // self.num_heads < _MIN_HEAD_SIZE:
            raise ValueError(
                f"hidden_size / num_heads = {self.hidden_size // self.num_heads}: the engine's CPU attention needs "
                f"heads of {_MIN_HEAD_SIZE} or more"
            )
        return self


class PolicyModelConfig(Section):
    """Where the policy comes from: a directory or hub id, or a new one."""

    path: Location | None = None
    """A Hugging Face directory or hub id with weights and tokenizer."""
    scratch: ScratchModelConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give either models.policy.path or models.policy.scratch")
        return self


class RewardModelConfig(Section):
    """Where the reward model comes from."""

    init: Location = "sft"
    """What training starts from: `sft` (the supervised policy's trunk), or a directory or hub id. `none`: no reward
    model is trained; name finished ones under `scoring.rewards`."""


class CriticModelConfig(Section):
    """Where the critic starts; it is always a network of its own."""

    init: Location = "reward"
    """`reward` (this round's reward model), `policy` (its trunk with a new head), or a directory or hub id."""


class ModelsConfig(Section):
    """The networks of a run."""

    policy: PolicyModelConfig
    reward: RewardModelConfig = RewardModelConfig()
    critic: CriticModelConfig = CriticModelConfig()
    reference: Location = "sft"
    """The frozen reference of the KL penalty: the supervised policy, or a directory or hub id."""
