"""Which networks a run starts from."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from configs.base import Location, PositiveFloat, PositiveInt, Section

_MIN_HEAD_SIZE = 32
_SCRATCH_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers in a block of a policy that is made from scratch."""


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


class LoraConfig(Section):
    """A low-rank adapter: W + (alpha / rank) B A, of which A and B are trained and W is frozen."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    target_modules: Annotated[tuple[Location, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that are adapted, such as `[q_proj, v_proj]`; without it, all in the blocks."""
    dropout: float = 0.0
    """Stays 0: with dropout the first ratio is not one, and a loss would depend on how its batch is cut up."""

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.dropout != 0:
            raise ValueError(
                f"dropout = {self.dropout:g} would make every log-prob a random number, and the ratio of an update's "
                "first step differ from one: nothing here is trained with dropout, leave it 0"
            )
        return self


class TrainedPartConfig(Section):
    """Which weights of a network are trained: all of them where nothing is said."""

    last_blocks: PositiveInt | None = None
    """Freeze the transformer blocks below the last so many; embeddings, final norm and head are trained."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter, and the head of a critic or reward model; everything else is frozen."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.last_blocks is not None and self.lora is not None:
            raise ValueError("give either last_blocks or lora")
        return self


class PolicyModelConfig(Section):
    """Where the policy comes from: a directory or hub id, or a new one."""

    path: Location | None = None
    """A Hugging Face directory or hub id with weights and tokenizer."""
    scratch: ScratchModelConfig | None = None
    train: TrainedPartConfig = TrainedPartConfig()
    """What reinforcement learning trains; supervised fine-tuning trains all of it."""

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
    train: TrainedPartConfig = TrainedPartConfig()


class CriticModelConfig(Section):
    """Where the critic starts; it is always a network of its own."""

    init: Location = "reward"
    """`reward` (this round's reward model), `policy` (its trunk with a new head), or a directory or hub id."""
    train: TrainedPartConfig = TrainedPartConfig()


class ModelsConfig(Section):
    """The networks of a run."""

    policy: PolicyModelConfig
    reward: RewardModelConfig = RewardModelConfig()
    critic: CriticModelConfig = CriticModelConfig()
    reference: Location = "sft"
    """The frozen reference of the KL penalty: the supervised policy, or a directory or hub id."""

    @model_validator(mode="after")
    def _scratch_has_what_is_trained(self) -> Self:
        scratch = self.policy.scratch
        if scratch is None:
            return self
        trained = {"policy": self.policy.train}
        reward_is_ours = self.reward.init == "sft"
        if reward_is_ours:
            trained["reward"] = self.reward.train
        if self.critic.init == "policy" or (self.critic.init == "reward" and reward_is_ours):
            trained["critic"] = self.critic.train
        for name, train in trained.items():
            if train.last_blocks is not None and train.last_blocks > scratch.num_layers:
                raise ValueError(
                    f"models.{name}.train.last_blocks = {train.last_blocks} is more than the "
                    f"{scratch.num_layers} blocks of models.policy.scratch.num_layers"
                )
            wanted = (train.lora and train.lora.target_modules) or ()
            unknown = [module for module in wanted if module not in _SCRATCH_MODULES]
            if unknown:
                raise ValueError(
                    f"models.{name}.train.lora.target_modules: {', '.join(unknown)} matches no linear layer of a "
                    f"policy from scratch, whose blocks have {', '.join(_SCRATCH_MODULES)}"
                )
        return self
