"""Scored batches and tiny networks for the learner's tests, made on the spot."""

import math

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.experiments.laboratory.rank import single_rank
from learner.models import PolicyModel, ScalarModel, init_head
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey, ScoredBatch, ScoredRollout

__all__ = ["VOCABULARY", "scored_batch", "single_rank", "tiny_config", "tiny_critic", "tiny_policy"]
VOCABULARY = 64


def tiny_config(*, hidden: int = 32, tied: bool = False) -> LlamaConfig:
    """Describe a Llama of two layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return config


def tiny_policy(*, seed: int = 0, hidden: int = 32, tied: bool = False) -> PolicyModel:
    """Build a policy with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolicyModel(LlamaForCausalLM(tiny_config(hidden=hidden, tied=tied)))


def tiny_critic(*, seed: int = 1, hidden: int = 32) -> ScalarModel:
    """Build a critic with random weights."""
    config = tiny_config(hidden=hidden)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForSequenceClassification(config)
    init_head(network.score, seed=seed)
    return ScalarModel(network)


def scored_batch(num: int = 12, *, seed: int = 0, iteration: int = 0, policy_version: int = 3) -> ScoredBatch:
    """Draw responses of many lengths with scores; behaviour and reference log-probs are near uniform."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for number in range(num):
        tokens = int(rng.integers(1, 24))
        prompt = rng.integers(2, VOCABULARY, size=rng.integers(1, 12)).astype(np.int32)
        noise = rng.normal(scale=0.3, size=(2, tokens)).astype(np.float32) - np.float32(math.log(VOCABULARY))
        rollout = Rollout(
            key=RolloutKey(1, iteration, f"p{number:04d}", 0),
            prompt=Prompt(prompt_id=f"p{number:04d}", token_ids=prompt, text=f"prompt {number}"),
            response_ids=rng.integers(2, VOCABULARY, size=tokens).astype(np.int32),
            behavior_logprobs=noise[0],
            finish_reason="length" if number % 3 == 0 else "stop",
            policy_versions=PolicyVersions(policy_version, policy_version),
            worker="rollout-0",
        )
        score = float(rng.normal())
        rollouts.append(ScoredRollout(rollout=rollout, score=score, components={"rm": score}, ref_logprobs=noise[1]))
    return ScoredBatch(round=1, iteration=iteration, policy_version=policy_version, rollouts=tuple(rollouts))
