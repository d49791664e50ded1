"""Supervised fine-tuning: the policy that a run starts from, and the reference that it is held to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.load import config_hash
from configs.run import RunConfig
from learner import batch
from learner.batch import Layout, TokenSequence
from learner.export import export_policy, padding_id, write_policy
from learner.models import PolicyModel, load_policy, new_policy
from learner.supervised_loop import (
    Forward,
    Report,
    StageContext,
    check_ranks_agree,
    context_tokens,
    encode_pair,
    evaluate_sums,
    layout_of,
    run_steps,
    shuffled_steps,
    split_by_prompt,
    stage_seed,
)
from protocol.datasets import ReadReport, read_demonstrations
from protocol.errors import UserError
from protocol.records import DemonstrationRecord
from protocol.tokens import load_tokenizer, tokenizer_from


class DemonstrationTask:
    """Imitate responses.

        L = -sum over response tokens of log pi(y_t | x, y_<t) / N,   N = response tokens of the whole step

    Args:
        sequences: Prompts with their responses.
        pad_id: Any token id.
        layout: Of micro-batches.
        device: Where the network is.
    """

    def __init__(
        self, sequences: Sequence[TokenSequence], *, pad_id: int, layout: Layout, device: torch.device
    ) -> None:
        self.sequences = sequences
        self.lengths = [sequence.num_tokens for sequence in sequences]
        self._pad_id, self._device = pad_id, device
        self._layout: Layout = layout

    def normalizer(self, indices: Sequence[int]) -> float:
        """Count the response tokens of a step."""
        return float(sum(len(self.sequences[index].response_ids) for index in indices))

    def loss(self, forward: Forward, indices: Sequence[int], *, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch's share of the loss; prompt tokens are read and never imitated."""
        rows = [self.sequences[index] for index in indices]
        m = batch.collate(rows, pad_id=self._pad_id, layout=self._layout).to(self._device)
        logprobs, _ = forward(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
        return -logprobs.sum() / normalizer, {}


def train_sft(config: RunConfig, context: StageContext, *, output: Path, report: Report) -> dict[str, Any]:
    """Fine-tune the policy on demonstrations and write it as policy version 0; all ranks call this.

    Without demonstrations the configured policy becomes version 0 as it is.

    Args:
        config: The run's configuration.
        context: This rank's place.
        output: The directory that rank 0 writes; must not exist.
        report: Takes progress.

    Returns:
        What happened: counts, and the loss and perplexity on held-out demonstrations.

    Raises:
        UserError: If data or model cannot be used.
    """
    if config.data.demonstrations is None:
        return _keep_policy(config, context, output=output)
    settings = config.learner.sft
    reading = ReadReport(source=config.data.demonstrations.source)
    tokenizer, policy, records = _open(config, reading)
    sequences = _encode(records, tokenizer, reading=reading, context_tokens=context_tokens(policy), beat=context.beat)
    train, heldout = split_by_prompt(
        [sequence.prompt_ids.tobytes() for sequence in sequences],
        fraction=settings.heldout_fraction,
        seed=stage_seed(config.run.seed, "sft", "held-out"),
    )
    steps = shuffled_steps(
        len(train),
        size=settings.batch_sequences,
        num_epochs=settings.num_epochs,
        num_steps=settings.num_steps,
        seed=lambda epoch: stage_seed(config.run.seed, "sft", epoch),
    )
    layout = layout_of(policy, config.learner)
    engine = context.make_engine(policy, optimizer=settings.optimizer, name="supervised policy", total_steps=len(steps))
    check_ranks_agree(engine, sequences)
    task = DemonstrationTask(sequences, pad_id=padding_id(tokenizer), layout=layout, device=context.device)
    steps = [[train[index] for index in indices] for indices in steps]
    figures = run_steps(engine, task, steps, settings=config.learner, report=report)
    summary: dict[str, Any] = {
        "num_demonstrations": len(train),
        "num_heldout": len(heldout),
        "num_dropped": reading.num_dropped,
        "num_steps": len(steps),
        "train_loss": figures["loss"],
    }
    if heldout:
        loss = evaluate_sums(engine, task, heldout, settings=config.learner)["loss"] / task.normalizer(heldout)
        summary |= {"heldout_loss": loss, "heldout_perplexity": float(np.exp(loss))}
    export_policy(engine, tokenizer, output, card=_card(config, output, metrics=summary, data=reading.summary()))
    engine.close()
    return summary


def _open(config: RunConfig, reading: ReadReport) -> tuple[Any, PolicyModel, list[DemonstrationRecord]]:
    """Read the demonstrations, and make or load tokenizer and policy."""
    source = config.data.demonstrations
    assert source is not None
    records = list(
        read_demonstrations(source.source, split=source.split, seed=config.run.seed, count=source.count, report=reading)
    )
    scratch = config.models.policy.scratch
    if scratch is None:
        path = str(config.models.policy.path)
        return load_tokenizer(path), load_policy(path, precision=config.learner.precision), records
    tokenizer = tokenizer_from(records, vocab_size=scratch.vocab_size, context_tokens=scratch.context_tokens)
    policy = new_policy(scratch, tokenizer, seed=stage_seed(config.run.seed, "policy"))
    if config.learner.precision == "bf16":
        for parameter in policy.parameters():  # and not the buffers: rotary frequencies need their digits
            parameter.data = parameter.data.bfloat16()
    return tokenizer, policy, records


def _encode(
    records: Sequence[DemonstrationRecord],
    tokenizer: Any,
    *,
    reading: ReadReport,
    context_tokens: int | None,
    beat: Callable[[], None],
) -> list[TokenSequence]:
    sequences: list[TokenSequence] = []
    for number, record in enumerate(records, start=1):
        beat()
        sequence = encode_pair(tokenizer, record.prompt, record.completion)
        if context_tokens is not None and sequence.num_tokens > context_tokens:
            # Cutting it would teach the policy to stop in the middle, or never.
            reading.drop(f"longer than the model's context of {context_tokens} tokens", f"demonstration {number}")
            reading.num_kept -= 1
            continue
        sequences.append(sequence)
    if len(sequences) < 2:
        raise UserError(f"too few demonstrations are left: {reading.summary()}", where="data.demonstrations")
    return sequences


def _keep_policy(config: RunConfig, context: StageContext, *, output: Path) -> dict[str, Any]:
    path = str(config.models.policy.path)
    if context.rank == 0:
        policy = load_policy(path, precision=config.learner.precision)
        write_policy(policy, load_tokenizer(path), output, card=_card(config, output, metrics={}, data="none"))
    return {"num_demonstrations": 0, "num_steps": 0}


def _card(config: RunConfig, output: Path, *, metrics: Mapping[str, Any], data: str) -> dict[str, Any]:
    return {
        "run": config.run.name,
        "version": output.name,
        "base": config.models.policy.path or "initialised at random",
        "data": data,
        "algorithm": "supervised fine-tuning" if metrics else "none: the given policy",
        "config": config_hash(config),
        "metrics": metrics,
    }
