"""Tiny random models and tokenizers, made on the spot: nothing is downloaded."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from protocol.weights import (
    ByteArray,
    Canary,
    TensorSpec,
    WeightManifest,
    bucket_sizes,
    checksum,
    digest,
    plan_buckets,
)

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD_ID, END_ID, USER_ID, ASSISTANT_ID = range(4)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "write a short story about a lighthouse keeper who finds a letter",
    "what is the name of the largest river in the north of the country?",
    "please explain in simple words why the sky is blue and the sea is green",
    "numbers: 0 1 2 3 4 5 6 7 8 9, and some punctuation; (like this)!",
]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(*, vocab: int = 512) -> PreTrainedTokenizerFast:
    """Train a small byte-level BPE tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_llama(
    directory: Path, *, tied: bool = False, seed: int = 0, hidden: int = 64, layers: int = 2, vocab: int = 512
) -> Path:
    """Write a random Llama and its tokenizer as a Hugging Face directory, in fp32.

    Weights are drawn with a standard deviation of 0.1 rather than 0.02, so that the next-token distributions are far
    from uniform and a wrong weight shows. Heads have 32 dimensions: vLLM's CPU attention knows none smaller.
    """
    heads = hidden // 32
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=max(16, hidden * 43 // 16),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    torch.random.set_rng_state(state)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tiny_tokenizer(vocab=vocab).save_pretrained(directory)
    return directory


def tiny_publication(
    model: LlamaForCausalLM, *, policy_version: int, bucket_bytes: int = 100_000, dtype: torch.dtype = torch.float32
) -> tuple[WeightManifest, list[ByteArray]]:
    """Publish a model as the learner does: parameters once each, in buckets, with a manifest and a canary."""
    tensors = {name: parameter.detach().to(dtype).contiguous() for name, parameter in model.named_parameters()}
    specs = [
        TensorSpec(name=name, shape=tuple(t.shape), dtype=str(dtype).removeprefix("torch."), itemsize=dtype.itemsize)
        for name, t in tensors.items()
    ]
    slots = plan_buckets(specs, bucket_bytes=bucket_bytes)
    buckets = [np.zeros(size, dtype=np.uint8) for size in bucket_sizes(slots)]
    for slot in slots:
        flat = tensors[slot.spec.name].reshape(-1).view(torch.uint8).numpy()
        buckets[slot.bucket][slot.offset : slot.offset + slot.spec.num_bytes] = flat
    canary = tuple(range(5, 37))
    manifest = WeightManifest(
        policy_version=policy_version,
        slots=slots,
        bucket_bytes=tuple(len(bucket) for bucket in buckets),
        bucket_digests=tuple(digest(bucket) for bucket in buckets),
        loaded_checksum=checksum((t.reshape(-1).view(torch.uint8).numpy(), dtype.itemsize) for t in tensors.values()),
        canary=Canary(token_ids=canary, logprobs=tuple(token_logprobs(model, canary)[1:])),
    )
    return manifest, buckets


@torch.no_grad()
def token_logprobs(model: LlamaForCausalLM, token_ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
    """Compute the log-prob of each token given those before it; the first one's is NaN."""
    logits = model(torch.tensor([list(token_ids)])).logits[0].double() / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    return [float("nan")] + [float(logprobs[i, token]) for i, token in enumerate(token_ids[1:])]
