"""The laboratory's networks: small Llamas, their files, and the real training engine on one rank."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.experiments.laboratory.language import EOS, MAX_TOKENS, PAD, PROMPT_TOKENS, VOCABULARY
from benchmarks.experiments.laboratory.rank import single_rank
from configs.learner import LearnerConfig, OptimizerConfig
from learner.engine import DeepSpeedEngine
from learner.experience import PassSettings
from learner.models import PolicyModel, ScalarModel, init_head

POLICY_WIDTH = 64
PASSES = PassSettings(temperature=1.0, token_budget=8192, layout="sorted", pad_id=PAD)
LEARNER = LearnerConfig(micro_batch_tokens=PASSES.token_budget, packing="sorted")


def llama(width: int) -> LlamaConfig:
    """Describe a Llama of two layers with four heads (two where it is narrower than 16)."""
    heads = 4 if width >= 16 else 2
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=PROMPT_TOKENS + MAX_TOKENS,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    config._attn_implementation = "sdpa"
    return config


def new_policy(width: int, *, seed: int) -> PolicyModel:
    """Build a policy with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolicyModel(LlamaForCausalLM(llama(width)))


def scalar_on(policy: PolicyModel, *, seed: int) -> ScalarModel:
    """Put a new score head on a copy of a policy's trunk."""
    network = LlamaForSequenceClassification(policy.network.config)
    network.model.load_state_dict(policy.network.model.state_dict())
    init_head(network.score, seed=seed)
    return ScalarModel(network)


def copy_of(policy: PolicyModel) -> PolicyModel:
    """Copy a policy."""
    network = LlamaForCausalLM(policy.network.config)
    network.load_state_dict(policy.network.state_dict())
    return PolicyModel(network)


def save(network: PolicyModel | ScalarModel, path: Path) -> None:
    """Write a network's weights; the file is there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in network.network.state_dict().items()}, draft)
    draft.replace(path)


def load_policy(path: Path, *, width: int) -> PolicyModel:
    """Read a policy that `save` wrote."""
    policy = new_policy(width, seed=0)
    policy.network.load_state_dict(load_file(path))
    return policy


def load_scalar(path: Path, *, width: int) -> ScalarModel:
    """Read a scalar model that `save` wrote."""
    network = LlamaForSequenceClassification(llama(width))
    network.load_state_dict(load_file(path))
    return ScalarModel(network)


def engine(
    network: PolicyModel | ScalarModel, *, learning_rate: float, name: str, total_steps: int | None = None
) -> DeepSpeedEngine:
    """Put a network under the real engine; with a length, the learning rate falls to a tenth along a cosine."""
    schedule = "constant" if total_steps is None else "cosine"
    optimizer = OptimizerConfig(learning_rate=learning_rate, schedule=schedule)
    return DeepSpeedEngine(
        network, optimizer=optimizer, settings=LEARNER, context=single_rank(), name=name, total_steps=total_steps
    )
